"""Plans of a run: its budget is split between vectors and first-order weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from recsys_embed.core.footprint import format_bytes, parse_bytes
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.precision import Precision, check_precision
from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import BudgetError
from recsys_embed.features import Schema
from recsys_embed.models import get_model
from recsys_embed.plan import Plan
from recsys_embed.planning import curves_from, plan_for_budget
from recsys_embed.planning.frequencies import with_frequent_ids
from recsys_embed.registry import get_method
from recsys_embed.train.config import PLANNED, TrainConfig

LINEAR_METHOD = "unified"
"""Method of the first-order weights under a budget."""
BESIDE_SEVERAL: Precision = "int4"
"""Precision of the first-order weights where the vectors' rows are of several."""


@dataclass(frozen=True)
class Plans:
    """Plans of a model's two collections; ``full_bytes`` is what both take uncompressed."""

    vectors: Plan
    linear: Plan | None
    full_bytes: int


def plans_for(schema: Schema, config: TrainConfig, data: DataSource | None = None) -> Plans:
    """Plans that hold the embedding part of ``config.model`` to its ``ratio`` or ``budget``.

    The budget covers vectors and first-order weights together. First-order weights get one part in ``D + 1`` (their
    share uncompressed), stored as one shared hashed array of width 1: the hashing trick. Without a budget the method's
    own parameters decide the vectors and first-order weights stay whole; beside a plan of the vectors they get their
    part of its bytes. They are served at the precision of the vectors' rows, see :func:`first_order_precision`.

    Args:
        data: opened data set, whose frequencies the planner goes by (method ``"planned"`` without a plan), and methods
            that treat frequent ids apart, unless the plan or ``method_args`` say which ids these are.

    Raises:
        BudgetError: the method cannot meet the budget.
    """
    cls = get_model(config.model)
    vectors = schema if cls.uses_vectors else schema.with_dim(1)
    narrow = schema.with_dim(1) if cls.uses_vectors and cls.uses_linear else None
    # Arithmetic, not a plan: with raw ids no full table can be built, yet it is what sizes are measured against.
    full_bytes = sum(4 * f.num_embeddings * f.embedding_dim for s in (vectors, narrow) if s for f in s.first_readers)
    budget = None
    if config.budget is not None:
        budget = parse_bytes(config.budget)
    elif config.ratio is not None:
        budget = int(full_bytes / config.ratio)
    if config.method == "full" and budget is None:
        made = Plan.uniform(vectors, "full", **config.method_args)
        return Plans(made, None if narrow is None else Plan.uniform(narrow, "full", **_of_rows(config)), full_bytes)
    counted = data if hasattr(data, "counts") else None
    given = None if config.plan is None else with_frequent_ids(Plan.from_dict(config.plan), vectors, counted)
    if given is not None and budget is None:
        budget = _with_first_order(given.footprint(vectors).serve, config.embedding_dim)
    linear = None
    if narrow is not None and budget is not None:
        share = budget // (config.embedding_dim + 1)
        linear = _linear_plan(narrow, share, _of_rows(config))
        # At fp32 whatever their precision, so that what is left to the vectors does not depend on it.
        budget -= _linear_plan(narrow, share, {}).footprint(narrow).serve
    if given is not None:
        need = given.footprint(vectors).serve
        if budget is not None and need > budget:
            raise BudgetError(
                f"the plan needs {format_bytes(need)} for the vectors; the budget leaves {format_bytes(budget)}. "
                "Ways out: 1. a larger budget, or none; 2. plan again for less"
            )
        return Plans(given, linear, full_bytes)
    if config.method == PLANNED and budget is not None:
        options = {
            "needs_equal_widths": cls.needs_equal_widths,
            "network": None if cls.uses_network else False,
            **config.method_args,
        }
        return Plans(plan_for_budget(vectors, budget, stats=counted, **options), linear, full_bytes)
    made = Plan.uniform(vectors, config.method, budget=budget, **_ordered(config, counted))
    if narrow is not None and linear is None and _of_rows(config):
        linear = Plan.uniform(narrow, "full", **_of_rows(config))
    return Plans(with_frequent_ids(made, vectors, counted), linear, full_bytes)


def first_order_precision(config: TrainConfig) -> Precision:
    """Precision of the first-order weights once they are served, by default that of the vectors' rows.

    Where these are of several precisions, :data:`BESIDE_SEVERAL`.
    """
    if config.first_order_precision is not None:
        return config.first_order_precision
    if config.plan is not None:
        return _precision_beside(Plan.from_dict(config.plan))
    own = config.method != PLANNED and get_method(config.method).config_cls.has_own_precisions
    given = config.method_args.get("precisions", "auto") if own else config.method_args.get("precision", "fp32")
    kinds = {given} if isinstance(given, str) else {k for k in given if k != "dropped"}
    return BESIDE_SEVERAL if len(kinds) != 1 or kinds == {"auto"} else check_precision(str(kinds.pop()))


def _precision_beside(plan: Plan) -> Precision:
    """The precision of all rows of a plan's vectors, or :data:`BESIDE_SEVERAL`."""
    kinds = {kind for config in plan.configs.values() for kind in _kinds(config)} or {"fp32"}
    return check_precision(kinds.pop()) if len(kinds) == 1 else BESIDE_SEVERAL


def _kinds(config: MethodConfig) -> set[str]:
    if config.computes:
        return set()
    own = getattr(config, "precisions", ()) if config.has_own_precisions else (config.precision,)
    return {kind for kind in own if kind != "dropped"}


def _of_rows(config: TrainConfig) -> dict[str, Any]:
    """Options of the first-order weights: a precision, in which they train if the vectors' rows train in few bits."""
    precision = first_order_precision(config)
    if precision == "fp32":
        return {}
    options: dict[str, Any] = {"precision": precision}
    options.update((k, config.method_args[k]) for k in ("quantization", "rounding") if k in config.method_args)
    return options


def _linear_plan(narrow: Schema, share: int, options: dict[str, Any]) -> Plan:
    """First-order weights in ``share`` bytes; at fp32 where these hold no block of rows that share a scale."""
    plain = Plan.uniform(narrow, LINEAR_METHOD, budget=share)
    if not options:
        return plain
    try:
        return Plan.uniform(narrow, LINEAR_METHOD, budget=plain.footprint(narrow).serve, **options)
    except BudgetError:
        return plain


def _ordered(config: TrainConfig, counted: DataSource | None) -> dict[str, Any]:
    """The method's options; it goes by counts where it needs an order and ids are not numbered by falling frequency."""
    order = get_method(config.method).config_cls.order_option
    if counted is None or order is None or order in config.method_args:
        return dict(config.method_args)
    falling = all(curve.ranked or not curve.mass.any() for curve in curves_from(counted).values())
    return dict(config.method_args) if falling else {**config.method_args, order: "counts"}


def resolve(schema: Schema, config: TrainConfig, data: DataSource) -> TrainConfig:
    """``config`` with the plan that method ``"planned"`` comes to on ``data``, so that a run says what it stored."""
    if config.plan is not None:
        _say_made_for_others(Plan.from_dict(config.plan), schema)
    if config.method != PLANNED or config.plan is not None:
        return config
    return config.replace(plan=plans_for(schema, config, data).vectors.to_dict(), method_args={})


def _say_made_for_others(plan: Plan, schema: Schema) -> None:
    """Warn of a plan whose bytes come to another number here: it was made for other widths or other counts of ids."""
    notes = plan.notes
    if notes is None or notes.target != "serve" or set(plan) != set(schema.names):
        return
    here = plan.footprint(schema).serve
    if here != notes.bytes:
        warnings.warn(
            f"the plan was made for features of other widths or sizes: it took {format_bytes(notes.bytes)} there and "
            f"takes {format_bytes(here)} here, at width {schema.uniform_dim}; plan for these (`recsys-embed plan "
            "--embedding-dim`), or train at the width of the plan (`embedding_dim`)",
            stacklevel=3,
        )


def linear_share(budget: int, config: TrainConfig, narrow: Schema) -> int:
    """Bytes of the first-order weights over ``narrow``, of width 1, under a budget of the whole embedding part."""
    precision = config.first_order_precision or "fp32"
    return _linear_bytes(budget, config.embedding_dim, narrow, precision)


def first_order_bytes(plan: Plan, schema: Schema, precision: Precision | None = None) -> int:
    """Bytes of the first-order weights that a model gets on top of a plan of its vectors, where it has such weights.

    Args:
        schema: the features of the plan, of one width.
        precision: of the weights; by default that of the vectors' rows.
    """
    dim, precision = schema.uniform_dim or 1, precision or _precision_beside(plan)
    return _linear_bytes(_with_first_order(plan.footprint(schema).serve, dim), dim, schema.with_dim(1), precision)


def on_top_of(schema: Schema, config: TrainConfig) -> int:
    """Bytes of the first-order weights that a run adds to those of the plan it was given; 0 under a budget of both."""
    cls = get_model(config.model)
    both = config.plan is None or config.budget is not None or config.ratio is not None
    if both or not (cls.uses_vectors and cls.uses_linear):
        return 0
    return first_order_bytes(Plan.from_dict(config.plan or {}), schema, config.first_order_precision)


def _with_first_order(vectors: int, dim: int) -> int:
    """Bytes of the whole embedding part where ``vectors`` bytes are those of vectors of width ``dim``."""
    return vectors + max(vectors // dim, 4)


def _linear_bytes(budget: int, dim: int, narrow: Schema, precision: Precision) -> int:
    options = {} if precision == "fp32" else {"precision": precision}
    return _linear_plan(narrow, budget // (dim + 1), options).footprint(narrow).serve
