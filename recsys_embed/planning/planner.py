"""From a byte budget to a plan."""

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
from recsys_embed.planning.curves import EXPONENT, LOOKUPS_PER_ID, FrequencyCurve
from recsys_embed.planning.evidence import Evidence, fit_evidence, read_rows
from recsys_embed.planning.limits import Candidate, Costs, Limits, candidates, named_limits
from recsys_embed.planning.menus import MenuMaker, fix
from recsys_embed.planning.needs import Needs, needs_of
from recsys_embed.planning.options import Frame, Menu, tiny_bytes
from recsys_embed.planning.pools import Pool, configs_of, pools_of
from recsys_embed.planning.predict import plan_losses, terms_of
from recsys_embed.planning.price import factors
from recsys_embed.planning.reasons import reason
from recsys_embed.planning.search import JOIN, Found, Search
from recsys_embed.planning.statistics import curves_from
from recsys_embed.typing import Budget, EvidenceSource, Methods, ModelOrSchema, Option, Statistics, UpdateRule

MANY = 200
"""Features beyond which options are looked at less closely."""
EVALUATIONS = 24_000
"""Configurations looked at on the coarse grid of all features together, about."""


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
    **limits: Option,
) -> Plan:
    """Choose a method and a size for every table, so that all together keep to a byte budget and lose least.

    The choice is a multiple-choice knapsack over every registered method at many sizes; losses come from a model of
    what collisions, narrow rows and missing rows take away (:mod:`recsys_embed.planning.price`). Features may also
    share one table, where a method has such. Equal arguments give equal plans.

    Args:
        model_or_schema: the features, or a model whose embedding tables are the features. Of a model the plan is one
            that :func:`recsys_embed.compress_` can follow; tables that cannot be replaced are named in its notes.
        budget: bytes, or text such as ``"64MiB"``, that all tables of the plan and index buffers may take.
        target: ``"serve"``: weights and index buffers; ``"train"``: also the optimizer's state, and gradients of what
            it does not hold (projections and networks; with ``optimizer=None`` everything).
        methods: names to choose from, or names with options; all by default.
        optimizer: fused optimizer of the tables, or its name.
        stats: how often ids occur: per feature counts or a :class:`FrequencyCurve`, an opened data set, its folder or
            the content of its ``stats.json``. Without, Zipf curves are assumed and methods that treat frequent ids
            apart are left out.
        evidence: rows of an earlier ``recsys-embed compare`` (its folder, or a JSON file), to which the losses of the
            methods found there are fitted.
        importance: factors of the losses by feature; 1 by default.
        itemsize: bytes per stored number; by default those of the model's tables, 4 of a schema. A model whose tables
            differ in it needs to be told one for all.
        limits: ``pin``, ``forbid``, ``full_below``, ``min_width``, ``width_multiple``, ``needs_equal_widths``,
            ``max_rows_per_id`` and ``max_bytes_per_id``: see :class:`recsys_embed.planning.Limits`.

    Returns:
        A plan with a reason per feature and notes of what was aimed at, reached and proved.

    Raises:
        BudgetError: the budget cannot be met; says what is required and the ways out.
        ConfigError: arguments are wrong or leave a feature without a method; all faults at once.

    >>> from recsys_embed import FeatureSpec
    >>> schema = Schema([FeatureSpec("C1", 100, 16), FeatureSpec("C2", 500_000, 16)])
    >>> plan = plan_for_budget(schema, "1MiB", methods=["full", "hash"])
    >>> plan["C1"].method, plan["C2"].method, plan.footprint(schema).serve <= 2**20
    ('full', 'hash', True)
    """
    given = _schema(model_or_schema)
    # In one order, whichever the features come in: ties are then broken alike.
    schema = Schema(sorted(given, key=lambda s: s.name))
    needs = needs_of(model_or_schema) if isinstance(model_or_schema, nn.Module) else Needs({}, {}, (), {})
    total, fused, frame = _frame(schema, budget, target, methods, optimizer, _itemsize(itemsize, needs), limits)
    curves, source, known = _curves(schema, stats)
    weights = _importance(schema, importance)
    terms = terms_of(schema, curves)
    proof = Evidence() if evidence is None else fit_evidence(read_rows(evidence), schema, terms)
    frame = replace(frame, factors=proof.factors, options=needs.options, kinds=needs.kinds)
    frame = replace(frame, **_detail(schema, frame.candidates))
    maker = MenuMaker(frame)
    menus = [maker.menu(s, terms[s.name], weights[s.name], s.name in known) for s in schema]
    pinned, spent = _pinned_tables(schema, menus, frame)
    pools = pools_of(menus, frame, {t.name for t in pinned})
    _check_possible(menus, pools)
    search = Search(menus, pools, tiny_bytes(menus, frame))
    least = search.least() + spent
    found = search.best(total - spent) if total >= least else None
    if found is None:
        raise BudgetError(_ways_out(schema, menus, frame, least, total))
    configs = _configs(schema, menus, found, total - spent)
    plan = Plan({s.name: configs[s.name] for s in given})
    reached = frame.costs.plan(plan, schema)
    if reached > total:
        raise RuntimeError(f"the plan takes {reached} bytes of {total}; this is a fault of the planner")
    losses = plan_losses(schema, plan, terms, weights, proof.factors)
    notes = PlanNotes(
        budget=total,
        bytes=reached,
        target=target,
        optimizer=None if fused is None else type(fused).__name__,
        predicted_loss=found.loss,
        least_loss=found.bound,
        exact=found.exact,
        statistics=source,
        measured=tuple(sorted(proof.factors)),
        left_out=needs.left_out,
        itemsize=frame.costs.itemsize,
    )
    return Plan(plan.configs, _reasons(schema, plan, menus, losses, frame, known), notes)


# -- arguments ------------------------------------------------------------------------------------------------------


def _schema(model_or_schema: ModelOrSchema) -> Schema:
    if isinstance(model_or_schema, Schema):
        return model_or_schema
    if isinstance(model_or_schema, nn.Module):
        return Schema.from_model(model_or_schema)
    raise ConfigError(f"expected a Schema or a torch.nn.Module; got {type(model_or_schema).__name__}")


def _itemsize(given: Any, needs: Needs) -> Any:
    """Bytes per number: as given, else those of all tables; where these differ, the first table of each size."""
    if given is not None or not needs.itemsizes:
        return 4 if given is None else given
    first: dict[int, str] = {}
    for name, size in needs.itemsizes.items():
        first.setdefault(size, name)
    return first if len(first) > 1 else next(iter(first))


def _frame(
    schema: Schema, budget: Any, target: Any, methods: Any, optimizer: Any, itemsize: Any, options: Mapping[str, Any]
) -> tuple[int, FusedOptimizer | None, Frame]:
    """Budget, optimizer and frame; all faults at once."""
    faults: list[str] = []

    def attempt(make: Any, default: Any) -> Any:
        try:
            return make()
        except ConfigError as e:
            faults.append(str(e))
            return default

    total = attempt(lambda: parse_bytes(budget), 1)
    chosen = attempt(lambda: candidates(methods), [])
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
    return total, fused, Frame(_with_pins(chosen, limits), Costs(fused, target == "train", itemsize), limits)


def _with_pins(chosen: list[Candidate], limits: Limits) -> list[Candidate]:
    """A pinned method is considered, for the features it is pinned to, though it may not be among ``methods``."""
    names = {c.name for c in chosen}
    extra = [p for p in limits.pin.values() if isinstance(p, str) and p not in names]
    return chosen + candidates(extra) if extra else chosen


def _optimizer(optimizer: UpdateRule | None) -> FusedOptimizer | None:
    if optimizer is None or isinstance(optimizer, FusedOptimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise ConfigError(f"`optimizer` must be a fused optimizer, its name, or None; got {optimizer!r:.80}")
    return make_rule(optimizer)


def _curves(schema: Schema, stats: Statistics | None) -> tuple[dict[str, FrequencyCurve], str, set[str]]:
    """Curves of all features, where they are from in words, and the features whose curve was counted."""
    given, names = {} if stats is None else curves_from(stats), schema.names
    faults = [
        str(unknown_name("feature in the statistics", n, names)) for n in sorted(set(given) - set(names), key=str)
    ]
    for spec in schema:
        curve = given.get(spec.name)
        if curve is not None and spec.ids == "index" and curve.n > spec.num_embeddings:
            faults.append(f"statistics of {curve.n} ids for {spec.num_embeddings} embeddings (feature {spec.name!r})")
    raise_faults(faults, "plan_for_budget, `stats`")
    # A sample looks up one id of every feature, so all features have as many lookups as the largest needs.
    lookups = LOOKUPS_PER_ID * max(s.num_embeddings for s in schema)
    made: dict[int, FrequencyCurve] = {}
    curves = {}
    for spec in schema:
        n = spec.num_embeddings
        if spec.name not in given and n not in made:
            made[n] = FrequencyCurve.zipf(n, total=lookups)
        curves[spec.name] = given[spec.name] if spec.name in given else made[n]
    missing = [s.name for s in schema if s.name not in given]
    assumed = f"Zipf curves of exponent {EXPONENT:g} assumed"
    if not given:
        return curves, assumed, set()
    return curves, "counted" if not missing else f"counted; {assumed} for {', '.join(missing)}", set(given)


def _importance(schema: Schema, importance: Mapping[str, float] | None) -> dict[str, float]:
    given, names = {} if importance is None else dict(importance), schema.names
    faults = [str(unknown_name("feature in `importance`", n, names)) for n in sorted(set(given) - set(names), key=str)]
    for name, value in given.items():
        if not is_rate(value):
            faults.append(f"`importance` must be a finite number >= 0; got {value!r} (feature {name!r})")
    raise_faults(faults, "plan_for_budget")
    return {s.name: float(given.get(s.name, 1.0)) for s in schema}


def _detail(schema: Schema, chosen: Sequence[Candidate]) -> dict[str, Any]:
    """How closely options are looked at: less where there are many features."""
    knots = min(14, max(4, EVALUATIONS // (len(schema) * max(1, len(chosen)))))
    if len(schema) <= MANY:
        return {"knots": knots, "rounds": 3}
    return {"knots": knots, "rounds": 1, "step": 1.2, "variants": False}


# -- what cannot be -------------------------------------------------------------------------------------------------


def _pinned_tables(schema: Schema, menus: Sequence[Menu], frame: Frame) -> tuple[list[Any], int]:
    """Shared tables that pinned configurations fix, and their bytes; their features get them as a private option."""
    pins = {s.name: p for s in schema if isinstance(p := frame.limits.pinned(s.name), MethodConfig)}
    fixed = [m for m in menus if m.spec.name in pins and m.pools]
    if not fixed:
        return [], 0
    part = Schema([m.spec for m in fixed])
    tables = [t for t in Plan({m.spec.name: pins[m.spec.name] for m in fixed}).tables(part).values() if t.shared]
    terms = {m.spec.name: m.terms for m in fixed}
    plan = Plan({m.spec.name: pins[m.spec.name] for m in fixed})
    weights = {m.spec.name: m.weight for m in fixed}
    losses = plan_losses(part, plan, terms, weights, frame.factors)
    for menu in fixed:
        fix(menu, menu.pools[0].sized, losses[menu.spec.name])
    return tables, sum(frame.costs.table(t) for t in tables)


def _check_possible(menus: Sequence[Menu], pools: Sequence[Pool]) -> None:
    """Raise where a feature has nothing to choose from, with what was refused and why."""
    faults = []
    for i, menu in enumerate(menus):
        if menu.options or any(i in pool.members for pool in pools):
            continue
        why = "; ".join(f"{name}: {text}" for name, text in menu.refused.items()) or "none was offered"
        if menu.pools:
            why = f"{menu.pools[0].sized.config.method}: its table is of another shape or kind than the others'"
        faults.append(f"no method is left ({why}) (feature {menu.spec.name!r})")
    alone = {i for i, m in enumerate(menus) if not m.options}
    if not faults and alone and not any(alone <= set(pool.members) for pool in pools):
        names = ", ".join(menus[i].spec.name for i in sorted(alone))
        faults.append(f"features {names} can only share tables, and of different methods; a plan shares those of one")
    raise_faults(faults, "plan_for_budget")


def _ways_out(schema: Schema, menus: Sequence[Menu], frame: Frame, least: int, total: int) -> str:
    """What an impossible budget would need, and what else would help, least bytes first."""
    ways: list[tuple[int, str]] = []

    def smallest(costs: Costs, limits: Limits, names: Any) -> int | None:
        other = Frame(candidates(names), costs, limits, knots=4, rounds=0, options=frame.options, kinds=frame.kinds)
        maker = MenuMaker(other)
        made = [maker.menu(m.spec, m.terms, m.weight, True) for m in menus]
        try:
            _, spent = _pinned_tables(schema, made, other)
            pools = pools_of(made, other, set())
            _check_possible(made, pools)
            return Search(made, pools).least() + spent
        except RecsysEmbedError:
            return None

    names = [c.name for c in frame.candidates]
    trials: list[tuple[str, Costs, Limits, Any]] = [
        ("let the planner choose from all methods", frame.costs, frame.limits, None)
    ]
    free = Limits(needs_equal_widths=frame.limits.needs_equal_widths)
    if frame.limits != free:
        trials.append(("fewer limits (pins, forbidden methods, widths, reads)", frame.costs, free, names))
    if frame.costs.train:
        trials.append(("an optimizer without state, such as 'sgd'", Costs(SGD(), True, frame.costs.itemsize),
                       frame.limits, names))  # fmt: skip
    for text, costs, limits, chosen in trials:
        need = smallest(costs, limits, chosen)
        if need is not None and need < least:
            ways.append((need, f"{text}: {format_bytes(need)} at least"))
    if max(s.embedding_dim for s in schema) > 1:
        ways.append((least - 1, "a smaller embedding_dim"))
    listed = [f"a budget of {format_bytes(least)} ({least} bytes) or more", *(text for _, text in sorted(ways))]
    out = "; ".join(f"{i}. {text}" for i, text in enumerate(listed, 1))
    kind = "training" if frame.costs.train else "serving"
    return (
        f"{len(schema)} features need at least {format_bytes(least)} for {kind} with what may be chosen; "
        f"{format_bytes(total)} available. Ways out: {out}"
    )


# -- what it comes to -----------------------------------------------------------------------------------------------


def _configs(schema: Schema, menus: Sequence[Menu], found: Found, total: int) -> dict[str, MethodConfig]:
    """Configurations of the options chosen; bytes left over go to the pool, or to what can still grow."""
    configs: dict[str, MethodConfig] = {}
    members = [i for i, name in enumerate(found.names) if name == JOIN]
    left, pool = total, found.cell.pool
    growing = []
    for i, name in enumerate(found.names):
        if name == JOIN:
            continue
        option = menus[i].options[name]
        config, cost = option.config, option.cost
        if config is None:
            config, cost = option.grown(option.cost)
        configs[schema.features[i].name] = config
        left -= cost
        growing.append((i, option, cost))
    if pool is not None and members:
        own = {i: int(cost) for i, cost in zip(pool.members, pool.own, strict=True)}
        left -= sum(own[i] for i in members)
        together = configs_of(pool, menus, members, min(pool.most, left // pool.unit))
        if together is None:
            raise RuntimeError(f"method {pool.name!r} cannot be sized to {left} bytes for {len(members)} features")
        return {**configs, **together}
    for i, option, cost in sorted(growing, key=lambda g: -g[1].loss)[:16]:
        config, grown = option.grown(cost + left)
        if grown > cost:
            configs[schema.features[i].name] = config
            left -= grown - cost
    return configs


def _reasons(
    schema: Schema, plan: Plan, menus: Sequence[Menu], losses: Mapping[str, float], frame: Frame, known: set[str]
) -> dict[str, str]:
    programs = {s.name: plan[s.name].program(s) for s in schema}
    readers: dict[str, int] = {}
    for program in programs.values():
        for table in program.tables:
            readers[table.name] = readers.get(table.name, 0) + table.shared
    out = {}
    for menu in menus:
        spec, terms = menu.spec, menu.terms
        program = programs[spec.name]
        company = max((readers[t.name] for t in program.tables if t.shared), default=0)
        cost = frame.costs.own(plan[spec.name], program, spec)
        plain = Table("weight", spec.num_embeddings, spec.embedding_dim, Initializer.plain(spec))
        whole = frame.costs.table(plain)
        value = float(terms.value.sum()) * menu.weight
        lost = losses[spec.name] / value if value else 0.0
        parts = factors(program, terms)
        out[spec.name] = reason(
            spec, terms, plan[spec.name], program, parts, cost, whole, lost, frame.limits, company, spec.name in known
        )
    return out
