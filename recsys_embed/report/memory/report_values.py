"""The memory report as a value: bytes per table and in total, with writers for text, Markdown, JSON and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from recsys_embed.core.footprint import Footprint
from recsys_embed.core.precision import Precision
from recsys_embed.errors import unknown_name
from recsys_embed.report.memory.alternatives import Alternative, alternatives, dense_bytes
from recsys_embed.report.memory.arrays import TableStorage, UpdateKind, stored_bytes
from recsys_embed.report.memory.collisions import Collisions
from recsys_embed.report.memory.state_size import OptimizerStateSize, state_size_of
from recsys_embed.report.memory.stats import FieldStats
from recsys_embed.utils.deprecated import warn_renamed

When = Literal["serve", "train", "peak"]
DEFAULT_BATCH = 4096
DEFAULT_RATIO = 10.0


@dataclass(frozen=True, eq=False)
class TableStats:
    """Frequency statistics of one table.

    Args:
        field: statistics of its feature.
        expected: collisions on average over the method's salts; None where the method computes its lookup.
        measured: collisions measured by hashing the ids; None without counts per id.
    """

    field: FieldStats
    expected: Collisions | None
    measured: Collisions | None

    def to_dict(self) -> dict[str, Any]:
        f = self.field
        return {
            "distinct": f.distinct,
            "seen_once": f.seen_once,
            "coverage": [[k, share] for k, share in f.coverage()],
            "unseen": dict(f.unseen),
            "collisions_expected": None if self.expected is None else vars(self.expected),
            "collisions_measured": None if self.measured is None else vars(self.measured),
        }


@dataclass(frozen=True, eq=False)
class TableReport:
    """Bytes of one table, or of one array that several tables share.

    Args:
        storage: its arrays and how they are read.
        weights: learned values as held now.
        stored: learned values in a file of the report's precision.
        index: index arrays (id sets, codes).
        optimizer: its state.
        gradient: ``.grad`` after one backward of a batch.
        lookup: row numbers, rows read and vectors of one batch while serving.
        activations: the same while training, with their gradients.
        stats: frequency statistics, or None.
    """

    storage: TableStorage
    weights: int
    stored: int
    index: int
    optimizer: int
    gradient: int
    lookup: int
    activations: int
    stats: TableStats | None = None

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def entry(self) -> TableStorage:
        """The earlier name of ``storage``; deprecated."""
        warn_renamed("attribute of TableReport", "entry", "storage")
        return self.storage

    @property
    def method(self) -> str:
        return self.storage.method

    @property
    def serve(self) -> int:
        """Deployed bytes."""
        return self.stored + self.index

    @property
    def train(self) -> int:
        """Bytes held while training: weights, index buffers, optimizer state and gradients."""
        return self.footprint.train

    @property
    def footprint(self) -> Footprint:
        """Bytes served in the report's precision, and what training holds beyond them."""
        return Footprint(self.stored, self.index, self.optimizer, self.gradient, self.weights - self.stored)

    def to_dict(self) -> dict[str, Any]:
        e = self.storage
        return {
            "name": e.name,
            "kind": e.kind,
            "paths": list(e.paths),
            "method": e.method,
            "config": e.config,
            "rows": e.ids,
            "width": e.width,
            "update": e.update,
            "reads": list(e.shared),
            "read_by": list(e.read_by),
            "arrays": [
                {"name": a.name, "role": a.role, "rows": a.rows, "width": a.width, "bytes": a.nbytes} for a in e.arrays
            ],
            "bytes": {
                "weights": self.weights,
                "stored": self.stored,
                "index": self.index,
                "optimizer": self.optimizer,
                "gradient": self.gradient,
                "lookup": self.lookup,
                "activations": self.activations,
                "serve": self.serve,
                "train": self.train,
            },
            "statistics": None if self.stats is None else self.stats.to_dict(),
        }


@dataclass(frozen=True)
class RestOfModel:
    """Bytes of everything in the model but its tables: dense layers and buffers."""

    weights: int = 0
    buffers: int = 0
    optimizer: int = 0
    gradient: int = 0

    @property
    def serve(self) -> int:
        """Deployed bytes; exports keep these as they are, whatever the precision of the tables."""
        return self.weights + self.buffers

    @property
    def train(self) -> int:
        return self.weights + self.buffers + self.optimizer + self.gradient


@dataclass(frozen=True)
class ReportSettings:
    """Settings that a report was computed with; see :func:`memory_report`."""

    optimizer: OptimizerStateSize | None = None
    dense_optimizer: OptimizerStateSize | None = None
    precision: Precision | None = None
    batch_size: int = DEFAULT_BATCH
    ids_per_sample: float | Mapping[str, float] = 1.0
    ratio: float = DEFAULT_RATIO

    def lookups(self, name: str) -> int:
        """Ids of one batch of the named table."""
        each = self.ids_per_sample
        if isinstance(each, Mapping):
            each = each.get(name, each.get(name.rpartition("/")[2], 1.0))
        return round(self.batch_size * each)

    def to_dict(self) -> dict[str, Any]:
        each = self.ids_per_sample
        return {
            "optimizer": self.optimizer.name if self.optimizer else None,
            "dense_optimizer": self.dense_optimizer.name if self.dense_optimizer else None,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "ids_per_sample": dict(each) if isinstance(each, Mapping) else each,
            "ratio": self.ratio,
        }


@dataclass(frozen=True, eq=False)
class ReportValues:
    """Bytes of a model's embedding tables by cause, per table and in total; :class:`MemoryReport` shows them.

    Args:
        source: a description of what was reported on.
        tables: one report per table, and one per array that tables share.
        rest: everything else in the model; all 0 for plans and schemas.
        settings: that it was computed with.
        notes: sentences that a reader has to know.
    """

    source: str
    tables: tuple[TableReport, ...]
    rest: RestOfModel
    settings: ReportSettings
    notes: tuple[str, ...] = ()
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> TableReport:
        for table in self.tables:
            if table.name == name:
                return table
        raise unknown_name("table", name, [t.name for t in self.tables])

    @property
    def footprint(self) -> Footprint:
        """All tables together: ``serve`` and ``train`` are those of :meth:`total`."""
        return sum((t.footprint for t in self.tables), Footprint())

    def total(self, when: When = "serve", part: Literal["embedding", "model"] = "embedding") -> int:
        """Bytes of all tables together.

        Args:
            when: ``"serve"``: weights in the report's precision, and index buffers. ``"train"``: weights as held now,
                index buffers, optimizer state and gradients. ``"peak"``: that, and the lookup of one batch.
            part: ``"model"`` adds everything that is no table (for ``"peak"`` without its activations).
        """
        if when not in get_args(When):
            raise unknown_name("total", str(when), get_args(When))
        if part not in ("embedding", "model"):
            raise unknown_name("part", str(part), ("embedding", "model"))
        own = sum(t.serve if when == "serve" else t.train for t in self.tables)
        own += sum(t.activations for t in self.tables) if when == "peak" else 0
        return own + (0 if part == "embedding" else self.rest.serve if when == "serve" else self.rest.train)

    @property
    def share(self) -> float:
        """Share of the model's deployed bytes that are embeddings."""
        whole = self.total("serve", "model")
        return self.total("serve") / whole if whole else 0.0

    def stored(self, precision: Precision) -> int:
        """Deployed bytes of all tables as they are, in another precision."""
        return sum(stored_bytes(a, precision) for t in self.tables for a in t.storage.arrays)

    def alternatives(self, ratio: float | None = None) -> list[Alternative]:
        """Bytes of every method for the tables of this report, at a compression of ``ratio``."""
        ratio = self.settings.ratio if ratio is None else ratio
        if ratio not in self._cache:
            storages = [t.storage for t in self.tables]
            fused = next((e.fused for e in storages if e.fused is not None), None)
            state_size = self.settings.optimizer
            if self.update == "fused" and fused is not None:
                state_size = state_size_of(fused, prefer_fused=True)
            self._cache[ratio] = alternatives(storages, ratio, state_size, self.update)
        found: list[Alternative] = self._cache[ratio]
        return found

    @property
    def update(self) -> UpdateKind:
        """The kind of update of most of the bytes."""
        size: dict[UpdateKind, int] = {}
        for t in self.tables:
            size[t.storage.update] = size.get(t.storage.update, 0) + t.weights
        return max(size, key=lambda u: size[u], default="dense")

    @cached_property
    def plain(self) -> int:
        """Bytes of the same tables as dense float32 tables."""
        return dense_bytes([t.storage for t in self.tables])
