"""The manifest of an exported file: a versioned JSON object, checked against the tensors before any is read.

``version`` changes when a reader of the one before could not understand the file. Nothing in it names code: methods
and models stand by their registered keys, everything else is numbers and arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from recsys_embed.core.id_sets import words_of
from recsys_embed.errors import CheckpointError
from recsys_embed.exports.file_format import DTYPES, NAMES, ExportFile
from recsys_embed.exports.served_modules import ModuleItem
from recsys_embed.features import MAX_ROWS
from recsys_embed.kernels.precision import BITS, FLOATS, Layout
from recsys_embed.kernels.stored_tables import Part, RowForm

MANIFEST_VERSION = 1

_KEYS: dict[str, type | tuple[type, ...]] = {
    "written_by": dict,
    "precision": str,
    "search": str,
    "model": dict,
    "modules": list,
    "storages": list,
    "tables": dict,
    "dense": dict,
    "sha256": dict,
}


@dataclass(frozen=True)
class TableItem:
    """A table of the file: the part of it that is stored, and the width and dtype of its vectors."""

    name: str
    part: Part
    width: int
    dtype: torch.dtype

    def arrays(self) -> dict[str, tuple[str, torch.dtype, tuple[int, ...]]]:
        """Index tensors of the kept rows: name, dtype and shape, by the last part of the name."""
        kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.part.form == "bitmap":
            size = (words_of(self.part.rows),)
            kinds = {"words": (torch.int64, size), "ranks": (torch.int32, size)}
        elif self.part.form == "sorted":
            kinds = {"values": (torch.int32, (self.part.count,))}
        return {end: (f"{self.name}.rows.{end}", *kind) for end, kind in kinds.items()}


@dataclass(frozen=True)
class StorageItem:
    """Tables stored one after another, and their readers: path of an embedding, and its name for them."""

    tables: tuple[TableItem, ...]
    targets: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DenseItem:
    """A tensor of the state dict that is not a table: its name in the file, and its dtype once loaded."""

    tensor: str
    dtype: torch.dtype


@dataclass(frozen=True)
class ExportManifest:
    """A checked manifest.

    Args:
        model: ``kind`` is ``"embedding"``, ``"model"`` (with ``key``, ``num_dense``, ``params``) or ``"state"``.
        modules: the embedding modules.
        storages: their tables.
        dense: everything else by its key in the state dict.
        digests: SHA-256 of every tensor by its name.
        raw: the whole of it as JSON values.
    """

    model: Mapping[str, Any]
    modules: tuple[ModuleItem, ...]
    storages: tuple[StorageItem, ...]
    dense: Mapping[str, DenseItem]
    digests: Mapping[str, str]
    raw: Mapping[str, Any]


def item_to_dict(item: ModuleItem) -> dict[str, Any]:
    """JSON values of an embedding module."""
    return {"kind": item.kind, "paths": list(item.paths), "dtype": NAMES[item.dtype], **item.build}


def table_to_dict(part: Part, width: int, dtype: torch.dtype, errors: Sequence[float]) -> dict[str, Any]:
    """JSON values of a table; ``errors`` as :meth:`RoundingError.close` gives them."""
    return {
        "rows": part.rows,
        "width": width,
        "dtype": NAMES[dtype],
        "kind": part.layout.kind,
        "block": part.layout.block,
        "form": part.form,
        "start": part.start,
        "count": part.count,
        "columns": None if part.columns is None else list(part.columns),
        **dict(zip(("max_error", "rms_error", "rms"), errors, strict=True)),
    }


class _Checker:
    """Reads typed values from JSON; every violation raises a CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, where: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: its manifest, {where}: {why}")

    def get(self, data: Any, key: str, kind: Any, where: str) -> Any:
        value = data.get(key) if isinstance(data, dict) else None
        # True is an int to Python; a flag in a number's place is a fault.
        good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not good:
            kinds = getattr(kind, "__name__", str(kind))
            raise self.fail(where, f"`{key}` must be of type {kinds}; got {str(value)[:80]}")
        return value

    def texts(self, data: Any, key: str, where: str) -> tuple[str, ...]:
        value = self.get(data, key, list, where)
        if not value or not all(isinstance(v, str) for v in value):
            raise self.fail(where, f"`{key}` must be a list of texts; got {str(value)[:80]}")
        return tuple(value)

    def number(self, data: Any, key: str, low: int, high: int, where: str) -> int:
        value: int = self.get(data, key, int, where)
        if not low <= value <= high:
            raise self.fail(where, f"`{key}` must be in [{low}, {high}]; got {value}")
        return value

    def choice(self, data: Any, key: str, choices: Sequence[str], where: str) -> str:
        value: str = self.get(data, key, str, where)
        if value not in choices:
            raise self.fail(where, f"`{key}` must be one of {', '.join(choices)}; got {value[:40]!r}")
        return value


def read_manifest(file: ExportFile) -> ExportManifest:
    """The manifest of an opened file, consistent with its tensors.

    Raises:
        CheckpointError: of another version, or anything that does not fit; names it.
    """
    c, raw = _Checker(file.path), file.manifest
    version = raw.get("version") if isinstance(raw, dict) else None
    if type(version) is not int or version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{file.path} is of format version {str(version)[:20]}; this library reads version {MANIFEST_VERSION}: "
            "export it again, or load it with the library that wrote it"
        )
    for key, kind in _KEYS.items():
        c.get(raw, key, kind, "top")
    tables = {name: _table(c, name, item) for name, item in raw["tables"].items()}
    storages = tuple(_storage(c, i, item, tables) for i, item in enumerate(raw["storages"]))
    used = [t.name for s in storages for t in s.tables]
    if sorted(used) != sorted(tables):
        raise c.fail("storages", "every table must belong to one")
    dense = {}
    for key, item in raw["dense"].items():
        where = f"dense {key!r}"
        tensor = item.get("tensor", key) if isinstance(item, dict) else key
        if not isinstance(tensor, str):
            raise c.fail(where, f"`tensor` must be a text; got {str(tensor)[:80]}")
        dense[key] = DenseItem(tensor, DTYPES[c.choice(item, "dtype", list(DTYPES), where)])
    modules = tuple(_module(c, i, item) for i, item in enumerate(raw["modules"]))
    c.choice(raw["model"], "kind", ("embedding", "model", "state"), "model")
    _check_tensors(c, file, tables, dense, raw["sha256"])
    return ExportManifest(raw["model"], modules, storages, dense, raw["sha256"], raw)


def _table(c: _Checker, name: str, item: Any) -> TableItem:
    where = f"table {name!r}"
    rows = c.number(item, "rows", 1, 64 * MAX_ROWS, where)
    width = c.number(item, "width", 1, 1 << 20, where)
    kind = c.choice(item, "kind", [*FLOATS, *BITS], where)
    form = c.choice(item, "form", get_args(RowForm), where)
    count = c.number(item, "count", 1, rows, where)
    start = c.number(item, "start", 0, rows - count if form == "range" else 0, where)
    if form == "all" and count != rows:
        raise c.fail(where, f"`count` must be {rows}, all rows; got {count}")
    columns = item.get("columns")
    if columns is not None:
        whole = isinstance(columns, list) and all(type(n) is int for n in columns)
        if not whole or not columns or columns != sorted(set(columns)) or columns[0] < 0 or columns[-1] >= width:
            raise c.fail(where, f"`columns` must rise within [0, {width}); got {str(columns)[:80]}")
    kept = width if columns is None else len(columns)
    block = c.number(item, "block", 1, 1 << 16, where)
    layout = Layout(kind, kept, block)
    if kind in FLOATS and block != 1:
        raise c.fail(where, f"`block` must be 1 for {kind}; got {block}")
    dtype = DTYPES[c.choice(item, "dtype", [NAMES[t] for t in FLOATS.values()], where)]
    part = Part(rows, layout, form, start, count, None if columns is None else tuple(columns))  # type: ignore[arg-type]
    return TableItem(name, part, width, dtype)


def _storage(c: _Checker, i: int, item: Any, tables: Mapping[str, TableItem]) -> StorageItem:
    where = f"storage {i}"
    names = c.texts(item, "tables", where)
    unknown = [n for n in names if n not in tables]
    if unknown or len(set(names)) < len(names):
        raise c.fail(where, f"`tables` must name tables of the manifest, each once; got {str(names)[:80]}")
    targets = []
    for target in c.get(item, "targets", list, where):
        if not isinstance(target, list) or len(target) != 2 or not all(isinstance(t, str) for t in target):
            raise c.fail(where, f"`targets` must be pairs of texts; got {str(target)[:80]}")
        targets.append((target[0], target[1]))
    members = tuple(tables[n] for n in names)
    first = members[0]
    for t in members[1:]:
        if (t.width, t.dtype, t.part.layout.kind) != (first.width, first.dtype, first.part.layout.kind):
            raise c.fail(where, f"tables {first.name!r} and {t.name!r} differ in width, dtype or kind")
    return StorageItem(members, tuple(targets))


def _module(c: _Checker, i: int, item: Any) -> ModuleItem:
    where = f"module {i}"
    kind = c.choice(item, "kind", ("embedding", "collection"), where)
    paths = c.texts(item, "paths", where)
    dtype = DTYPES[c.choice(item, "dtype", [NAMES[t] for t in FLOATS.values()], where)]
    build = {k: v for k, v in item.items() if k not in ("kind", "paths", "dtype")}
    if kind == "collection":
        c.get(build, "schema", dict, where)
        c.get(build, "plan", dict, where)
        return ModuleItem(kind, paths, build, dtype)
    c.get(build, "spec", dict, where)
    c.get(build, "config", dict, where)
    c.get(build, "include_last_offset", bool, where)
    c.get(build, "stands_in", bool, where)
    for key, types in (("padding_idx", int), ("mode", str)):
        if key not in build or build[key] is not None:
            c.get(build, key, types, where)
    return ModuleItem(kind, paths, build, dtype)


def _check_tensors(
    c: _Checker,
    file: ExportFile,
    tables: Mapping[str, TableItem],
    dense: Mapping[str, DenseItem],
    digests: Mapping[str, Any],
) -> None:
    """Check that the manifest names every tensor of the file, with its dtype and shape."""
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for t in tables.values():
        layout = t.part.layout
        wanted[t.name] = (layout.dtype, (layout.stored_rows(t.part.count), layout.items))
        for name, dtype, shape in t.arrays().values():
            wanted[name] = (dtype, shape)
    spoken = {*wanted, *(item.tensor for item in dense.values())}
    if spoken != file.entries.keys() or spoken != digests.keys():
        odd = sorted((spoken ^ file.entries.keys()) | (spoken ^ digests.keys()))
        raise c.fail("tensors", f"manifest and file hold different ones: {', '.join(odd[:5])}")
    for name, (dtype, shape) in wanted.items():
        entry = file.entries[name]
        if DTYPES[entry.dtype] != dtype or entry.shape != shape:
            raise c.fail(
                f"table {name!r}",
                f"expected {NAMES[dtype]} {list(shape)}; the file has {entry.dtype} {list(entry.shape)}",
            )
    for name, digest in digests.items():
        if not isinstance(digest, str) or len(digest) != 64:
            raise c.fail(f"tensor {name!r}", f"its digest must be 64 digits; got {str(digest)[:80]}")
