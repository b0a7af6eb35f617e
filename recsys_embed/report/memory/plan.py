"""Stored tables of plans, and helpers that stored tables of modules use as well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram, Table
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan
from recsys_embed.report.memory.arrays import (
    ArrayRole,
    ArrayStorage,
    TableStorage,
    UpdateKind,
    index_arrays,
    lookup_shape,
    reads_of,
)
from recsys_embed.report.memory.collisions import row_keys


@dataclass(frozen=True)
class ModelStorage:
    """Everything a source stores: its tables, and the arrays of the rest of the model."""

    tables: tuple[TableStorage, ...]
    rest: tuple[ArrayStorage, ...] = ()
    notes: tuple[str, ...] = ()


def plan_storage(
    schema: Schema, plan: Plan, fused: FusedOptimizer | None, kind: str = "plan", at: str = "", itemsize: int = 4
) -> ModelStorage:
    """Stored tables of a plan; ``at`` is the prefix of their names."""
    plan.check(schema)
    plan.tables(schema)  # tables that features share must agree
    storages, shared = [], SharedArrays(kind)
    for spec in schema:
        config = plan[spec.name]
        program = config.program(spec)
        arrays = arrays_of(spec, config, program, itemsize, private=True)
        for table in program.tables:
            if table.shared:
                shared.put(spec.name, table.name, [array_of(table, program, itemsize, None, True)])
        storage = storage_of(f"{at}{spec.name}", kind, spec, config, program, arrays, at)
        storages.append(stored_once(storage, spec, schema, at))
    update: UpdateKind = "dense" if fused is None else "fused"
    computing = {f"{at}{n}" for n in set(schema.names) - plan.gathered(schema).keys()}
    found = [*storages, *shared.storages(at)]
    return ModelStorage(
        tuple(
            replace(e, update="dense") if e.name in computing else replace(e, update=update, fused=fused) for e in found
        )
    )


def arrays_of(
    spec: FeatureSpec, config: MethodConfig, program: LookupProgram, itemsize: int = 4, *, private: bool = False
) -> tuple[ArrayStorage, ...]:
    """Arrays that a configuration stores for a feature; ``private`` omits shared tables."""
    arrays = [array_of(t, program, itemsize, None, True) for t in program.tables if not (private and t.shared)]
    networks = config.footprint(spec).weights - sum(t.nbytes() for t in program.tables)
    if networks:
        arrays.append(ArrayStorage("network", 1, networks // 4, itemsize, "dense"))
    return (*arrays, *index_arrays(program))


def stored_once(storage: TableStorage, spec: FeatureSpec, schema: Schema, at: str = "") -> TableStorage:
    """The storage of a feature, which is empty where an earlier feature reads the same table."""
    first, *others = schema.by_table[spec.table_name]
    if spec.name != first.name:
        return replace(storage, arrays=(), spec=None, shared=(*storage.shared, f"{at}{first.name}"))
    if not others:
        return storage
    arrays = tuple(replace(a, reads=a.reads * (1 + len(others))) for a in storage.arrays)
    return replace(storage, arrays=arrays, read_by=tuple(f"{at}{s.name}" for s in (first, *others)))


class SharedArrays:
    """Arrays that several tables read, each once."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.arrays: dict[str, list[ArrayStorage]] = {}
        self.readers: dict[str, list[str]] = {}

    def put(self, reader: str, name: str, arrays: Sequence[ArrayStorage]) -> None:
        """Add a reader of the arrays shared as ``name``."""
        reads = self.arrays[name][0].reads if name in self.arrays else 0
        self.arrays[name] = [replace(a, reads=a.reads + reads) if a.role == "table" else a for a in arrays]
        self.readers.setdefault(name, []).append(reader)

    def storages(self, at: str) -> list[TableStorage]:
        return [
            TableStorage(
                name=f"{at}{name}",
                kind="shared",
                method="shared",
                ids=0,
                width=arrays[0].width,
                arrays=tuple(arrays),
                read_by=tuple(dict.fromkeys(f"{at}{reader}" for reader in self.readers[name])),
            )
            for name, arrays in self.arrays.items()
        ]


def list_shared_once(storages: Sequence[TableStorage]) -> list[TableStorage]:
    """Storage of drop-ins, with arrays that several of them hold listed separately."""
    holders = Counter(a.parameter for e in storages for a in e.arrays if a.parameter is not None)
    shared, names = SharedArrays("compressed"), {}
    taken = {e.name for e in storages}
    out, updates = [], {}
    for e in storages:
        mine = []
        for a in e.arrays:
            if holders[a.parameter] < 2:
                continue
            if a.parameter not in names:
                options = chain([a.name], (f"{a.name}_{n}" for n in count(2)))
                names[a.parameter] = next(n for n in options if n not in taken)
                taken.add(names[a.parameter])
            mine.append(names[a.parameter])
            shared.put(e.name, names[a.parameter], [a])
            updates[names[a.parameter]] = e.update
        own = tuple(a for a in e.arrays if holders[a.parameter] < 2)
        out.append(replace(e, arrays=own, shared=tuple(mine)))
    return out + [replace(e, update=updates[e.name]) for e in shared.storages("")]


def array_of(table: Table, program: LookupProgram, itemsize: int, parameter: Any, trained: bool) -> ArrayStorage:
    """One table of a program, stored in ``parameter`` (None: not yet built)."""
    role: ArrayRole = "dense" if table.dense else "table"
    reads = reads_of(program, table.name)
    packed = None if table.training is None else table.trained_bytes()
    shape = table.name, table.rows, table.width
    return ArrayStorage(*shape, itemsize, role, reads, parameter, trained, packed, precision=table.precision)


def storage_of(
    name: str,
    kind: str,
    spec: FeatureSpec,
    config: MethodConfig,
    program: LookupProgram,
    arrays: Sequence[ArrayStorage],
    at: str = "",
) -> TableStorage:
    """Storage of a feature's table; ``arrays`` are its own, ``at`` is the prefix of names of shared ones."""
    numbers, gathered = lookup_shape(program)
    return TableStorage(
        name=name,
        kind=kind,
        method=config.method,
        ids=spec.num_embeddings,
        width=program.width,
        arrays=tuple(arrays),
        spec=spec,
        config=config.to_dict(),
        program=program,
        shared=tuple(f"{at}{t.name}" for t in program.tables if t.shared),
        row_reads=numbers,
        gathered=gathered,
        # Until assigned, id sets hold the most frequent ids, assuming that ids are numbered by falling frequency.
        lookup_keys=None if config.computes else row_keys(program),
    )


def spec_of(name: str, rows: int, width: int) -> FeatureSpec | None:
    """The table as a feature; None where a feature could not be that large."""
    try:
        return FeatureSpec(name.replace(".", "/").replace("#", "_") or "embedding", rows, width)
    except ConfigError:
        return None
