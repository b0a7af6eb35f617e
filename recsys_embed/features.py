"""Feature specifications: a FeatureSpec per categorical feature, and a Schema of all features."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn

from recsys_embed.discover import bare_tables, find_tables, select_tables
from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.utils.deprecated import warn_renamed
from recsys_embed.utils.settings import build, check_settings, param
from recsys_embed.utils.types import JSON

Pooling = Literal["sum", "mean", "max"]
IdKind = Literal["index", "raw"]
Unseen = Literal["hash", "oov", "zero", "raise"]
MAX_ROWS = 2**31 - 1
MAX_DIM = 65536
_INIT = re.compile(r"sqrt_rows|sqrt_dim|xavier|(?:normal|uniform):((?:\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?)", re.ASCII)


@dataclass(frozen=True)
class FeatureSpec:
    """One categorical feature.

    Args:
        name: unique in its schema; salts every hash of the feature without a ``table``, so renaming it moves its rows.
        num_embeddings: number of distinct ids. With ``ids="index"`` ids lie in ``[0, num_embeddings)``;
            with ``ids="raw"`` any int64 is an id and this is the (estimated) cardinality, used to size tables.
        embedding_dim: width of the vector the model receives.
        pooling: how the ids of one bag combine.
        ids: ``"index"`` (vocabulary indices) or ``"raw"`` (arbitrary 64-bit ids, for hashing methods).
        init: distribution a full table of this feature starts with; every method starts its rows like it.
            ``"sqrt_rows"`` U(±1/sqrt(num_embeddings)) as DLRM and TorchRec, ``"sqrt_dim"`` U(±1/sqrt(dim)) as CCE,
            ``"xavier"`` U(±sqrt(6/(rows+dim))), ``"normal:STD"`` or ``"uniform:BOUND"``; ``"normal:1"`` is torch's.
        unseen: what an id outside ``[0, num_embeddings)``, negative ones included, becomes. ``"hash"``: hashing methods
            hash it like any other, other methods read the row of a hash of it into ``[0, num_embeddings)``, salted by
            the feature's name. ``"oov"``: all unseen ids are one more id, number ``num_embeddings``, stored as the
            method stores every id; it learns from whatever unseen ids training meets, and keeps its initial values if
            it meets none. ``"zero"``: a zero vector without gradient, which bags skip. ``"raise"``: an IdRangeError.
            ``None`` leaves it to the method: hashing methods hash, others raise. With ``ids="raw"`` no id is unseen,
            so only ``None`` and ``"hash"`` go with it.
        table: the table that the feature reads, shared by all features that name it, e.g. a target item and a history
            of items; by default one of its own, called like the feature. These features have one configuration, one
            set of rows and one optimizer state, and agree in all arguments but ``name``, ``pooling`` and
            ``padding_idx``. Hashes and initial values are salted by it.
        padding_idx: this id gives a zero vector without gradient, and bags skip it. In ``[0, num_embeddings)``; with
            ``ids="raw"`` any int64, the same for all features of a table.

    Raises:
        ConfigError: names every argument out of range.

    >>> FeatureSpec("C1", num_embeddings=1460, embedding_dim=16).pooling
    'sum'
    """

    name: str
    num_embeddings: int = param(MISSING, low=1, high=MAX_ROWS)
    embedding_dim: int = param(MISSING, low=1, high=MAX_DIM)
    pooling: Pooling = "sum"
    ids: IdKind = "index"
    init: str = "sqrt_rows"
    unseen: Unseen | None = None
    table: str | None = None
    padding_idx: int | None = param(None, low=-(1 << 63), high=(1 << 63) - 1)

    def __post_init__(self) -> None:
        check_settings(self, f"FeatureSpec, feature {self.name!r:.80}", FeatureSpec._conflicts)

    def _conflicts(self) -> list[str]:
        faults = []
        if not self.name or "." in self.name or "#" in self.name:
            faults.append(
                "`name` must not be empty, nor contain '.' or '#', which separate parts of table names; "
                f"got {self.name!r}"
            )
        if self.table is not None and (not self.table or "." in self.table or "#" in self.table):
            faults.append(
                "`table` must not be empty, nor contain '.' or '#', which separate parts of table names; "
                f"got {self.table!r}"
            )
        padding = self.padding_idx
        if padding is not None and self.ids == "index" and not 0 <= padding < self.num_embeddings:
            faults.append(f"`padding_idx` must be in [0, {self.num_embeddings}), one of the ids; got {padding}")
        if self.ids == "raw" and self.unseen not in (None, "hash"):
            faults.append(
                f"`unseen` must be hash or None with ids='raw', where every int64 is an id; got {self.unseen!r}"
            )
        if self.unseen == "oov" and self.num_embeddings == MAX_ROWS:
            faults.append(f"`num_embeddings` must be below {MAX_ROWS} with unseen='oov', which takes one more id")
        init = _INIT.fullmatch(self.init)
        if init is None or (init[1] and not math.isfinite(float(init[1]))):
            faults.append(f"`init` must be sqrt_rows, sqrt_dim, xavier, normal:STD or uniform:BOUND; got {self.init!r}")
        return faults

    @property
    def table_name(self) -> str:
        """The table that the feature reads: ``table``, or the feature's own.

        >>> FeatureSpec("history", 100, 4, table="item").table_name, FeatureSpec("C1", 100, 4).table_name
        ('item', 'C1')
        """
        return self.name if self.table is None else self.table

    @property
    def num_ids(self) -> int:
        """Ids that tables hold: ``num_embeddings``, and with ``unseen="oov"`` one more, the last, for unseen ones.

        >>> FeatureSpec("C1", 100, 4).num_ids, FeatureSpec("C1", 100, 4, unseen="oov").num_ids
        (100, 101)
        """
        return self.num_embeddings + (self.unseen == "oov")

    def init_law(self) -> tuple[Literal["uniform", "normal"], float]:
        """The earlier name of :meth:`initial_distribution`."""
        warn_renamed("method of FeatureSpec", "init_law", "initial_distribution")
        return self.initial_distribution()

    def initial_distribution(self) -> tuple[Literal["uniform", "normal"], float]:
        """Kind of a full table's initial distribution, and its bound (uniform) or standard deviation (normal); mean 0.

        >>> FeatureSpec("C1", 100, 4).initial_distribution()
        ('uniform', 0.1)
        """
        kind, _, scale = self.init.partition(":")
        if scale:
            return ("normal" if kind == "normal" else "uniform"), float(scale)
        n, d = self.num_embeddings, self.embedding_dim
        return "uniform", {"sqrt_rows": n**-0.5, "sqrt_dim": d**-0.5, "xavier": (6 / (n + d)) ** 0.5}[kind]


@dataclass(frozen=True)
class Schema:
    """The categorical features of a model, in the order of the columns of ``ids [B, F]``.

    >>> schema = Schema([FeatureSpec("C1", 10, 4), FeatureSpec("C2", 20, 4)])
    >>> schema.names, schema["C2"].num_embeddings, len(schema)
    (('C1', 'C2'), 20, 2)
    """

    features: tuple[FeatureSpec, ...]

    def __init__(self, features: Sequence[FeatureSpec]) -> None:
        object.__setattr__(self, "features", tuple(features))
        faults, seen = [], set()
        if not self.features:
            faults.append("a schema needs at least one feature; got none")
        for i, spec in enumerate(self.features):
            if not isinstance(spec, FeatureSpec):
                faults.append(f"feature {i} must be a FeatureSpec; got {type(spec).__name__}")
            elif spec.name in seen:
                faults.append(f"feature name {spec.name!r} occurs more than once; names must be unique")
            else:
                seen.add(spec.name)
        raise_faults(faults or _sharing_faults(self.by_table), "Schema")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.features)

    @cached_property
    def by_table(self) -> dict[str, tuple[FeatureSpec, ...]]:
        """Features by the table that they read, in schema order.

        >>> schema = Schema([FeatureSpec("item", 10, 4), FeatureSpec("history", 10, 4, table="item")])
        >>> {table: [s.name for s in readers] for table, readers in schema.by_table.items()}
        {'item': ['item', 'history']}
        """
        found: dict[str, list[FeatureSpec]] = {}
        for spec in self.features:
            found.setdefault(spec.table_name, []).append(spec)
        return {table: tuple(readers) for table, readers in found.items()}

    @cached_property
    def first_readers(self) -> Schema:
        """The first feature of each table: what is counted, stored and planned once; the schema where none is shared.

        >>> Schema([FeatureSpec("a", 10, 4, table="t"), FeatureSpec("b", 10, 4, table="t")]).first_readers.names
        ('a',)
        """
        first = [readers[0] for readers in self.by_table.values()]
        return self if len(first) == len(self) else Schema(first)

    @property
    def uniform_dim(self) -> int | None:
        """The width all features share, or None where they differ."""
        dims = {f.embedding_dim for f in self.features}
        return dims.pop() if len(dims) == 1 else None

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[FeatureSpec]:
        return iter(self.features)

    def __getitem__(self, name: str) -> FeatureSpec:
        try:
            return self._named[name]
        except (KeyError, TypeError):
            raise unknown_name("feature", str(name), self.names) from None

    @cached_property
    def _named(self) -> dict[str, FeatureSpec]:
        return {f.name: f for f in self.features}

    def with_dim(self, embedding_dim: int) -> Schema:
        """The same features at another width, e.g. 1 for the first-order weights of a linear part."""
        return Schema([replace(f, embedding_dim=embedding_dim) for f in self.features])

    def with_init(self, init: str) -> Schema:
        """The same features with another initial distribution, see :class:`FeatureSpec`."""
        return Schema([replace(f, init=init) for f in self.features])

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        subclasses: Collection[type] = (),
    ) -> Schema:
        """One feature per embedding table of any model, named by its path with ``/`` for ``.``.

        Left out are tables that :func:`recsys_embed.compress_` cannot replace (see ``obstacle`` of
        :class:`recsys_embed.discover.FoundTable`); the initial distribution is the default, not the model's.

        Args:
            model: any module, on any device, also ``meta``.
            include: shell patterns of names or dotted paths; only tables that match one.
            exclude: patterns of tables to leave out.
            subclasses: classes derived from ``nn.Embedding`` or ``nn.EmbeddingBag`` to take for their base.

        Raises:
            ConfigError: no table is left, or a pattern matches none.

        >>> model = nn.ModuleDict({"user": nn.Embedding(1000, 16), "tags": nn.EmbeddingBag(50, 16, mode="mean")})
        >>> [(f.name, f.num_embeddings, f.embedding_dim, f.pooling) for f in Schema.from_model(model)]
        [('user', 1000, 16, 'sum'), ('tags', 50, 16, 'mean')]
        """
        found = find_tables(model, subclasses=subclasses)
        chosen = select_tables(found, include, exclude)
        if not any(not t.obstacle for t in chosen):
            whys = [f"{t.name}: {t.obstacle}" for t in chosen] or ["it has none", *map(str, bare_tables(model))]
            why = "; ".join(whys)
            raise ConfigError(f"no embedding table of {type(model).__name__} can be replaced ({why})")
        return cls([FeatureSpec(t.name, t.rows, t.width, pooling=t.pooling or "sum") for t in chosen if not t.obstacle])

    def with_unseen(self, unseen: Unseen | None) -> Schema:
        """The same features with another treatment of unseen ids, see :class:`FeatureSpec`.

        >>> Schema([FeatureSpec("C1", 10, 4)]).with_unseen("zero")["C1"].unseen
        'zero'
        """
        return Schema([replace(f, unseen=unseen) for f in self.features])

    def to_dict(self) -> JSON:
        """JSON-ready; see :func:`spec_to_dict` for what is left out."""
        return {"features": [spec_to_dict(f) for f in self.features]}

    @classmethod
    def from_dict(cls, data: JSON) -> Schema:
        """Inverse of :meth:`to_dict`; unknown keys are errors."""
        items = data.get("features") if isinstance(data, dict) else None
        if not isinstance(items, list):
            raise ConfigError(f"a schema is an object with a list 'features'; got {type(data).__name__}")
        faults, features = [], []
        for i, item in enumerate(items):
            try:
                features.append(build(FeatureSpec, item, "key", where=f"feature {i}"))
            except ConfigError as e:
                faults.append(str(e))
        raise_faults(faults, "schema")
        return cls(features)


# Texts of earlier versions lack them, and compare equal to texts of today where they are None.
_LATER = ("unseen", "table", "padding_idx")
_SHARED = ("num_embeddings", "embedding_dim", "ids", "init", "unseen")


def _sharing_faults(by_table: Mapping[str, Sequence[FeatureSpec]]) -> list[str]:
    """In what features of one table disagree."""
    faults = []
    for table, readers in by_table.items():
        # Padding of raw ids changes which rows an id reads.
        for name in (*_SHARED, *(("padding_idx",) if readers[0].ids == "raw" else ())):
            values = {spec.name: getattr(spec, name) for spec in readers}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{value!r} of {feature!r}" for feature, value in values.items())
                faults.append(f"features of table {table!r} must agree in `{name}`; got {listed}")
    return faults


def spec_to_dict(spec: FeatureSpec) -> JSON:
    """The arguments of a FeatureSpec, JSON-ready; ``unseen``, ``table`` and ``padding_idx`` where they are not None."""
    return {k: v for k, v in asdict(spec).items() if v is not None or k not in _LATER}
