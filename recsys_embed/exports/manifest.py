"""The manifest of an exported file: a versioned JSON object, checked against the tensors before any is read.

``version`` changes when a reader of the one before could not understand the file. Nothing in it names code: methods
and models stand by their registered keys, everything else is numbers and arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

import torch

from recsys_embed.core.id_sets import words_of
from recsys_embed.core.precision import FLOATS, Layout, Precision
from recsys_embed.data.serving.stored import check_about
from recsys_embed.errors import CheckpointError, ConfigError, raise_faults
from recsys_embed.exports.file_format import DTYPES, NAMES, ExportFile
from recsys_embed.exports.served_modules import ModuleItem
from recsys_embed.features import MAX_ROWS
from recsys_embed.kernels.stored_tables import Part, RowForm
from recsys_embed.utils.settings import FilePart, fault, param

MANIFEST_VERSION = 1
WITH_ENCODERS = 2
"""The version of files that hold encoders of raw rows."""

FloatName = Literal["F64", "F32", "F16", "BF16"]


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
        encoders: what turns raw rows into ids and numbers, or None.
    """

    model: Mapping[str, Any]
    modules: tuple[ModuleItem, ...]
    storages: tuple[StorageItem, ...]
    dense: Mapping[str, DenseItem]
    digests: Mapping[str, str]
    raw: Mapping[str, Any]
    encoders: Mapping[str, Any] | None = None


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


@dataclass(frozen=True)
class _Top(FilePart):
    written_by: Mapping[str, Any]
    precision: str
    search: str
    model: Mapping[str, Any]
    tables: Mapping[str, Any]
    dense: Mapping[str, Any]
    sha256: Mapping[str, Any]
    modules: tuple[Mapping[str, Any], ...] = param(MISSING, empty=True)
    storages: tuple[Mapping[str, Any], ...] = param(MISSING, empty=True)
    encoders: Mapping[str, Any] | None = None

    def conflicts(self) -> list[str]:
        wrong = {name: d for name, d in self.sha256.items() if not isinstance(d, str) or len(d) != 64}
        return [fault(f"sha256.{name:.80}", "64 digits", digest) for name, digest in list(wrong.items())[:5]]


@dataclass(frozen=True)
class _Model(FilePart):
    kind: Literal["embedding", "model", "state"]


@dataclass(frozen=True)
class _Table(FilePart):
    kind: Literal["fp64", Precision]
    form: RowForm
    dtype: FloatName
    rows: int = param(MISSING, low=1, high=64 * MAX_ROWS)
    width: int = param(MISSING, low=1, high=1 << 20)
    count: int = param(MISSING, low=1)
    start: int = param(MISSING, low=0)
    block: int = param(MISSING, low=1, high=1 << 16)
    columns: tuple[int, ...] | None = param(None, low=0)

    def conflicts(self) -> list[str]:
        faults = []
        if self.count > self.rows or (self.form == "all" and self.count < self.rows):
            faults.append(fault("count", f"{self.rows}, or less where `form` is not 'all'", self.count))
        most = self.rows - self.count if self.form == "range" else 0
        if self.start > most:
            faults.append(
                fault("start", f"at most {most} for {self.count} of {self.rows} rows, form {self.form!r}", self.start)
            )
        if self.kind in FLOATS and self.block != 1:
            faults.append(fault("block", f"1 for {self.kind}", self.block))
        columns = self.columns
        if columns is not None and (columns[-1] >= self.width or list(columns) != sorted(set(columns))):
            faults.append(fault("columns", f"ascending and below {self.width}", columns))
        return faults

    def item(self, name: str) -> TableItem:
        layout = Layout(self.kind, self.width if self.columns is None else len(self.columns), self.block)
        part = Part(self.rows, layout, self.form, self.start, self.count, self.columns)
        return TableItem(name, part, self.width, DTYPES[self.dtype])


@dataclass(frozen=True)
class _Storage(FilePart):
    tables: tuple[str, ...]
    targets: tuple[tuple[str, str], ...] = param(MISSING, empty=True)


@dataclass(frozen=True)
class _Dense(FilePart):
    dtype: str
    tensor: str | None = None

    def conflicts(self) -> list[str]:
        return [] if self.dtype in DTYPES else [fault("dtype", f"one of {', '.join(DTYPES)}", self.dtype)]


@dataclass(frozen=True)
class _Module(FilePart):
    kind: Literal["embedding", "collection"]
    paths: tuple[str, ...]
    dtype: FloatName


@dataclass(frozen=True)
class _Collection(_Module):
    schema: Mapping[str, Any]
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class _Embedding(_Module):
    spec: Mapping[str, Any]
    config: Mapping[str, Any]
    include_last_offset: bool
    stands_in: bool
    padding_idx: int | None
    mode: str | None
    added: tuple[str, ...] = param((), empty=True)


def read_manifest(file: ExportFile) -> ExportManifest:
    """The manifest of an opened file, consistent with its tensors.

    Raises:
        CheckpointError: of another version, or anything that does not fit; names it.
    """
    raw = file.manifest
    version = raw.get("version") if isinstance(raw, dict) else None
    if type(version) is not int or version not in (MANIFEST_VERSION, WITH_ENCODERS):
        raise CheckpointError(
            f"{file.path} is of format version {str(version)[:20]}; this library reads versions {MANIFEST_VERSION} and "
            f"{WITH_ENCODERS}: export it again, or load it with the library that wrote it"
        )
    try:
        return _checked(file, raw)
    except ConfigError as e:
        raise CheckpointError(f"{file.path} is damaged: {e}") from e


def _checked(file: ExportFile, raw: Any) -> ExportManifest:
    top = _Top.read(raw, "manifest, top")
    _Model.read(top.model, "manifest, model")
    tables = {name: _Table.read(item, f"manifest, table {name!r}").item(name) for name, item in top.tables.items()}
    storages = tuple(_storage(i, item, tables) for i, item in enumerate(top.storages))
    if sorted(t.name for s in storages for t in s.tables) != sorted(tables):
        raise ConfigError("every table must belong to one storage (manifest, storages)")
    dense = {}
    for key, item in top.dense.items():
        values = _Dense.read(item, f"manifest, dense {key!r}")
        dense[key] = DenseItem(key if values.tensor is None else values.tensor, DTYPES[values.dtype])
    modules = tuple(_module(i, item) for i, item in enumerate(top.modules))
    shapes = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    encoders = set() if top.encoders is None else check_about(top.encoders, shapes)
    _check_tensors(file, tables, dense, top.sha256, encoders)
    return ExportManifest(top.model, modules, storages, dense, top.sha256, raw, top.encoders)


def _storage(i: int, item: Any, tables: Mapping[str, TableItem]) -> StorageItem:
    values = _Storage.read(item, f"manifest, storage {i}")
    names = values.tables
    if not tables.keys() >= set(names) or len(set(names)) < len(names):
        raise_faults([fault("tables", "names of the manifest's tables, each once", names)], values.where())
    members = tuple(tables[n] for n in names)
    first = members[0]
    for t in members[1:]:
        if (t.width, t.dtype, t.part.layout.kind) != (first.width, first.dtype, first.part.layout.kind):
            raise_faults([f"tables {first.name!r} and {t.name!r} differ in width, dtype or kind"], values.where())
    return StorageItem(members, values.targets)


def _module(i: int, item: Any) -> ModuleItem:
    kind = _Module.read(item, f"manifest, module {i}").kind
    values = (_Collection if kind == "collection" else _Embedding).read(item, f"manifest, module {i}")
    build = {k: v for k, v in item.items() if k not in ("kind", "paths", "dtype")}
    if isinstance(values, _Collection) and not values.plan.keys() <= {"version", "features"}:
        # What indexes hold is among the tensors, so a plan that says it again would only cost time and memory.
        raise_faults([fault("plan", "`version` and `features`", sorted(values.plan))], values.where())
    return ModuleItem(kind, values.paths, build, DTYPES[values.dtype])


def _check_tensors(
    file: ExportFile,
    tables: Mapping[str, TableItem],
    dense: Mapping[str, DenseItem],
    digests: Mapping[str, Any],
    encoders: set[str],
) -> None:
    """Check that the manifest names every tensor of the file, with its dtype and shape."""
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for t in tables.values():
        layout = t.part.layout
        wanted[t.name] = (layout.dtype, (layout.stored_rows(t.part.count), layout.items))
        for name, dtype, shape in t.arrays().values():
            wanted[name] = (dtype, shape)
    spoken = {*wanted, *(item.tensor for item in dense.values()), *encoders}
    if spoken != file.entries.keys() or spoken != digests.keys():
        odd = sorted((spoken ^ file.entries.keys()) | (spoken ^ digests.keys()))
        raise ConfigError(f"manifest and file hold different tensors: {', '.join(odd[:5])}")
    for name, (dtype, shape) in wanted.items():
        entry = file.entries[name]
        if DTYPES[entry.dtype] != dtype or entry.shape != shape:
            raise ConfigError(
                f"expected {NAMES[dtype]} {list(shape)}; the file has {entry.dtype} {list(entry.shape)} "
                f"(manifest, table {name!r})"
            )
