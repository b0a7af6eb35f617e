"""Where the bytes of a model's embeddings are, serving and training, and what they could be: the memory report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from recsys_embed.errors import ConfigError, unknown_name
from recsys_embed.features import Schema
from recsys_embed.kernels.precision import Precision, check_precision
from recsys_embed.memory import Footprint
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan
from recsys_embed.report.memory_arrays import PRECISIONS, Array, Entry, Update, stored_bytes
from recsys_embed.report.memory_optimizer import StateLaw, make_law
from recsys_embed.report.memory_sources import Parts, parts_of_module, parts_of_plan
from recsys_embed.report.memory_stats import Collisions, FieldStats, expect, measure, read_stats_of
from recsys_embed.report.memory_whatif import Alternative, alternatives, plain_bytes

When = Literal["serve", "train", "peak"]
VERSION = 1
DEFAULT_BATCH = 4096
DEFAULT_RATIO = 10.0


@dataclass(frozen=True, eq=False)
class TableStats:
    """What frequencies say about one table.

    Args:
        field: its statistics.
        expected: collisions on average over the method's salts; None where the method computes its lookup.
        measured: collisions of the very ids, hashed; None without counts per id.
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
        entry: what is stored and how it is read.
        weights: learned values as held now.
        stored: learned values in a file of the report's precision.
        index: remap, pointer and code buffers.
        optimizer: state.
        gradient: ``.grad`` after one backward of a batch.
        lookup: row numbers, rows read and vectors of one batch while serving.
        activations: the same while training, with their gradients.
        stats: what frequencies say; None without statistics.
    """

    entry: Entry
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
        return self.entry.name

    @property
    def method(self) -> str:
        return self.entry.method

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
        return Footprint(self.weights, self.index, self.optimizer, self.gradient)

    def to_dict(self) -> dict[str, Any]:
        e = self.entry
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
            "read_by": list(e.members),
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
class Rest:
    """Bytes of everything in the model that is no table: dense layers and buffers."""

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
class Settings:
    """What a report was computed for; see :func:`memory_report`."""

    optimizer: StateLaw | None = None
    dense_optimizer: StateLaw | None = None
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
class MemoryReport:
    """Bytes of a model's embedding tables by cause, per table and in total.

    ``print(report)`` shows a table; ``to_markdown``, ``to_json`` and ``to_html`` write the same.

    Args:
        source: what was reported on, in words.
        tables: one entry per table, and one per array that tables share.
        rest: everything else in the model; all 0 for plans and schemas.
        settings: what it was computed for.
        notes: what a reader has to know.
    """

    source: str
    tables: tuple[TableReport, ...]
    rest: Rest
    settings: Settings
    notes: tuple[str, ...] = ()
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> TableReport:
        for table in self.tables:
            if table.name == name:
                return table
        raise unknown_name("table", name, [t.name for t in self.tables])

    @property
    def footprint(self) -> Footprint:
        """All tables together, as held now."""
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
        return sum(stored_bytes(a, precision) for t in self.tables for a in t.entry.arrays)

    def alternatives(self, ratio: float | None = None) -> list[Alternative]:
        """What every method would cost with the tables of this report at a compression of ``ratio``."""
        ratio = self.settings.ratio if ratio is None else ratio
        if ratio not in self._cache:
            entries = [t.entry for t in self.tables]
            fused = next((e.fused for e in entries if e.fused is not None), None)
            law = self.settings.optimizer
            if self.update == "fused" and fused is not None:
                law = make_law(fused, prefer_fused=True)
            self._cache[ratio] = alternatives(entries, ratio, law, self.update)
        found: list[Alternative] = self._cache[ratio]
        return found

    @property
    def update(self) -> Update:
        """How gradients reach most of the bytes."""
        size: dict[Update, int] = {}
        for t in self.tables:
            size[t.entry.update] = size.get(t.entry.update, 0) + t.weights
        return max(size, key=lambda u: size[u], default="dense")

    @cached_property
    def plain(self) -> int:
        """Bytes the same tables take as plain float32."""
        return plain_bytes([t.entry for t in self.tables])

    # -- output ---------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, limit: int | None = 30, width: int = 100) -> str:
        """Tables for a terminal.

        Args:
            limit: tables listed, largest first; the others are summed in a line. None lists all.
            width: columns at most.
        """
        from recsys_embed.report.memory_text import render_text

        return render_text(self, limit, width)

    def to_markdown(self, limit: int | None = None) -> str:
        """The same as Markdown."""
        from recsys_embed.report.memory_text import render_markdown

        return render_markdown(self, limit)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``version`` names this form."""
        from recsys_embed import __version__

        serve, whole = self.total("serve"), self.total("serve", "model")
        return {
            "kind": "recsys_embed.memory_report",
            "version": VERSION,
            "made_by": f"recsys-embed {__version__}",
            "source": self.source,
            "settings": self.settings.to_dict(),
            "tables": [{**t.to_dict(), "share": t.serve / whole if whole else 0.0} for t in self.tables],
            "rest": {**vars(self.rest), "serve": self.rest.serve, "train": self.rest.train},
            "totals": {
                "serve": serve,
                "train": self.total("train"),
                "peak": self.total("peak"),
                **vars(self.footprint),
                "stored": sum(t.stored for t in self.tables),
                "lookup": sum(t.lookup for t in self.tables),
                "activations": sum(t.activations for t in self.tables),
                "plain": self.plain,
                "model_serve": whole,
                "model_train": self.total("train", "model"),
                "share": self.share,
            },
            "precisions": {p: self.stored(p) for p in PRECISIONS},
            "alternatives": [a.to_dict() for a in self.alternatives()],
            "notes": list(self.notes),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to ``path`` where one is given (whole or not at all)."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        if path is not None:
            _write(path, text + "\n")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """One page with charts that needs no network, also written to ``path`` where one is given."""
        from recsys_embed.report.memory_page import render_page

        text = render_page(self)
        if path is not None:
            _write(path, text)
        return text


def _write(path: str | Path, text: str) -> None:
    from recsys_embed.train.files import write_text

    write_text(path, text)


def memory_report(
    source: Any,
    *,
    schema: Schema | None = None,
    optimizer: Any = None,
    dense_optimizer: Any = None,
    precision: Precision | None = None,
    batch_size: int = DEFAULT_BATCH,
    ids_per_sample: float | Mapping[str, float] = 1.0,
    stats: Any = None,
    embedding_dim: int = 16,
    tables: Sequence[str] | None = None,
    ratio: float = DEFAULT_RATIO,
) -> MemoryReport:
    """Report the bytes of embedding tables, of something built or of something planned.

    Args:
        source: any ``nn.Module`` (also on the meta device); a :class:`Plan` (with ``schema``); a :class:`Schema`, whose
            tables are plain; or a path: a run folder, a checkpoint or state dict (``.pt``), a ``.safetensors`` file,
            a data folder (plain tables of width ``embedding_dim``).
        optimizer: ``"adam"``, ``"rowwise_adagrad"``, ...; a fused optimizer; or a torch optimizer (class or instance).
            Names mean torch's where tables have a ``.grad`` and this library's fused ones for plans and schemas.
            Tables that a collection updates itself keep its optimizer. None: what the source says, else not counted.
        dense_optimizer: of everything else; None: ``optimizer`` where it is torch's, else not counted.
        precision: of the deployed weights; None: as held now.
        batch_size: samples per step, for gradients and lookups.
        ids_per_sample: ids of one sample, for all features or by name.
        stats: counts per id by feature (``{"C1": counts}``), the content of a ``stats.json``, or a data folder.
        embedding_dim: width of the tables of a data folder.
        tables: for files that do not say which tensors are tables: patterns of their names, e.g. ``"*emb*.weight"``.
        ratio: compression at which other methods are compared.

    Raises:
        ConfigError: an argument is of the wrong kind or range.
        CheckpointError: a file is damaged.

    >>> model = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 1))
    >>> rep = memory_report(model, optimizer="adam")
    >>> rep.total("serve"), rep.total("train"), round(rep.share, 4)
    (64000, 256004, 0.9989)
    """
    _check(precision, batch_size, ids_per_sample, ratio)
    if isinstance(source, nn.Module):
        law = make_law(optimizer, prefer_fused=False)
        parts, name = parts_of_module(source), type(source).__name__
    elif isinstance(source, Plan | Schema):
        law = make_law(optimizer, prefer_fused=True)
        parts, name = _parts_of_plan(source, schema, law), "plan" if isinstance(source, Plan) else "schema"
    elif isinstance(source, str | Path):
        from recsys_embed.report.memory_files import parts_of_path

        read = parts_of_path(Path(source), optimizer, dense_optimizer, schema, embedding_dim, tables)
        parts, law, name = read.parts, read.optimizer, str(source)
        dense_optimizer = read.dense_optimizer
        stats = read.stats if stats is None else stats
    else:
        raise ConfigError(
            "`source` must be an nn.Module, a Plan (with schema=), a Schema, or the path of a run folder, checkpoint, "
            f"state dict or data folder; got {type(source).__name__}"
        )
    dense = make_law(dense_optimizer, prefer_fused=False)
    if dense is None and law is not None and law.fused is None:
        dense = law
    settings = Settings(law, dense, precision, batch_size, ids_per_sample, float(ratio))
    return assemble(name, parts, settings, {} if stats is None else read_stats_of(stats))


def _check(precision: Any, batch_size: Any, ids_per_sample: Any, ratio: Any) -> None:
    if precision is not None:
        check_precision(precision)
    numbers = ids_per_sample.values() if isinstance(ids_per_sample, Mapping) else [ids_per_sample]
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"`batch_size` must be an integer >= 1; got {batch_size!r}")
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < 1e6 for n in numbers):
        raise ConfigError(f"`ids_per_sample` must be numbers in [0, 1e6); got {ids_per_sample!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1 <= ratio <= 1e9:
        raise ConfigError(f"`ratio` must be a number in [1, 1e9]; got {ratio!r}")


def _parts_of_plan(source: Plan | Schema, schema: Schema | None, law: StateLaw | None) -> Parts:
    fused: FusedOptimizer | None = None if law is None else law.fused
    if isinstance(source, Schema):
        return parts_of_plan(source, Plan.full(source), fused)
    if not isinstance(schema, Schema):
        raise ConfigError("a report on a plan needs the features it is for: memory_report(plan, schema=schema)")
    return parts_of_plan(schema, source, fused)


def assemble(source: str, parts: Parts, settings: Settings, stats: Mapping[str, FieldStats]) -> MemoryReport:
    """The report of the parts of a source."""
    notes, counted = list(parts.notes), set()
    used: set[str] = set()

    def state(array: Array, law: StateLaw | None, update: Update) -> int:
        if law is None:
            return 0
        size, fixed = law.state_bytes(array, update)
        if fixed and array.parameter is not None:
            # A parameter keeps one step counter, however many tables are stacked in it.
            fixed = 0 if array.parameter in counted else fixed
            counted.add(array.parameter)
        return size + fixed

    reports = []
    for e in parts.entries:
        # What a collection updates inside backward keeps its rule, whatever else trains the model.
        own = StateLaw("fused", fused=e.fused) if e.fused is not None else settings.optimizer
        if own is not None and own.fused is not None and e.update in ("dense", "sparse"):
            e = replace(e, update="fused", fused=own.fused)
        lookups = settings.lookups(e.name)
        found = stats.get(e.name) or stats.get(e.name.rpartition("/")[2])
        if found is not None:
            used.add(found.name)
        learned = [a for a in e.arrays if a.role != "index"]
        reports.append(
            TableReport(
                entry=e,
                weights=sum(a.nbytes for a in learned),
                stored=sum(stored_bytes(a, settings.precision) for a in learned),
                index=sum(a.nbytes for a in e.of("index")),
                optimizer=sum(
                    state(a, settings.dense_optimizer if a.role == "dense" and e.update == "fused" else own, e.update)
                    for a in learned
                ),
                gradient=e.gradient(lookups),
                lookup=e.activations(lookups, settings.batch_size, training=False),
                activations=e.activations(lookups, settings.batch_size, training=e.update != "frozen"),
                stats=None if found is None or e.kind == "shared" else _stats_of(e, found),
            )
        )
    rest = [a for a in parts.rest if a.role == "dense"]
    dense = Rest(
        weights=sum(a.nbytes for a in rest),
        buffers=sum(a.nbytes for a in parts.rest if a.role == "index"),
        optimizer=sum(state(a, settings.dense_optimizer, "dense") for a in rest),
        gradient=sum(a.nbytes for a in rest if a.trained),
    )
    unused = sorted(set(stats) - used)
    if unused:
        notes.append(f"statistics of {len(unused)} features match no table: {', '.join(unused[:6])}")
    notes += _optimizer_notes(reports, dense, settings)
    return MemoryReport(source, tuple(reports), dense, settings, tuple(notes))


def _optimizer_notes(tables: Sequence[TableReport], rest: Rest, settings: Settings) -> list[str]:
    notes = []
    if settings.optimizer is None and any(t.entry.fused is None and t.entry.update != "frozen" for t in tables):
        notes.append("no optimizer was named, so its state is not counted")
    dense = rest.gradient or any(a.role == "dense" and a.trained for t in tables for a in t.entry.arrays)
    fused = any(t.entry.update == "fused" for t in tables)
    if settings.dense_optimizer is None and dense and (fused or settings.optimizer is not None):
        notes.append("state of what the fused optimizer does not update is not counted: name a dense optimizer")
    return notes


def _stats_of(entry: Entry, stats: FieldStats) -> TableStats:
    if entry.program is None:
        # A plain table gives every id a row of its own.
        none = Collisions(0.0, 0.0)
        return TableStats(stats, none, None if stats.ids is None else none)
    if entry.hashed is None:
        return TableStats(stats, None, None)
    measured = None
    if stats.ids is not None and (
        entry.spec is None or entry.spec.ids == "raw" or int(stats.ids.max()) < entry.spec.num_embeddings
    ):
        measured = measure(entry.hashed, stats)
    return TableStats(stats, expect(entry.program, entry.ids, stats), measured)
