"""Bytes of the tables of a report with another method, size or precision, by arithmetic; nothing is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from recsys_embed.core.precision import Precision
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.features import FeatureSpec
from recsys_embed.registry import MethodInfo, get_method, list_methods
from recsys_embed.report.memory.arrays import PRECISIONS, ArrayStorage, TableStorage, UpdateKind, stored_bytes
from recsys_embed.report.memory.plan import arrays_of
from recsys_embed.report.memory.state_size import OptimizerStateSize

KEEP_BELOW = 200
"""Tables with fewer rows stay dense, as in plans: compression gains nothing there."""
_SHAPES = 60
"""Number of distinct shapes that are sized, largest first; the others hold few bytes and count as dense."""
_TOLERANCE = 0.005


@dataclass(frozen=True)
class Alternative:
    """One method for every table.

    Args:
        method: its key.
        ratio: the budget of every table is the bytes of its dense form divided by this.
        elements: stored numbers.
        serve: deployed bytes by precision, index buffers included. A method whose tables have precisions of their own
            takes these, whatever the precision.
        train: bytes of float32 weights, index buffers, optimizer state and gradients.
        missed: number of tables whose smallest form exceeds this budget; they count with that form.
        unfit: number of tables the method cannot store (raw ids, widths it does not divide); they count as dense.
        per_table: deployed float32 bytes by table, or at precisions of their own.
        own_precisions: whether the method's tables have precisions of their own.
    """

    method: str
    ratio: float
    elements: int
    serve: dict[str, int]
    train: int
    missed: int
    unfit: int
    per_table: dict[str, int]
    own_precisions: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def alternatives(
    storages: Sequence[TableStorage],
    ratio: float,
    state_size: OptimizerStateSize | None,
    update: UpdateKind,
    methods: Sequence[str] | None = None,
) -> list[Alternative]:
    """The cost of every registered method at a compression of ``ratio``; within 0.5 % per table."""
    tables = _features(storages)
    shapes: dict[FeatureSpec, int] = {}
    for e in tables:
        shapes[_shape(e)] = max(shapes.get(_shape(e), 0), e.ids * e.width)
    large = set(sorted(shapes, key=lambda s: -shapes[s])[:_SHAPES])
    out = []
    for info in list_methods():
        if methods is None or info.name in methods:
            sized = {s: _sized_table(info, s, ratio) if s in large else _plain(s) for s in shapes}
            out.append(_sum(info, ratio, [(e.name, sized[_shape(e)]) for e in tables], state_size, update))
    return out


def dense_bytes(storages: Sequence[TableStorage], precision: Precision = "fp32") -> int:
    """Bytes of the full tables of the same features."""
    return sum(stored_bytes(a, precision) for e in _features(storages) for a in _plain(_shape(e)).arrays)


def _features(storages: Sequence[TableStorage]) -> list[TableStorage]:
    """Storages that a full table would stand for, each once: loaded drop-ins of one feature read one table."""
    found: dict[object, TableStorage] = {}
    for e in storages:
        if e.spec is not None:
            found.setdefault((e.spec.name, e.ids, e.width, e.shared) if e.shared else id(e), e)
    return list(found.values())


@dataclass(frozen=True)
class _SizedTable:
    arrays: tuple[ArrayStorage, ...]
    missed: bool = False
    unfit: bool = False


def _shape(storage: TableStorage) -> FeatureSpec:
    """The specification without its name, which affects salts of hashes but no bytes."""
    spec = storage.spec
    if spec is None:
        raise TypeError(f"{storage.name} is no feature")
    return replace(spec, name="x")


@lru_cache(maxsize=10_000)
def _plain(spec: FeatureSpec) -> _SizedTable:
    """The full table; for raw ids, that of as many indices."""
    config = get_method("full").config_cls.from_params({})
    spec = replace(spec, ids="index")
    return _SizedTable(arrays_of(spec, config, config.program(spec)))


@lru_cache(maxsize=50_000)
def _sized_table(info: MethodInfo, spec: FeatureSpec, ratio: float) -> _SizedTable:
    """The method at its largest size within the full table's bytes divided by ``ratio``."""
    plain = _plain(spec)
    if spec.ids == "index" and spec.num_embeddings < KEEP_BELOW:
        return plain
    cls, available = info.config_cls, int(sum(a.nbytes for a in plain.arrays) / ratio)
    try:

        def need(size: int) -> int:
            return cls.sized(spec, size).footprint(spec).serve

        low, high = 1, cls.max_size(spec)
        least, most = need(low), need(high)
        missed = least > available
        if not missed and most <= available:
            low = high
        # Bytes grow with the size, mostly linearly: interpolation search, with bisection in turn to bound its steps.
        halve = False
        while not missed and high - low > 1 and available - least > _TOLERANCE * available:
            guess = low + int((high - low) * (available - least) / max(1, most - least))
            middle = (low + high) // 2 if halve else min(high - 1, max(low + 1, guess))
            halve, cost = not halve, need(middle)
            if cost <= available:
                low, least = middle, cost
            else:
                high, most = middle, cost
        config = cls.sized(spec, low)
        return _SizedTable(arrays_of(spec, config, config.program(spec)), missed)
    except RecsysEmbedError:
        return replace(plain, unfit=True)


def _sum(
    info: MethodInfo,
    ratio: float,
    tables: Sequence[tuple[str, _SizedTable]],
    state_size: OptimizerStateSize | None,
    update: UpdateKind,
) -> Alternative:
    serve = dict.fromkeys(PRECISIONS, 0)
    elements = train = 0
    own = info.config_cls.has_own_precisions
    per_table: dict[str, int] = {}
    for name, sized in tables:
        per_table[name] = sum(stored_bytes(a, None) for a in sized.arrays)
        for precision in PRECISIONS:
            serve[precision] += sum(stored_bytes(a, None if own else precision) for a in sized.arrays)
        for a in sized.arrays:
            elements += 0 if a.role == "index" else a.elements
            train += a.nbytes + (sum(state_size.state_bytes(a, update)) if state_size is not None else 0)
            train += a.nbytes if a.role != "index" and (update == "dense" or a.role == "dense") else 0
    missed, unfit = sum(s.missed for _, s in tables), sum(s.unfit for _, s in tables)
    by_precision = {str(k): v for k, v in serve.items()}
    return Alternative(info.name, ratio, elements, by_precision, train, missed, unfit, per_table, own)
