"""The memory report: bytes of embedding tables when serving and training, by cause, and alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from recsys_embed.core.precision import Precision, check_precision
from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.features import MAX_DIM, Schema
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan
from recsys_embed.planning.statistics import is_stats_json
from recsys_embed.report.memory.arrays import ArrayStorage, TableStorage, UpdateKind, stored_bytes
from recsys_embed.report.memory.collisions import Collisions, expected_collisions, measured_collisions
from recsys_embed.report.memory.modules import module_storage
from recsys_embed.report.memory.plan import ModelStorage, plan_storage
from recsys_embed.report.memory.report_output import MemoryReport
from recsys_embed.report.memory.report_values import (
    DEFAULT_BATCH,
    DEFAULT_RATIO,
    ReportSettings,
    RestOfModel,
    TableReport,
    TableStats,
)
from recsys_embed.report.memory.state_size import OptimizerStateSize, state_size_of
from recsys_embed.report.memory.stats import FieldStats, read_stats_of
from recsys_embed.typing import OptimizerSpec, Statistics

__all__ = ["MemoryReport", "TableReport", "memory_report"]


def memory_report(
    source: nn.Module | Plan | Schema | Path | str,
    *,
    schema: Schema | None = None,
    optimizer: OptimizerSpec | None = None,
    dense_optimizer: OptimizerSpec | None = None,
    precision: Precision | None = None,
    batch_size: int = DEFAULT_BATCH,
    ids_per_sample: float | Mapping[str, float] = 1.0,
    stats: Statistics | None = None,
    embedding_dim: int = 16,
    tables: Sequence[str] | None = None,
    ratio: float = DEFAULT_RATIO,
) -> MemoryReport:
    """Report the bytes of embedding tables, of something built or of something planned.

    Args:
        source: any ``nn.Module`` (also on the meta device); a :class:`Plan` (with ``schema``); a :class:`Schema`, whose
            tables are full; or a path: a run folder, a checkpoint or state dict (``.pt``), a ``.safetensors`` file,
            a data folder (full tables of width ``embedding_dim``).
        optimizer: ``"adam"``, ``"rowwise_adagrad"``, ...; a fused optimizer; or a torch optimizer (class or instance).
            Names mean torch's where tables have a ``.grad`` and this library's fused ones for plans and schemas.
            Tables that a collection updates itself keep its optimizer. None: that of the source, else not counted.
        dense_optimizer: of everything else; None: ``optimizer`` where it is torch's, else not counted.
        precision: of the deployed weights; None: that of the plan, and as held now without one.
        batch_size: samples per step, for gradients and lookups.
        ids_per_sample: ids of one sample, for all features or by name.
        stats: counts per id by feature (``{"C1": counts}``); or the content of a ``stats.json`` or a data folder, whose
            features that match no table are named in a note.
        embedding_dim: width of the tables of a data folder.
        tables: for files that do not say which tensors are tables: patterns of their names, e.g. ``"*emb*.weight"``.
        ratio: compression at which other methods are compared.

    Raises:
        ConfigError: arguments are of the wrong kind or range, or name tables that there are not; all faults at once.
        CheckpointError: a file is damaged.

    >>> model = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 1))
    >>> rep = memory_report(model, optimizer="adam")
    >>> rep.total("serve"), rep.total("train"), round(rep.share, 4)
    (64000, 256004, 0.9989)
    """
    if precision is not None:
        check_precision(precision)
    raise_faults(_faults(schema, batch_size, ids_per_sample, embedding_dim, ratio), "memory_report")
    if isinstance(source, nn.Module):
        state_size = state_size_of(optimizer, prefer_fused=False)
        storage, name = module_storage(source), type(source).__name__
    elif isinstance(source, Plan | Schema):
        state_size = state_size_of(optimizer, prefer_fused=True)
        storage, name = _planned_storage(source, schema, state_size), "plan" if isinstance(source, Plan) else "schema"
    elif isinstance(source, str | Path):
        from recsys_embed.report.memory.files import read_source

        loaded = read_source(Path(source), optimizer, dense_optimizer, schema, embedding_dim, tables)
        storage, state_size, name = loaded.storage, loaded.optimizer, str(source)
        dense_optimizer = loaded.dense_optimizer
        stats = loaded.stats if stats is None else stats
    else:
        raise ConfigError(
            "`source` must be an nn.Module, a Plan (with schema=), a Schema, or the path of a run folder, checkpoint, "
            f"state dict or data folder; got {type(source).__name__}"
        )
    dense = state_size_of(dense_optimizer, prefer_fused=False)
    if dense is None and state_size is not None and state_size.fused is None:
        dense = state_size
    raise_faults(_unknown(storage, stats, ids_per_sample), "memory_report")
    settings = ReportSettings(state_size, dense, precision, batch_size, ids_per_sample, float(ratio))
    return assemble(name, storage, settings, {} if stats is None else read_stats_of(stats))


def _faults(schema: Any, batch_size: Any, ids_per_sample: Any, embedding_dim: Any, ratio: Any) -> list[str]:
    """Faults of the arguments, whether or not the source uses them."""
    faults = []
    numbers = ids_per_sample.values() if isinstance(ids_per_sample, Mapping) else [ids_per_sample]
    if schema is not None and not isinstance(schema, Schema):
        faults.append(f"`schema` must be a Schema or None; got {type(schema).__name__}")
    for key, value, most in (("batch_size", batch_size, None), ("embedding_dim", embedding_dim, MAX_DIM)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
            wanted = ">= 1" if most is None else f"in [1, {most}]"
            faults.append(f"`{key}` must be an integer {wanted}; got {value!r}")
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < 1e6 for n in numbers):
        faults.append(f"`ids_per_sample` must be numbers in [0, 1e6); got {ids_per_sample!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1 <= ratio <= 1e9:
        faults.append(f"`ratio` must be a number in [1, 1e9]; got {ratio!r}")
    return faults


def _known(storage: ModelStorage) -> set[str]:
    """Names that settings may use for tables: in full, or without the path of their collection."""
    return {name for e in storage.tables for name in (e.name, e.name.rpartition("/")[2])}


def _unknown(storage: ModelStorage, stats: Any, ids_per_sample: Any) -> list[str]:
    """Faults: names given that match no table. A data set may have features that the model has not."""
    written = {"ids_per_sample": ids_per_sample, "stats": None if is_stats_json(stats) else stats}
    known = _known(storage)
    return [
        str(unknown_name(f"table in `{key}`", str(name), known))
        for key, given in written.items()
        if isinstance(given, Mapping)
        for name in given
        if name not in known
    ]


def _planned_storage(
    source: Plan | Schema, schema: Schema | None, state_size: OptimizerStateSize | None
) -> ModelStorage:
    fused: FusedOptimizer | None = None if state_size is None else state_size.fused
    if isinstance(source, Schema):
        return plan_storage(source, Plan.full(source), fused)
    if not isinstance(schema, Schema):
        raise ConfigError("a report on a plan needs the features it is for: memory_report(plan, schema=schema)")
    return plan_storage(schema, source, fused)


def assemble(
    source: str, storage: ModelStorage, settings: ReportSettings, stats: Mapping[str, FieldStats]
) -> MemoryReport:
    """The report of a source, from what it stores."""
    notes, counted = list(storage.notes), set()

    def state_bytes(array: ArrayStorage, state_size: OptimizerStateSize | None, update: UpdateKind) -> int:
        if state_size is None:
            return 0
        size, fixed = state_size.state_bytes(array, update)
        if fixed and array.parameter is not None:
            # A parameter keeps one step counter, however many tables are stacked in it.
            fixed = 0 if array.parameter in counted else fixed
            counted.add(array.parameter)
        return size + fixed

    reports = []
    for e in storage.tables:
        # Tables that a collection updates inside backward keep its rule, whatever optimizer trains the model.
        own = OptimizerStateSize("fused", fused=e.fused) if e.fused is not None else settings.optimizer
        if own is not None and own.fused is not None and e.update in ("dense", "sparse"):
            e = replace(e, update="fused", fused=own.fused)
        lookups = settings.lookups(e.name)
        found = stats.get(e.name) or stats.get(e.name.rpartition("/")[2])
        learned = [a for a in e.arrays if a.role != "index"]
        reports.append(
            TableReport(
                storage=e,
                weights=sum(a.nbytes for a in learned),
                stored=sum(stored_bytes(a, settings.precision) for a in learned),
                index=sum(a.nbytes for a in e.arrays_of("index")),
                optimizer=sum(
                    state_bytes(
                        a, settings.dense_optimizer if a.role == "dense" and e.update == "fused" else own, e.update
                    )
                    for a in learned
                ),
                gradient=e.gradient(lookups),
                lookup=e.activations(lookups, settings.batch_size, training=False),
                activations=e.activations(lookups, settings.batch_size, training=e.update != "frozen"),
                stats=None if found is None or e.kind == "shared" else _stats_of(e, found),
            )
        )
    rest = [a for a in storage.rest if a.role == "dense"]
    dense = RestOfModel(
        weights=sum(a.nbytes for a in rest),
        buffers=sum(a.nbytes for a in storage.rest if a.role == "index"),
        optimizer=sum(state_bytes(a, settings.dense_optimizer, "dense") for a in rest),
        gradient=sum(a.nbytes for a in rest if a.trained),
    )
    unused = sorted(set(stats) - _known(storage))
    if unused:
        notes.append(f"statistics of {len(unused)} features match no table: {', '.join(unused[:6])}")
    notes += _optimizer_notes(reports, dense, settings)
    return MemoryReport(source, tuple(reports), dense, settings, tuple(notes))


def _optimizer_notes(tables: Sequence[TableReport], rest: RestOfModel, settings: ReportSettings) -> list[str]:
    notes = []
    if settings.optimizer is None and any(t.storage.fused is None and t.storage.update != "frozen" for t in tables):
        notes.append("no optimizer was named, so its state is not counted")
    dense = rest.gradient or any(a.role == "dense" and a.trained for t in tables for a in t.storage.arrays)
    fused = any(t.storage.update == "fused" for t in tables)
    if settings.dense_optimizer is None and dense and (fused or settings.optimizer is not None):
        notes.append("state of what the fused optimizer does not update is not counted: name a dense optimizer")
    return notes


def _stats_of(storage: TableStorage, stats: FieldStats) -> TableStats:
    if storage.program is None:
        # In a full table every id has a row of its own.
        none = Collisions(0.0, 0.0, 0.0)
        return TableStats(stats, none, None if stats.ids is None else none)
    if storage.lookup_keys is None:
        return TableStats(stats, None, None)
    measured = None
    if stats.ids is not None and (
        storage.spec is None or storage.spec.ids == "raw" or int(stats.ids.max()) < storage.spec.num_embeddings
    ):
        measured = measured_collisions(storage.lookup_keys, stats)
    return TableStats(stats, expected_collisions(storage.program, storage.ids, stats), measured)
