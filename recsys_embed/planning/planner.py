"""The planner: from a byte budget to a plan."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import Initializer, Table
from recsys_embed.errors import BudgetError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan, PlanNotes
from recsys_embed.planning.arguments import checked_importance, grid_detail, itemsize_of, planning_context, schema_of
from recsys_embed.planning.calibration import Calibration, calibrate, read_comparison
from recsys_embed.planning.enumerator import OptionEnumerator
from recsys_embed.planning.explain import FeatureChoice, explain
from recsys_embed.planning.feasibility import check_possible, pinned_tables, ways_out
from recsys_embed.planning.frequencies import Frequencies, with_frequent_ids
from recsys_embed.planning.loss_estimate import column_spans
from recsys_embed.planning.model_constraints import constraints_of
from recsys_embed.planning.network_context import network_context
from recsys_embed.planning.options import FeatureOptions, PlanningContext, tiny_bytes
from recsys_embed.planning.predict import curve_terms, plan_losses
from recsys_embed.planning.shared_rows import shared_rows
from recsys_embed.planning.shared_tables import (
    context_of_tables,
    importance_of_tables,
    limits_of_tables,
    statistics_of_tables,
)
from recsys_embed.planning.solver import JOIN, PlanSolution, PlanSolver
from recsys_embed.planning.table_groups import TableGroup, group_configs, table_groups, undominated_groups
from recsys_embed.typing import EvidenceSource, Methods, ModelOrSchema, Statistics, UpdateRule
from recsys_embed.utils.types import Budget, Option


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
    precision: str | Sequence[str] = "fp32",
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
        precision: of the rows once they are served: a name as :func:`recsys_embed.export` knows them, names to choose
            from for each table, or ``"auto"`` for fp32, int8, int4 and int2. Rows train unrounded, so with ``target=
            "train"`` fewer bits save nothing, unless ``methods`` give them a ``quantization``. Exports follow the plan.
        network: whether a network reads a feature's vector beside many others and so can tell ids of one row apart, for
            all or by feature; else ids get narrow rows rather than shared ones. By default found out, see
            :mod:`recsys_embed.planning.network_context`.
        limits: ``pin``, ``forbid``, ``full_below``, ``min_width``, ``width_multiple``, ``needs_equal_widths``,
            ``max_rows_per_id`` and ``max_bytes_per_id``: see :class:`recsys_embed.planning.Limits`.

    Returns:
        A plan with a reason per feature, and notes on its budget, its bytes and how close to optimal it is. Where ids
        share rows that no network tells apart, because the budget is too small for rows of their own, a warning and a
        note name the tables and the least budget that suffices.

    Raises:
        BudgetError: the budget cannot be met; the message gives the least budget and the ways out.
        ConfigError: arguments are wrong or leave a feature without a method; all faults at once.

    >>> from recsys_embed import FeatureSpec
    >>> schema = Schema([FeatureSpec("C1", 100, 16), FeatureSpec("C2", 500_000, 16)])
    >>> plan = plan_for_budget(schema, "1MiB", methods=["full", "hash"])
    >>> plan["C1"].method, plan["C2"].method, plan.footprint(schema).serve <= 2**20
    ('full', 'hash', True)
    """
    given = schema_of(model_or_schema)
    # Sorted, so that ties are broken alike whatever the order of the features.
    schema = Schema(sorted(given.first_readers, key=lambda s: s.name))
    constraints = constraints_of(model_or_schema)
    itemsize = itemsize_of(itemsize, constraints)
    total, context = planning_context(given, budget, target, methods, optimizer, itemsize, precision, limits)
    context = replace(context, limits=limits_of_tables(given, context.limits))
    frequencies = Frequencies.of(schema, statistics_of_tables(given, stats))
    weights = importance_of_tables(given, checked_importance(given, importance))
    network_found = context_of_tables(given, network_context(model_or_schema, given, network))
    terms = curve_terms(schema, frequencies.curves, network_found.without_network)
    calibration = Calibration() if evidence is None else calibrate(read_comparison(evidence), schema, terms)
    context = replace(
        context,
        loss_scales=calibration.scales,
        options=constraints.options,
        kinds=constraints.kinds,
        equal_row_widths=network_found.equal_row_widths,
        sharing_penalty=float(len(network_found.without_network)),
        **grid_detail(schema, context.candidates),
    )
    maker = OptionEnumerator(context)
    features = [maker.enumerate(s, terms[s.name], weights[s.name], frequencies.unordered.get(s.name)) for s in schema]
    pinned, spent = pinned_tables(schema, features, context)
    taken = {t.name for t in pinned}
    groups = table_groups(features, context, taken)
    check_possible(features, groups)
    found = _solution(schema, features, groups, context, total, spent)
    configs = _configs(schema, features, found, total - spent)
    plan = Plan({s.name: configs[s.name] for s in given.first_readers})
    losses = plan_losses(schema, plan, terms, weights, calibration.scales)
    notes = _notes(schema, plan, context, found, total, frequencies.source, constraints.left_out)
    warning = shared_rows(plan, features, context, taken, spent)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
        notes = replace(notes, warnings=(warning,))
    reasons = _reasons(schema, plan, features, losses, context, frequencies.known, given)
    return with_frequent_ids(Plan(plan.configs, reasons, notes).for_readers(given), given, stats)


def _solution(
    schema: Schema,
    features: Sequence[FeatureOptions],
    groups: Sequence[TableGroup],
    context: PlanningContext,
    total: int,
    spent: int,
) -> PlanSolution:
    """The best solution within ``total`` bytes, ``spent`` of which pinned tables take."""
    solver = PlanSolver(features, undominated_groups(groups, total), tiny_bytes(features, context))
    least = solver.least() + spent
    found = solver.best(total - spent) if total >= least else None
    if found is None:
        raise BudgetError(ways_out(schema, features, context, least, total))
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
        together = group_configs(group, features, members, group.rows_within(left))
        if together is None:
            raise RuntimeError(f"method {group.name!r} cannot be sized to {left} bytes for {len(members)} features")
        return {**configs, **together}
    for i, option, cost in sorted(growing, key=lambda g: -g[1].loss)[:16]:
        config, grown = option.grown(cost + left)
        if grown > cost:
            configs[schema.features[i].name] = config
            left -= grown - cost
    return configs


def _with_readers(reason: str, readers: Sequence[FeatureSpec]) -> str:
    return reason if len(readers) == 1 else f"{reason}; one table for {', '.join(s.name for s in readers)}"


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
    given: Schema,
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
        out[spec.name] = _with_readers(explain(choice, context.limits), given.by_table[given[spec.name].table_name])
    return out
