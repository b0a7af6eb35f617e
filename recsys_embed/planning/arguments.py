"""What plan_for_budget is given, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from recsys_embed.core.footprint import parse_bytes
from recsys_embed.core.precision import Precision
from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.features import Schema
from recsys_embed.optim import FusedOptimizer, is_rate, make_rule
from recsys_embed.planning.candidates import Candidate, candidate_methods
from recsys_embed.planning.costs import Costs
from recsys_embed.planning.limits import Limits, named_limits
from recsys_embed.planning.model_constraints import ModelConstraints
from recsys_embed.planning.options import PlanningContext
from recsys_embed.planning.rounding import precisions_of
from recsys_embed.typing import ModelOrSchema, UpdateRule

COARSE_GRID_ABOVE = 200
"""With more features than this, the grid of sizes is coarser."""
EVALUATIONS = 24_000
"""Approximate number of configurations on the coarse grids of all features together."""


def schema_of(model_or_schema: ModelOrSchema) -> Schema:
    """The features that a plan is for."""
    if isinstance(model_or_schema, Schema):
        return model_or_schema
    if isinstance(model_or_schema, nn.Module):
        return Schema.from_model(model_or_schema)
    raise ConfigError(f"expected a Schema or a torch.nn.Module; got {type(model_or_schema).__name__}")


def itemsize_of(given: Any, constraints: ModelConstraints) -> Any:
    """Bytes per element: as given, else those of the tables; where these differ, the first table of each size."""
    if given is not None or not constraints.itemsizes:
        return 4 if given is None else given
    first: dict[int, str] = {}
    for name, size in constraints.itemsizes.items():
        first.setdefault(size, name)
    return first if len(first) > 1 else next(iter(first))


def planning_context(
    schema: Schema,
    budget: Any,
    target: Any,
    methods: Any,
    optimizer: Any,
    itemsize: Any,
    precision: Any,
    options: Mapping[str, Any],
) -> tuple[int, PlanningContext]:
    """Budget and planning context, from checked arguments; all faults at once."""
    faults: list[str] = []

    def attempt(make: Any, default: Any) -> Any:
        try:
            return make()
        except ConfigError as e:
            faults.append(str(e))
            return default

    total = attempt(lambda: parse_bytes(budget), 1)
    precisions = attempt(lambda: precisions_of(precision), ("fp32",))
    chosen = attempt(lambda: candidate_methods(methods, precisions), [])
    limits = attempt(lambda: named_limits(options), Limits())
    fused = attempt(lambda: _optimizer(optimizer), None)
    faults += limits.faults(schema)
    if target not in ("serve", "train"):
        faults.append(f"`target` must be 'serve' or 'train'; got {target!r}")
    if isinstance(itemsize, Mapping):
        examples = "; ".join(f"{size} of {name!r}" for size, name in itemsize.items())
        faults.append(
            f"the model's tables differ in bytes per number ({examples}); give `itemsize`, the largest to keep to the "
            "budget in any case"
        )
    elif not isinstance(itemsize, int) or isinstance(itemsize, bool) or itemsize < 1:
        faults.append(f"`itemsize` must be an integer >= 1; got {itemsize!r}")
    raise_faults(faults, "plan_for_budget")
    return total, PlanningContext(
        _with_pins(chosen, limits, precisions), Costs(fused, target == "train", itemsize), limits
    )


def _with_pins(chosen: list[Candidate], limits: Limits, precisions: Sequence[Precision]) -> list[Candidate]:
    """Candidates with pinned methods added: a pinned method need not be among ``methods``."""
    names = {c.name for c in chosen}
    extra = [p for p in limits.pin.values() if isinstance(p, str) and p not in names]
    return chosen + candidate_methods(extra, precisions) if extra else chosen


def _optimizer(optimizer: UpdateRule | None) -> FusedOptimizer | None:
    if optimizer is None or isinstance(optimizer, FusedOptimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise ConfigError(f"`optimizer` must be a fused optimizer, its name, or None; got {optimizer!r:.80}")
    return make_rule(optimizer)


def checked_importance(schema: Schema, importance: Mapping[str, float] | None) -> dict[str, float]:
    """Factors of the losses of all features."""
    given, names = {} if importance is None else dict(importance), schema.names
    faults = [str(unknown_name("feature in `importance`", n, names)) for n in sorted(set(given) - set(names), key=str)]
    for name, value in given.items():
        if not is_rate(value):
            faults.append(f"`importance` must be a finite number >= 0; got {value!r} (feature {name!r})")
    raise_faults(faults, "plan_for_budget")
    return {s.name: float(given.get(s.name, 1.0)) for s in schema}


def grid_detail(schema: Schema, chosen: Sequence[Candidate]) -> dict[str, Any]:
    """Resolution of the grids of sizes: coarser where there are many features."""
    grid_points = min(14, max(4, EVALUATIONS // (len(schema) * max(1, len(chosen)))))
    if len(schema) <= COARSE_GRID_ABOVE:
        return {"grid_points": grid_points, "rounds": 3}
    return {"grid_points": grid_points, "rounds": 1, "step": 1.2, "variants": False}
