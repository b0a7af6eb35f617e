"""The planner: from a byte budget to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from recsys_embed.core.footprint import format_bytes, parse_bytes
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import Initializer, Table
from recsys_embed.errors import BudgetError, ConfigError, RecsysEmbedError, raise_faults, unknown_name
from recsys_embed.features import Schema
from recsys_embed.optim import SGD, FusedOptimizer, is_rate, make_rule
from recsys_embed.plan import Plan, PlanNotes
from recsys_embed.planning.calibration import Calibration, calibrate, read_comparison
from recsys_embed.planning.candidates import Candidate, candidate_methods
from recsys_embed.planning.costs import Costs
from recsys_embed.planning.enumerator import OptionEnumerator, pin_option
from recsys_embed.planning.explain import FeatureChoice, explain
from recsys_embed.planning.frequencies import Frequencies, with_frequent_ids
from recsys_embed.planning.limits import Limits, named_limits
from recsys_embed.planning.loss_estimate import column_spans
from recsys_embed.planning.model_constraints import ModelConstraints, constraints_of
from recsys_embed.planning.network_context import network_context
from recsys_embed.planning.options import FeatureOptions, PlanningContext, tiny_bytes
from recsys_embed.planning.predict import curve_terms, plan_losses
from recsys_embed.planning.solver import JOIN, PlanSolution, PlanSolver
from recsys_embed.planning.table_groups import TableGroup, group_configs, table_groups
from recsys_embed.typing import EvidenceSource, Methods, ModelOrSchema, Statistics, UpdateRule
from recsys_embed.utils.types import Budget, Option

MANY_FEATURES = 200
"""With more features than this, the grid of sizes is coarser."""
EVALUATIONS = 24_000
"""Approximate number of configurations on the coarse grids of all features together."""


def plan_for_budget(
    model_or_schema: ModelOrSchema,
    budget: Budget,
    target: str = "serve",
    methods: Methods | None = None,
    optimizer: UpdateRule | None = "rowwise_adagrad",
    stats: Statistics | None = None,
    *,
    evidence: EvidenceSource | None = None,
    importance: Mapping[str, float] | None = None,
    itemsize: int | None = None,
    network: bool | Mapping[str, bool] | None = None,
    **limits: Option,
) -> Plan:
    """Choose a method and a size for every table, so that all of them together fit a byte budget and lose least.

    The choice is a multiple-choice knapsack over every registered method at many sizes; losses are estimated from
    collisions, narrow rows and missing rows (:mod:`recsys_embed.planning.loss_estimate`). Features may also
    share one table, where a method supports it. Equal arguments give equal plans.

    Args:
        model_or_schema: the features, or a model whose embedding tables are the features. Of a model the plan is one
            that :func:`recsys_embed.compress_` can follow; tables that cannot be replaced are named in its notes.
        budget: bytes, or text such as ``"64MiB"``, that all tables of the plan and index buffers may take.
        target: ``"serve"``: weights and index buffers; ``"train"``: also the optimizer's state, and gradients of the
            parameters it does not update (projections and networks; with ``optimizer=None`` everything).
        methods: names to choose from, or names with options; all by default.
        optimizer: fused optimizer of the tables, or its name.
        stats: how often ids occur: per feature counts or a :class:`FrequencyCurve`, an opened data set, its folder or
            the content of its ``stats.json``. Without statistics, Zipf curves are assumed, losses are guesses, and
            methods that treat frequent ids differently are left out; so they are where statistics do not say which
            ids are frequent. Which ids these are is part of the plan.
        evidence: rows of an earlier ``recsys-embed compare`` (its folder, or a JSON file), to which the losses of the
            methods in it are calibrated.
        importance: factors of the losses by feature; 1 by default.
        itemsize: bytes per stored number; by default those of the model's tables, or 4 for a schema. It must be
            given where the tables of a model differ in it.
        network: whether a network reads a feature's vector beside many others and so can tell ids of one row apart, for
            all or by feature; else ids get narrow rows rather than shared ones. By default found out, see
            :mod:`recsys_embed.planning.network_context`.
        limits: ``pin``, ``forbid``, ``full_below``, ``min_width``, ``width_multiple``, ``needs_equal_widths``,
            ``max_rows_per_id`` and ``max_bytes_per_id``: see :class:`recsys_embed.planning.Limits`.

    Returns:
        A plan with a reason per feature, and notes on its budget, its bytes and how close to optimal it is.

    Raises:
        BudgetError: the budget cannot be met; the message gives the least budget and the ways out.
        ConfigError: arguments are wrong or leave a feature without a method; all faults at once.

    >>> from recsys_embed import FeatureSpec
    >>> schema = Schema([FeatureSpec("C1", 100, 16), FeatureSpec("C2", 500_000, 16)])
    >>> plan = plan_for_budget(schema, "1MiB", methods=["full", "hash"])
    >>> plan["C1"].method, plan["C2"].method, plan.footprint(schema).serve <= 2**20
    ('full', 'hash', True)
    """
    given = _schema(model_or_schema)
    # Sorted, so that ties are broken alike whatever the order of the features.
    schema = Schema(sorted(given, key=lambda s: s.name))
    constraints = (
        constraints_of(model_or_schema) if isinstance(model_or_schema, nn.Module) else ModelConstraints({}, {}, (), {})
    )
    total, context = _context(schema, budget, target, methods, optimizer, _itemsize(itemsize, constraints), limits)
    frequencies = Frequencies.of(schema, stats)
    weights = _importance(schema, importance)
    network_found = network_context(model_or_schema, schema, network)
    terms = curve_terms(schema, frequencies.curves, network_found.without_network)
    calibration = Calibration() if evidence is None else calibrate(read_comparison(evidence), schema, terms)
    context = replace(
        context,
        loss_scales=calibration.scales,
        options=constraints.options,
        kinds=constraints.kinds,
        equal_row_widths=network_found.equal_row_widths,
        sharing_penalty=float(len(network_found.without_network)),
        **_detail(schema, context.candidates),
    )
    maker = OptionEnumerator(context)
    features = [maker.enumerate(s, terms[s.name], weights[s.name], frequencies.unordered.get(s.name)) for s in schema]
    pinned, spent = _pinned_tables(schema, features, context)
    groups = table_groups(features, context, {t.name for t in pinned})
    _check_possible(features, groups)
    found = _solution(schema, features, groups, context, total, spent)
    configs = _configs(schema, features, found, total - spent)
    plan = Plan({s.name: configs[s.name] for s in given})
    losses = plan_losses(schema, plan, terms, weights, calibration.scales)
    notes = _notes(schema, plan, context, found, total, frequencies.source, constraints.left_out)
    reasons = _reasons(schema, plan, features, losses, context, frequencies.known)
    return with_frequent_ids(Plan(plan.configs, reasons, notes), schema, stats)


# -- arguments ------------------------------------------------------------------------------------------------------


def _schema(model_or_schema: ModelOrSchema) -> Schema:
    if isinstance(model_or_schema, Schema):
        return model_or_schema
    if isinstance(model_or_schema, nn.Module):
        return Schema.from_model(model_or_schema)
    raise ConfigError(f"expected a Schema or a torch.nn.Module; got {type(model_or_schema).__name__}")


def _itemsize(given: Any, constraints: ModelConstraints) -> Any:
    """Bytes per element: as given, else those of the tables; where these differ, the first table of each size."""
    if given is not None or not constraints.itemsizes:
        return 4 if given is None else given
    first: dict[int, str] = {}
    for name, size in constraints.itemsizes.items():
        first.setdefault(size, name)
    return first if len(first) > 1 else next(iter(first))


def _context(
    schema: Schema, budget: Any, target: Any, methods: Any, optimizer: Any, itemsize: Any, options: Mapping[str, Any]
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
    chosen = attempt(lambda: candidate_methods(methods), [])
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
    return total, PlanningContext(_with_pins(chosen, limits), Costs(fused, target == "train", itemsize), limits)


def _with_pins(chosen: list[Candidate], limits: Limits) -> list[Candidate]:
    """Candidates with pinned methods added: a pinned method need not be among ``methods``."""
    names = {c.name for c in chosen}
    extra = [p for p in limits.pin.values() if isinstance(p, str) and p not in names]
    return chosen + candidate_methods(extra) if extra else chosen


def _optimizer(optimizer: UpdateRule | None) -> FusedOptimizer | None:
    if optimizer is None or isinstance(optimizer, FusedOptimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise ConfigError(f"`optimizer` must be a fused optimizer, its name, or None; got {optimizer!r:.80}")
    return make_rule(optimizer)


def _importance(schema: Schema, importance: Mapping[str, float] | None) -> dict[str, float]:
    given, names = {} if importance is None else dict(importance), schema.names
    faults = [str(unknown_name("feature in `importance`", n, names)) for n in sorted(set(given) - set(names), key=str)]
    for name, value in given.items():
        if not is_rate(value):
            faults.append(f"`importance` must be a finite number >= 0; got {value!r} (feature {name!r})")
    raise_faults(faults, "plan_for_budget")
    return {s.name: float(given.get(s.name, 1.0)) for s in schema}


def _detail(schema: Schema, chosen: Sequence[Candidate]) -> dict[str, Any]:
    """Resolution of the grids of sizes: coarser where there are many features."""
    grid_points = min(14, max(4, EVALUATIONS // (len(schema) * max(1, len(chosen)))))
    if len(schema) <= MANY_FEATURES:
        return {"grid_points": grid_points, "rounds": 3}
    return {"grid_points": grid_points, "rounds": 1, "step": 1.2, "variants": False}


# -- impossible plans ----------------------------------------------------------------------------------------------


def _pinned_tables(
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


def _check_possible(features: Sequence[FeatureOptions], groups: Sequence[TableGroup]) -> None:
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


def _ways_out(
    schema: Schema, features: Sequence[FeatureOptions], context: PlanningContext, least: int, total: int
) -> str:
    """The budget that would suffice, and other ways out, least bytes first."""
    ways: list[tuple[int, str]] = []

    def smallest(costs: Costs, limits: Limits, names: Any) -> int | None:
        other = PlanningContext(
            candidate_methods(names),
            costs,
            limits,
            grid_points=4,
            rounds=0,
            options=context.options,
            kinds=context.kinds,
            equal_row_widths=context.equal_row_widths,
            sharing_penalty=context.sharing_penalty,
        )
        maker = OptionEnumerator(other)
        made = [maker.enumerate(m.spec, m.terms, m.weight, None) for m in features]
        try:
            _, spent = _pinned_tables(schema, made, other)
            groups = table_groups(made, other, set())
            _check_possible(made, groups)
            return PlanSolver(made, groups).least() + spent
        except RecsysEmbedError:
            return None

    names = [c.name for c in context.candidates]
    trials: list[tuple[str, Costs, Limits, Any]] = [
        ("let the planner choose from all methods", context.costs, context.limits, None)
    ]
    free = Limits(needs_equal_widths=context.limits.needs_equal_widths)
    if context.limits != free:
        trials.append(("fewer limits (pins, forbidden methods, widths, reads)", context.costs, free, names))
    if context.costs.train:
        trials.append(("an optimizer without state, such as 'sgd'", Costs(SGD(), True, context.costs.itemsize),
                       context.limits, names))  # fmt: skip
    for text, costs, limits, chosen in trials:
        need = smallest(costs, limits, chosen)
        if need is not None and need < least:
            ways.append((need, f"{text}: {format_bytes(need)} at least"))
    if max(s.embedding_dim for s in schema) > 1:
        ways.append((least - 1, "a smaller embedding_dim"))
    listed = [f"a budget of {format_bytes(least)} ({least} bytes) or more", *(text for _, text in sorted(ways))]
    out = "; ".join(f"{i}. {text}" for i, text in enumerate(listed, 1))
    kind = "training" if context.costs.train else "serving"
    return (
        f"{len(schema)} features need at least {format_bytes(least)} for {kind} with the methods and limits given; "
        f"{format_bytes(total)} available. Ways out: {out}"
    )


# -- the plan chosen --------------------------------------------------------------------------------------------


def _solution(
    schema: Schema,
    features: Sequence[FeatureOptions],
    groups: Sequence[TableGroup],
    context: PlanningContext,
    total: int,
    spent: int,
) -> PlanSolution:
    """The best solution within ``total`` bytes, ``spent`` of which pinned tables take."""
    solver = PlanSolver(features, groups, tiny_bytes(features, context))
    least = solver.least() + spent
    found = solver.best(total - spent) if total >= least else None
    if found is None:
        raise BudgetError(_ways_out(schema, features, context, least, total))
    return found


def _configs(
    schema: Schema, features: Sequence[FeatureOptions], found: PlanSolution, total: int
) -> dict[str, MethodConfig]:
    """Configurations of the options chosen; bytes left over enlarge shared tables or other options."""
    configs: dict[str, MethodConfig] = {}
    members = [i for i, name in enumerate(found.names) if name == JOIN]
    left, group = total, found.split.group
    growing = []
    for i, name in enumerate(found.names):
        if name == JOIN:
            continue
        option = features[i].options[name]
        config, cost = option.config, option.cost
        if config is None:
            config, cost = option.grown(option.cost)
        configs[schema.features[i].name] = config
        left -= cost
        growing.append((i, option, cost))
    if group is not None and members:
        own = {i: int(cost) for i, cost in zip(group.members, group.own, strict=True)}
        left -= sum(own[i] for i in members)
        together = group_configs(group, features, members, min(group.most, left // group.unit))
        if together is None:
            raise RuntimeError(f"method {group.name!r} cannot be sized to {left} bytes for {len(members)} features")
        return {**configs, **together}
    for i, option, cost in sorted(growing, key=lambda g: -g[1].loss)[:16]:
        config, grown = option.grown(cost + left)
        if grown > cost:
            configs[schema.features[i].name] = config
            left -= grown - cost
    return configs


def _notes(
    schema: Schema,
    plan: Plan,
    context: PlanningContext,
    found: PlanSolution,
    total: int,
    source: str,
    left_out: tuple[str, ...],
) -> PlanNotes:
    costs = context.costs
    reached = costs.plan(plan, schema)
    if reached > total:
        raise RuntimeError(f"the plan takes {reached} bytes of {total}; this is a fault of the planner")
    return PlanNotes(
        budget=total,
        bytes=reached,
        target="train" if costs.train else "serve",
        optimizer=None if costs.optimizer is None else type(costs.optimizer).__name__,
        predicted_loss=found.loss,
        least_loss=found.bound,
        exact=found.exact,
        statistics=source,
        measured=tuple(sorted(context.loss_scales)),
        left_out=left_out,
        itemsize=costs.itemsize,
    )


def _reasons(
    schema: Schema,
    plan: Plan,
    features: Sequence[FeatureOptions],
    losses: Mapping[str, float],
    context: PlanningContext,
    known: frozenset[str],
) -> dict[str, str]:
    programs = {s.name: plan[s.name].program(s) for s in schema}
    readers: dict[str, int] = {}
    for program in programs.values():
        for table in program.tables:
            readers[table.name] = readers.get(table.name, 0) + table.shared
    out = {}
    for feature in features:
        spec, terms = feature.spec, feature.terms
        program = programs[spec.name]
        full = Table("weight", spec.num_embeddings, spec.embedding_dim, Initializer.plain(spec))
        value = float(terms.value.sum()) * feature.weight
        choice = FeatureChoice(
            spec=spec,
            terms=terms,
            config=plan[spec.name],
            program=program,
            spans=column_spans(program, terms),
            own_bytes=context.costs.own(plan[spec.name], program, spec),
            full_bytes=context.costs.table(full),
            loss=losses[spec.name] / value if value else 0.0,
            readers=max((readers[t.name] for t in program.tables if t.shared), default=0),
            counted=spec.name in known,
        )
        out[spec.name] = explain(choice, context.limits)
    return out
