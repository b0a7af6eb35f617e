"""Stored tables of modules; nothing is built, and meta tensors are enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.program import LookupProgram, Table
from recsys_embed.discover import FoundTable, bare_tables, find_tables, join_path, unwrapped
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.row_cache import RowCaches
from recsys_embed.kernels.stored_tables import Stored
from recsys_embed.plan import table_key
from recsys_embed.report.memory.arrays import ArrayRole, ArrayStorage, TableStorage, UpdateKind, index_arrays, reads_of
from recsys_embed.report.memory.collisions import row_keys
from recsys_embed.report.memory.plan import (
    ModelStorage,
    SharedArrays,
    array_of,
    list_shared_once,
    spec_of,
    storage_of,
    stored_once,
)


def module_storage(model: nn.Module) -> ModelStorage:
    """Everything a module tree stores."""
    storages: list[TableStorage] = []
    drop_ins: list[TableStorage] = []
    seen: set[int] = set()
    model = unwrapped(model)
    tables = find_tables(model)
    for table in tables:
        if table.kind == "collection":
            if id(table.module) not in seen:
                seen.add(id(table.module))
                mine = [t for t in tables if t.module is table.module]
                storages += _storages_of_collection(cast("EmbeddingCollection", table.module), mine)
        elif table.kind == "compressed":
            drop_ins.append(_storage_of_drop_in(cast("CompressedEmbedding", table.module), table))
        else:
            storages.append(_storage_of_plain(table))
    storages += list_shared_once(drop_ins)
    counted = {_key(t) for table in tables for m in table.modules for t in _tensors(m)}
    rest, lazy = _rest(model, counted)
    notes = [f"{len(lazy)} parameters have no shape yet and are not counted: {', '.join(lazy[:4])}"] if lazy else []
    for table in tables:
        if table.tied:
            notes.append(f"{table.name} is also {', '.join(table.tied)}: one tensor, counted once, as a table")
    if not tables:
        notes.append("no embedding table was found in the model")
    notes += map(str, bare_tables(model))
    cached = [c for m in model.modules() if isinstance(m, RowCaches) for c in m.by_feature.values()]
    if cached:
        held, most = sum(c.nbytes for c in cached), sum(c.most_bytes for c in cached)
        notes.append(f"caches of computed rows hold {format_bytes(held)} of at most {format_bytes(most)}")
    return ModelStorage(tuple(storages), tuple(rest), tuple(notes))


def _storage_of_plain(table: FoundTable) -> TableStorage:
    module: Any = table.modules[0]
    own = list(module.named_parameters())
    whole = module._parameters.get("weight") is not None
    arrays = []
    for name, p in own:
        rows, width = (p.shape[0], p.shape[1]) if p.dim() == 2 else (1, p.numel())
        role: ArrayRole = "table" if whole else "dense"
        arrays.append(ArrayStorage(name, rows, width, p.element_size(), role, int(whole), id(p), p.requires_grad))
    trained = any(p.requires_grad for _, p in own)
    update: UpdateKind = "sparse" if module.sparse else "dense"
    return TableStorage(
        name=table.name,
        kind=table.kind,
        method="full",
        ids=table.rows,
        width=table.width,
        arrays=tuple(arrays),
        update=update if trained else "frozen",
        spec=spec_of(table.name, table.rows, table.width),
        paths=table.paths,
        pools_bags=table.pooling is not None,
    )


def _own_arrays(module: CompressedEmbedding) -> list[ArrayStorage]:
    """A drop-in's stored arrays, from its parameters and persistent buffers."""
    tables = {t.name: t for t in module.program.tables}
    table_of = {module.parameter_name(name): name for name in tables}
    arrays = []
    for key, p in module.named_parameters():
        name = table_of.get(key, key)
        table = tables.get(name)
        dense = table is None or table.dense
        rows, width = (p.shape[0], p.numel() // p.shape[0]) if p.dim() >= 2 else (1, p.numel())
        reads = 0 if dense else reads_of(module.program, name)
        role: ArrayRole = "dense" if dense else "table"
        array = ArrayStorage(name, rows, width, p.element_size(), role, reads, id(p), p.requires_grad, flat=p.dim() < 2)
        if table is not None:
            packed = None if table.training is None else table.trained_bytes()
            # What a file was loaded from is held as it is served.
            array = replace(array, precision=table.precision, packed=packed)
            array = _as_served(array) if module.from_file else array
        arrays.append(array)
    if module.served is not None:
        for name in tables:
            if name in module.served:
                stored = module.served[name]
                # Drop-ins that share a table serve one copy of it.
                held = _served(name, stored, 0, reads_of(module.program, name))
                arrays += [replace(a, parameter=(id(stored), a.role)) for a in held]
    for name, b in _persistent(module):
        if not name.startswith("served."):
            arrays.append(ArrayStorage(name, b.numel(), 1, b.element_size(), "index", trained=False))
    return [*arrays, *_cached(module.caches, 0)]


def _cached(caches: RowCaches | None, feature: int) -> list[ArrayStorage]:
    """Computed rows that are kept while a file is served."""
    held = 0 if caches is None or feature not in caches.by_feature else caches.by_feature[feature].nbytes
    return [ArrayStorage("cached rows", held, 1, 1, "index", trained=False)] if held else []


def _served(name: str, stored: Stored, offset: int, reads: int) -> list[ArrayStorage]:
    """A table of a loaded export, which starts at row ``offset`` of its storage."""
    start = 0
    for part in stored.parts:
        if start == offset:
            table = ArrayStorage(name, part.count, part.layout.width, 4, "table", reads, None, False, part.nbytes)
            kept = ArrayStorage(f"{name}.kept", part.index_bytes, 1, 1, "index", trained=False)
            return [table, kept] if kept.nbytes else [table]
        start += part.rows
    raise ConfigError(f"an export stores no table at row {offset} for {name!r}")


def _persistent(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Buffers and index arrays that a state dict holds."""
    for path, part in module.named_modules():
        held = part.arrays.held if isinstance(part, IndexStore) else {}
        for name, b in [*part._buffers.items(), *held.items()]:
            if b is not None and name not in part._non_persistent_buffers_set:
                yield join_path(path, name), b


def _storage_of_drop_in(module: CompressedEmbedding, table: FoundTable) -> TableStorage:
    update: UpdateKind = "sparse" if module.sparse else "dense"
    storage = storage_of(table.name, table.kind, module.spec, module.config, module.program, _own_arrays(module))
    lookup_keys = None if module.config.computes else row_keys(module.program, module.kernel.index)
    plain = module.config.method == "full"
    return replace(
        storage,
        update=update if any(p.requires_grad for p in module.parameters()) else "frozen",
        paths=table.paths,
        shared=(),
        lookup_keys=lookup_keys,
        pools_bags=plain and module.mode is not None,
        row_reads=0 if plain else storage.row_reads,
    )


def _storages_of_collection(collection: EmbeddingCollection, tables: Sequence[FoundTable]) -> list[TableStorage]:
    names = {t.table: t for t in tables}
    # The name of a feature's table is the collection's path and the feature's name.
    at = tables[0].name.removesuffix(str(tables[0].table).replace(".", "/"))
    plan, fused, bundle = collection.plan, collection.optimizer, collection.bundle
    frozen = fused is None and not any(p.requires_grad for p in collection.parameters())
    update: UpdateKind = "fused" if fused else "frozen" if frozen else "sparse" if collection.sparse else "dense"
    shared, storages = SharedArrays("collection"), []
    for spec in collection.schema:
        config, found = plan[spec.name], names[spec.name]
        if spec.name not in bundle.programs:
            module = bundle._module(spec.name)
            storage = storage_of(found.name, found.kind, spec, config, module.program, _own_arrays(module))
            storage = replace(storage, update="frozen" if frozen else "dense", paths=found.paths, shared=())
            storages.append(stored_once(storage, spec, collection.schema, at))
            continue
        program, arrays = bundle.programs[spec.name], []
        for table in program.tables:
            held = _held(collection, spec, table, program)
            if table.shared:
                shared.put(spec.name, table.name, held)
            else:
                arrays += held
        place = list(bundle.programs).index(spec.name)
        arrays += _cached(bundle.caches, list(collection.schema).index(spec))
        storage = storage_of(found.name, found.kind, spec, config, program, (*arrays, *index_arrays(program)), at)
        lookup_keys = row_keys(program, bundle.kernel.index, place)
        storage = replace(storage, paths=found.paths, lookup_keys=lookup_keys)
        storages.append(stored_once(storage, spec, collection.schema, at))
    # A shared table is that of the features that read it.
    at_step = fused is not None and not collection.steps_in_backward
    gathered = {found.name for found in tables if found.table in bundle.programs}
    return [
        replace(e, update=update, fused=fused, at_step=at_step) if e.name in gathered or e.kind == "shared" else e
        for e in [*storages, *shared.storages(at)]
    ]


def _held(
    collection: EmbeddingCollection, spec: FeatureSpec, table: Table, program: LookupProgram
) -> list[ArrayStorage]:
    """Arrays that a collection stores for one table of a feature."""
    if table.dense:
        values = collection.bundle.heads.parameter(spec.name, table.name)
        array = array_of(table, program, values.element_size(), id(values), values.requires_grad)
        return [_as_served(array) if collection.from_file else array]
    storage, offset = collection.places[table_key(spec, table)]
    if collection.served is not None and storage in collection.served:
        return _served(table.name, collection.served[storage], offset, reads_of(program, table.name))
    weight = getattr(collection, storage)
    trained = weight.requires_grad or collection.optimizer is not None
    array = array_of(table, program, weight.element_size(), id(weight), trained)
    return [_as_served(array) if collection.from_file else array]


def _as_served(array: ArrayStorage) -> ArrayStorage:
    """An array that a file filled, which takes what it holds, whatever its plan says."""
    return replace(array, precision="fp32", packed=None)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in [*module.parameters(), *module.buffers()] if not is_lazy(t)]


def _key(tensor: Tensor) -> Any:
    """Equal for parameters over the same memory; works on the meta device, too."""
    tensor = getattr(tensor, "stored", tensor)  # of rows that train in few bits
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel())


def _rest(model: nn.Module, counted: set[Any]) -> tuple[list[ArrayStorage], list[str]]:
    """Parameters and buffers outside the tables, each once; names of those without a shape."""
    rest, lazy, seen = [], [], set(counted)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(t):
            lazy.append(name)
            continue
        if _key(t) in seen:
            continue
        seen.add(_key(t))
        # Matrices keep their shape, on which the state of some optimizers depends.
        rows, width = (t.shape[0], t.numel() // max(1, t.shape[0])) if t.dim() >= 2 else (1, t.numel())
        parameter = isinstance(t, nn.Parameter)
        role: ArrayRole = "dense" if parameter else "index"
        trained = parameter and t.requires_grad
        rest.append(ArrayStorage(name, rows, width, t.element_size(), role, 0, id(t), trained, flat=t.dim() < 2))
    return rest, lazy
