"""Tables of what lies on disk: run folders, checkpoints, state dicts, safetensors, plans, schemas and data folders."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch

from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan
from recsys_embed.registry import config_from_dict
from recsys_embed.report.memory.arrays import Array, Entry, Role
from recsys_embed.report.memory.collisions import row_keys
from recsys_embed.report.memory.export import KEY as EXPORT
from recsys_embed.report.memory.export import parts_of_export
from recsys_embed.report.memory.optimizer import StateLaw, make_law
from recsys_embed.report.memory.plan import Parts, parts_of_plan, spec_of
from recsys_embed.report.memory.tensors import Stored, read_manifest, read_safetensors, read_torch
from recsys_embed.utils.files import file_form
from recsys_embed.utils.strict_json import read_object

STATE = "_extra_state"
RUN_FILES = ("model.pt", "checkpoint.pt")
GUESSES = ("*emb*", "*lookup*", "*table*")
"""Patterns of the names, in lower case, by which a state dict's two-dimensional tensors are taken for tables."""


@dataclass(frozen=True)
class Read:
    """What a path holds, and the settings that it brings along."""

    parts: Parts
    optimizer: StateLaw | None = None
    dense_optimizer: Any = None
    stats: Any = None


def parts_of_path(
    path: Path,
    optimizer: Any,
    dense_optimizer: Any,
    schema: Schema | None,
    embedding_dim: int,
    tables: Sequence[str] | None,
) -> Read:
    """Whatever of the kinds above lies at ``path``.

    Raises:
        ConfigError: nothing there, or none of these kinds.
        CheckpointError: damaged.
    """
    if os.path.isdir(path):
        return _folder(path, optimizer, dense_optimizer, embedding_dim, tables)
    if not os.path.isfile(path):
        raise ConfigError(f"there is nothing at {path}; expected a run folder, a data folder or a file of weights")
    form = file_form(path)
    if form == "json":
        law = make_law(optimizer, prefer_fused=True)
        return Read(_json(path, schema, law.fused if law else None), law, dense_optimizer)
    return _weights(path, form, optimizer, dense_optimizer, tables)


def _folder(path: Path, optimizer: Any, dense_optimizer: Any, embedding_dim: int, tables: Sequence[str] | None) -> Read:
    for name in RUN_FILES:
        if (path / name).is_file():
            return _weights(path / name, file_form(path / name), optimizer, dense_optimizer, tables)
    if (path / "schema.json").is_file():
        from recsys_embed.data import open_dataset

        data = open_dataset(path)
        schema, law = data.schema(embedding_dim), make_law(optimizer, prefer_fused=True)
        raw = any(f.ids == "raw" for f in schema)
        # Raw ids have no plain table; that of as many ids is what a person compares with.
        if raw:
            schema = Schema([replace(f, ids="index") for f in schema])
        parts = parts_of_plan(schema, Plan.full(schema), law.fused if law else None, kind="data")
        note = f"plain tables of width {embedding_dim} for the features of the data"
        note += ", whose raw ids were counted" if raw else ""
        return Read(replace(parts, notes=(note,)), law, dense_optimizer, data)
    raise ConfigError(f"{path} is no run folder (no {' or '.join(RUN_FILES)}) and no data folder (no schema.json)")


def _json(path: Path, schema: Schema | None, fused: FusedOptimizer | None) -> Parts:
    """A plan or a schema."""
    try:
        data = read_object(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror or e}") from e
    if isinstance(data.get("features"), list) and "format" not in data:
        own = Schema.from_dict(data)
        return parts_of_plan(own, Plan.full(own), fused)
    if isinstance(data.get("features"), Mapping):
        if schema is None:
            raise ConfigError(f"{path} is a plan, which needs the features it is for: give a schema or a data folder")
        try:
            plan = Plan.from_dict(data, path.parent)
        except ConfigError as e:
            raise type(e)(f"{path}: {e}") from e
        return parts_of_plan(schema, plan, fused)
    raise ConfigError(f"{path} holds neither a plan nor a schema; a data folder's schema.json is read by its folder")


# -- weights -------------------------------------------------------------------------------------------------------


def _weights(path: Path, form: str, optimizer: Any, dense_optimizer: Any, patterns: Sequence[str] | None) -> Read:
    if form == "safetensors":
        tensors, metadata = read_safetensors(path)
        config: dict[str, Any] = {}
        if EXPORT in metadata:
            manifest = read_manifest(path, metadata[EXPORT])
            return Read(parts_of_export(path, manifest, {t.name: t for t in tensors}), None, dense_optimizer)
    else:
        tensors, config = read_torch(path)
    if optimizer is None and isinstance(config.get("embedding_optimizer"), str):
        optimizer = config["embedding_optimizer"]
        dense_optimizer = "adam" if dense_optimizer is None else dense_optimizer
    law = make_law(optimizer, prefer_fused=True)
    return Read(_parts(path, tensors, law.fused if law else None, patterns), law, dense_optimizer)


def _parts(
    path: Path, tensors: Sequence[Stored], fused: FusedOptimizer | None, patterns: Sequence[str] | None
) -> Parts:
    """This library's modules by the configuration stored with them, tables of others by their names."""
    entries: list[Entry] = []
    notes: list[str] = []
    taken: set[str] = set()
    for stored in tensors:
        prefix = stored.name.removesuffix(STATE)
        if stored.name == prefix or stored.dtype != torch.uint8:
            continue
        inside = {t.name.removeprefix(prefix): t for t in tensors if t.name.startswith(prefix) and t.name not in taken}
        # Modules within a collection carry a configuration of their own, which the collection's contains.
        own = _of_state(path, stored, inside, prefix, fused)
        if own is None:
            continue
        taken |= {prefix + name for name in inside}
        entries += own.entries
        held = sum(prod(t.shape) * t.dtype.itemsize for n, t in inside.items() if not n.endswith(STATE))
        said = sum(a.nbytes for e in own.entries for a in e.arrays)
        if held != said:
            where = prefix.rstrip(".") or "the file"
            notes.append(f"{where} holds {held:,} bytes of weights where its configuration says {said:,}")
    rest: list[Array] = []
    seen: set[Hashable] = set()
    guessed = 0
    for t in tensors:
        if t.name in taken or t.name.endswith(STATE) or t.key in seen:
            continue
        seen.add(t.key)
        matrix = len(t.shape) == 2 and t.dtype.is_floating_point
        if matrix and (_is_table(t.name, patterns) or (patterns is None and len(tensors) == 1)):
            entries.append(_plain(t))
            guessed += 1
        else:
            rows, width = (t.shape[0], prod(t.shape[1:])) if len(t.shape) >= 2 else (1, prod(t.shape))
            floating = t.dtype.is_floating_point
            role: Role = "dense" if floating else "index"
            rest.append(Array(t.name, rows, width, t.dtype.itemsize, role, 0, t.key, floating, flat=len(t.shape) < 2))
    if guessed and patterns is None:
        notes.append(
            f"{guessed} tensors were taken for tables by their names ({', '.join(GUESSES)}); name others with "
            "tables=[...] (--tables)"
        )
    if not entries:
        notes.append("no tensor looks like an embedding table by its name; name them with tables=[...] (--tables)")
    return Parts(tuple(entries), tuple(rest), tuple(notes))


def _is_table(name: str, patterns: Sequence[str] | None) -> bool:
    if patterns is not None:
        return any(fnmatchcase(name, p) for p in patterns)
    return any(fnmatchcase(name.lower(), p) for p in GUESSES)


def _plain(t: Stored) -> Entry:
    path = t.name.removesuffix("weight").rstrip(".") or "embedding"
    rows, width = t.shape
    return Entry(
        name=path.replace(".", "/"),
        kind="file",
        method="full",
        ids=rows,
        width=width,
        arrays=(Array("weight", rows, width, t.dtype.itemsize, "table", 1, t.key),),
        spec=spec_of(path, rows, width),
        paths=(path,),
    )


def _of_state(
    path: Path, stored: Stored, inside: Mapping[str, Stored], prefix: str, fused: FusedOptimizer | None
) -> Parts | None:
    """The tables of a module that stored its configuration; None where it is of somebody else or of an outer one."""
    try:
        identity = json.loads(bytes(stored.read().numpy()))
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
    parts = parts_of_plan(schema, plan, fused, kind="file", at=at, itemsize=itemsize)
    entries = _with_indexes(parts.entries, plan, schema, inside, index, at)
    if index == "kernel.index.":
        # A drop-in shares its arrays with nobody.
        (entry,) = (e for e in entries if e.kind != "shared")
        arrays = [a for e in entries for a in e.arrays]
        entries = [replace(entry, name=at or "embedding", arrays=tuple(arrays), shared=(), paths=(prefix.rstrip("."),))]
    return Parts(tuple(entries))


def _with_indexes(
    entries: Sequence[Entry], plan: Plan, schema: Schema, inside: Mapping[str, Stored], index: str, at: str
) -> list[Entry]:
    """Entries whose lookups read the file's own index buffers."""
    programs = plan.gathered(schema)
    store = IndexStore([p.indexes for p in programs.values()])
    for name, buffer in store.named_buffers():
        if buffer.numel() and f"{index}{name}" in inside:
            buffer.copy_(inside[f"{index}{name}"].read())
    places = {f"{at}{name}": i for i, name in enumerate(programs)}
    return [
        replace(e, hashed=row_keys(e.program, store, places[e.name])) if e.program and e.name in places else e
        for e in entries
    ]
