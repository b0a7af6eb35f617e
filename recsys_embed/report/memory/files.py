"""Stored tables of files and folders: runs, checkpoints, state dicts, safetensors, plans, schemas, data folders."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch

from recsys_embed.collection.optimizer_state import optimizer_entries
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels.indexes import IndexStore, first_of_equals
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan
from recsys_embed.registry import config_from_dict
from recsys_embed.report.memory.arrays import ArrayRole, ArrayStorage, TableStorage
from recsys_embed.report.memory.collisions import row_keys
from recsys_embed.report.memory.export import KEY as EXPORT
from recsys_embed.report.memory.export import export_storage
from recsys_embed.report.memory.file_tensors import FileTensor, parse_manifest, read_safetensors, read_torch
from recsys_embed.report.memory.plan import ModelStorage, list_shared_once, plan_storage, spec_of
from recsys_embed.report.memory.state_size import OptimizerStateSize, state_size_of
from recsys_embed.utils.files import file_form
from recsys_embed.utils.strict_json import own_json, read_object

STATE = "_extra_state"
RUN_FILES = ("model.pt", "checkpoint.pt")
GUESSES = ("*emb*", "*lookup*", "*table*")
"""Patterns (lower case) of names of two-dimensional tensors in a state dict that are taken for tables."""


@dataclass(frozen=True)
class LoadedSource:
    """The tables of a path, and the settings that were stored with them."""

    storage: ModelStorage
    optimizer: OptimizerStateSize | None = None
    dense_optimizer: Any = None
    stats: Any = None


def read_source(
    path: Path,
    optimizer: Any,
    dense_optimizer: Any,
    schema: Schema | None,
    embedding_dim: int,
    tables: Sequence[str] | None,
) -> LoadedSource:
    """Read a file or folder of any kind above.

    Raises:
        ConfigError: the path does not exist, or is of another kind.
        CheckpointError: a file is damaged.
    """
    if os.path.isdir(path):
        return _folder(path, optimizer, dense_optimizer, embedding_dim, tables)
    if not os.path.isfile(path):
        raise ConfigError(f"there is nothing at {path}; expected a run folder, a data folder or a file of weights")
    form = file_form(path)
    if form == "json":
        state_size = state_size_of(optimizer, prefer_fused=True)
        return LoadedSource(_json(path, schema, state_size.fused if state_size else None), state_size, dense_optimizer)
    return _weights(path, form, optimizer, dense_optimizer, tables)


def _folder(
    path: Path, optimizer: Any, dense_optimizer: Any, embedding_dim: int, tables: Sequence[str] | None
) -> LoadedSource:
    for name in RUN_FILES:
        if (path / name).is_file():
            return _weights(path / name, file_form(path / name), optimizer, dense_optimizer, tables)
    if (path / "schema.json").is_file():
        from recsys_embed.data import open_dataset

        data = open_dataset(path)
        schema, state_size = data.schema(embedding_dim), state_size_of(optimizer, prefer_fused=True)
        raw = any(f.ids == "raw" for f in schema)
        # Raw ids have no full table; the reference is the table of as many indices.
        if raw:
            schema = Schema([replace(f, ids="index") for f in schema])
        storage = plan_storage(schema, Plan.full(schema), state_size.fused if state_size else None, kind="data")
        note = f"full tables of width {embedding_dim} for the features of the data"
        note += ", whose raw ids were counted" if raw else ""
        return LoadedSource(replace(storage, notes=(note,)), state_size, dense_optimizer, data)
    raise ConfigError(f"{path} is no run folder (no {' or '.join(RUN_FILES)}) and no data folder (no schema.json)")


def _json(path: Path, schema: Schema | None, fused: FusedOptimizer | None) -> ModelStorage:
    """A plan or a schema."""
    try:
        data = read_object(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror or e}") from e
    if isinstance(data.get("features"), list) and "format" not in data:
        own = Schema.from_dict(data)
        return plan_storage(own, Plan.full(own), fused)
    if isinstance(data.get("features"), Mapping):
        if schema is None:
            raise ConfigError(f"{path} is a plan, which needs the features it is for: give a schema or a data folder")
        try:
            plan = Plan.from_dict(data, path.parent)
        except ConfigError as e:
            raise type(e)(f"{path}: {e}") from e
        return plan_storage(schema, plan, fused)
    raise ConfigError(f"{path} holds neither a plan nor a schema; a data folder's schema.json is read by its folder")


# -- weights -------------------------------------------------------------------------------------------------------


def _weights(
    path: Path, form: str, optimizer: Any, dense_optimizer: Any, patterns: Sequence[str] | None
) -> LoadedSource:
    if form == "safetensors":
        tensors, metadata = read_safetensors(path)
        config: dict[str, Any] = {}
        if EXPORT in metadata:
            manifest = parse_manifest(path, metadata[EXPORT])
            return LoadedSource(export_storage(path, manifest, {t.name: t for t in tensors}), None, dense_optimizer)
        # Of tensors over one memory, safetensors.torch.save_model keeps one and notes the names of the others.
        by_name = {t.name: t for t in tensors}
        tensors += [
            replace(by_name[kept], name=n) for n, kept in metadata.items() if kept in by_name and n not in by_name
        ]
    else:
        tensors, config = read_torch(path)
    if optimizer is None and isinstance(config.get("embedding_optimizer"), str):
        optimizer = config["embedding_optimizer"]
        dense_optimizer = "adam" if dense_optimizer is None else dense_optimizer
    state_size = state_size_of(optimizer, prefer_fused=True)
    return LoadedSource(
        _weights_storage(path, tensors, state_size.fused if state_size else None, patterns), state_size, dense_optimizer
    )


def _weights_storage(
    path: Path, tensors: Sequence[FileTensor], fused: FusedOptimizer | None, patterns: Sequence[str] | None
) -> ModelStorage:
    """Tables of this library's modules, from their stored configuration; other tables, from names of tensors."""
    storages: list[TableStorage] = []
    notes: list[str] = []
    taken: set[str] = set()
    for stored in tensors:
        prefix = stored.name.removesuffix(STATE)
        if stored.name == prefix or stored.dtype != torch.uint8:
            continue
        inside = {t.name.removeprefix(prefix): t for t in tensors if t.name.startswith(prefix) and t.name not in taken}
        # Modules inside a collection have a configuration of their own, which is part of the collection's.
        taken |= {prefix + name for name in optimizer_entries(inside)}
        inside = {n: t for n, t in inside.items() if prefix + n not in taken}
        own = _of_state(path, stored, inside, prefix, fused)
        if own is None:
            continue
        taken |= {prefix + name for name in inside}
        storages += own.tables
        held = sum(prod(t.shape) * t.dtype.itemsize for n, t in inside.items() if not n.endswith(STATE))
        expected = sum(a.nbytes for e in own.tables for a in e.arrays)
        if held != expected:
            where = prefix.rstrip(".") or "the file"
            notes.append(f"{where} holds {held:,} bytes of weights, but its configuration gives {expected:,}")
    rest: list[ArrayStorage] = []
    seen: set[Hashable] = set()
    guessed = 0
    for t in tensors:
        if t.name in taken or t.name.endswith(STATE) or t.key in seen:
            continue
        seen.add(t.key)
        matrix = len(t.shape) == 2 and t.dtype.is_floating_point
        if matrix and (_is_table(t.name, patterns) or (patterns is None and len(tensors) == 1)):
            storages.append(_plain(t))
            guessed += 1
        else:
            rows, width = (t.shape[0], prod(t.shape[1:])) if len(t.shape) >= 2 else (1, prod(t.shape))
            floating = t.dtype.is_floating_point
            role: ArrayRole = "dense" if floating else "index"
            rest.append(
                ArrayStorage(t.name, rows, width, t.dtype.itemsize, role, 0, t.key, floating, flat=len(t.shape) < 2)
            )
    if guessed and patterns is None:
        notes.append(
            f"{guessed} tensors were taken for tables by their names ({', '.join(GUESSES)}); name others with "
            "tables=[...] (--tables)"
        )
    if not storages:
        notes.append("no tensor looks like an embedding table by its name; name them with tables=[...] (--tables)")
    return ModelStorage(tuple(list_shared_once(storages)), tuple(rest), tuple(notes))


def _is_table(name: str, patterns: Sequence[str] | None) -> bool:
    if patterns is not None:
        return any(fnmatchcase(name, p) for p in patterns)
    return any(fnmatchcase(name.lower(), p) for p in GUESSES)


def _plain(t: FileTensor) -> TableStorage:
    path = t.name.removesuffix("weight").rstrip(".") or "embedding"
    rows, width = t.shape
    return TableStorage(
        name=path.replace(".", "/"),
        kind="file",
        method="full",
        ids=rows,
        width=width,
        arrays=(ArrayStorage("weight", rows, width, t.dtype.itemsize, "table", 1, t.key),),
        spec=spec_of(path, rows, width),
        paths=(path,),
    )


def _of_state(
    path: Path, stored: FileTensor, inside: Mapping[str, FileTensor], prefix: str, fused: FusedOptimizer | None
) -> ModelStorage | None:
    """Tables of a module that stored its configuration; None for other libraries' state and parts of a module."""
    try:
        identity = own_json(bytes(stored.read().numpy()))
    except (ValueError, RuntimeError):
        return None
    if not isinstance(identity, dict) or stored.name.removeprefix(prefix) not in inside:
        return None
    at = prefix.rstrip(".").replace(".", "/")
    try:
        if {"schema", "order", "plan"} <= identity.keys():
            schema = Schema.from_dict({"features": [identity["schema"][name] for name in identity["order"]]})
            plan, index = Plan.from_dict(identity["plan"]), "bundle.kernel.index."
            at += "/" if at else ""
        elif {"spec", "config"} <= identity.keys():
            spec = FeatureSpec(**identity["spec"])
            schema, plan, index = (
                Schema([spec]),
                Plan({spec.name: config_from_dict(identity["config"])}),
                "kernel.index.",
            )
        else:
            return None
    except (ConfigError, TypeError, KeyError) as e:
        raise CheckpointError(f"{path}: the configuration stored as {stored.name} cannot be used: {e}") from e
    itemsize = next((t.dtype.itemsize for t in inside.values() if t.dtype.is_floating_point), 4)
    storage = plan_storage(schema, plan, fused, kind="file", at=at, itemsize=itemsize)
    storages = _with_indexes(storage.tables, plan, schema, inside, index, at)
    if index == "kernel.index.":
        # Drop-ins that share a table hold the same bytes, by which the table is known to be one.
        (only,) = (e for e in storages if e.kind != "shared")
        arrays = [
            replace(a, parameter=inside[a.name].key) if a.name in inside else a for e in storages for a in e.arrays
        ]
        storages = [replace(only, name=at or "embedding", arrays=tuple(arrays), shared=(), paths=(prefix.rstrip("."),))]
    return ModelStorage(tuple(storages))


def _with_indexes(
    storages: Sequence[TableStorage], plan: Plan, schema: Schema, inside: Mapping[str, FileTensor], index: str, at: str
) -> list[TableStorage]:
    """Entries whose lookups read the file's own index buffers."""
    programs = plan.gathered(schema)
    owners = first_of_equals([schema[name].table_name for name in programs])
    store = IndexStore([p.indexes for p in programs.values()], owners)
    for name, held in store.arrays.held.items():
        if held.numel() and f"{index}{name}" in inside:
            held.copy_(inside[f"{index}{name}"].read())
    places = {f"{at}{name}": i for i, name in enumerate(programs)}
    return [
        replace(e, lookup_keys=row_keys(e.program, store, places[e.name])) if e.program and e.name in places else e
        for e in storages
    ]
