"""Whether any plan can be: the tables that pins fix, features without a method, and ways out of a budget too small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.precision import Precision
from recsys_embed.errors import RecsysEmbedError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.optim import SGD
from recsys_embed.plan import Plan
from recsys_embed.planning.candidates import candidate_methods
from recsys_embed.planning.costs import Costs
from recsys_embed.planning.enumerator import OptionEnumerator, pin_option
from recsys_embed.planning.explain import counted
from recsys_embed.planning.limits import Limits
from recsys_embed.planning.options import FeatureOptions, PlanningContext
from recsys_embed.planning.predict import plan_losses
from recsys_embed.planning.rounding import AUTO
from recsys_embed.planning.solver import PlanSolver
from recsys_embed.planning.table_groups import TableGroup, table_groups

MOST_NAMES = 5
"""Tables that a message names."""


def pinned_tables(
    schema: Schema, features: Sequence[FeatureOptions], context: PlanningContext
) -> tuple[list[Any], int]:
    """Shared tables that pinned configurations fix, and their bytes; their features count as private."""
    pins = {s.name: p for s in schema if isinstance(p := context.limits.pinned(s.name), MethodConfig)}
    fixed = [m for m in features if m.spec.name in pins and m.shared]
    if not fixed:
        return [], 0
    part = Schema([m.spec for m in fixed])
    tables = [t for t in Plan({m.spec.name: pins[m.spec.name] for m in fixed}).tables(part).values() if t.shared]
    terms = {m.spec.name: m.terms for m in fixed}
    plan = Plan({m.spec.name: pins[m.spec.name] for m in fixed})
    weights = {m.spec.name: m.weight for m in fixed}
    losses = plan_losses(part, plan, terms, weights, context.loss_scales)
    for feature in fixed:
        pin_option(feature, feature.shared[0].smallest, losses[feature.spec.name])
    return tables, sum(context.costs.table(t) for t in tables)


def check_possible(features: Sequence[FeatureOptions], groups: Sequence[TableGroup]) -> None:
    """Raise where a feature has no option, with the methods refused and why."""
    faults = []
    for i, feature in enumerate(features):
        if feature.options or any(i in group.members for group in groups):
            continue
        why = "; ".join(f"{name}: {text}" for name, text in feature.refused.items()) or "none was offered"
        if feature.shared:
            why = f"{feature.shared[0].smallest.config.method}: its table differs in shape or kind from the others'"
        faults.append(f"no method is left ({why}) (feature {feature.spec.name!r})")
    alone = {i for i, m in enumerate(features) if not m.options}
    if not faults and alone and not any(alone <= set(group.members) for group in groups):
        names = ", ".join(features[i].spec.name for i in sorted(alone))
        faults.append(f"features {names} can only share tables, and of different methods; a plan shares those of one")
    raise_faults(faults, "plan_for_budget")


def ways_out(
    schema: Schema, features: Sequence[FeatureOptions], context: PlanningContext, least: int, total: int
) -> str:
    """The budget that would suffice, and other ways out, least bytes first."""
    ways: list[tuple[int, str]] = []

    allowed = tuple(dict.fromkeys(c.precision for c in context.candidates))

    def smallest(
        costs: Costs,
        limits: Limits,
        names: Any,
        options: Mapping[str, str] = context.options,
        precisions: Sequence[Precision] = allowed,
    ) -> int | None:
        other = PlanningContext(
            candidate_methods(names, precisions),
            costs,
            limits,
            grid_points=4,
            rounds=0,
            options=options,
            kinds=context.kinds,
            equal_row_widths=context.equal_row_widths,
            sharing_penalty=context.sharing_penalty,
        )
        maker = OptionEnumerator(other)
        made = [maker.enumerate(m.spec, m.terms, m.weight, None) for m in features]
        try:
            _, spent = pinned_tables(schema, made, other)
            groups = table_groups(made, other, set())
            check_possible(made, groups)
            return PlanSolver(made, groups).least() + spent
        except RecsysEmbedError:
            return None

    names = list(dict.fromkeys(c.name for c in context.candidates))
    trials: list[tuple[str, Costs, Limits, Any]] = [
        ("let the planner choose from all methods", context.costs, context.limits, None)
    ]
    free = Limits(needs_equal_widths=context.limits.needs_equal_widths)
    if context.limits != free:
        trials.append(("fewer limits (pins, forbidden methods, widths, reads)", context.costs, free, names))
    if context.costs.train:
        trials.append(("an optimizer without state, such as 'sgd'", Costs(SGD(), True, context.costs.itemsize),
                       context.limits, names))  # fmt: skip
    if context.options:
        held = ", ".join(f"`{option}` of {name!r}" for name, option in sorted(context.options.items())[:MOST_NAMES])
        able = [c.name for c in candidate_methods(None) if c.info.embedding_cls.supports_torch_options]
        need = smallest(context.costs, context.limits, names, {})
        if need is not None and need < least:
            only = " or ".join(map(repr, able))
            ways.append(
                (need, f"tables without {held}, which only method {only} supports: {format_bytes(need)} at least")
            )
    for text, costs, limits, chosen in trials:
        need = smallest(costs, limits, chosen)
        if need is not None and need < least:
            ways.append((need, f"{text}: {format_bytes(need)} at least"))
    if not context.costs.train and AUTO[-1] not in allowed:
        need = smallest(context.costs, context.limits, names, precisions=AUTO)
        if need is not None and need < least:
            ways.append((need, f'rows of fewer bits, precision="auto": {format_bytes(need)} at least'))
    if max(s.embedding_dim for s in schema) > 1:
        ways.append((least - 1, "a smaller embedding_dim"))
    listed = [f"a budget of {format_bytes(least)} ({least} bytes) or more", *(text for _, text in sorted(ways))]
    out = "; ".join(f"{i}. {text}" for i, text in enumerate(listed, 1))
    kind = "training" if context.costs.train else "serving"
    who = f"{counted(len(schema), 'feature')} need{'s' * (len(schema) == 1)} at least {format_bytes(least)}"
    return f"{who} for {kind} with the methods and limits given; {format_bytes(total)} available. Ways out: {out}"
