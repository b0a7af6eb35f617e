"""Load an exported file as a module that serves it; no code in the file is executed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.id_sets import is_bitmap, rises_within
from recsys_embed.core.index import IndexArrays
from recsys_embed.discover import join_path
from recsys_embed.errors import BackendError, CheckpointError, unknown_name
from recsys_embed.exports.cached_rows import cache_rows
from recsys_embed.exports.earlier_files import with_tables_of_modules
from recsys_embed.exports.encoders import scorer_of
from recsys_embed.exports.file_format import ExportFile
from recsys_embed.exports.fill_model import ModelFiller
from recsys_embed.exports.manifest import ExportManifest, StorageItem, TableItem, read_manifest
from recsys_embed.exports.served_modules import (
    ADDED,
    ModuleItem,
    build_model,
    build_module,
    count_row_lookups,
    name_backends,
    parameter_name,
    put_tables,
    refusals,
    row_tables,
)
from recsys_embed.kernels import fbgemm
from recsys_embed.kernels.derived_tensors import recreate_derived_tensors
from recsys_embed.kernels.stored_tables import Stored, too_many_columns
from recsys_embed.models.base import CTRModel
from recsys_embed.plan import MAX_ROW_LOOKUPS
from recsys_embed.utils.types import JSONMapping

Backend = Literal["auto", "torch", "fbgemm"]
_PLACES = 64 << 20  # bytes of FBGEMM's table of remapped indices that any file may take
_CPU = torch.device("cpu")


def load(
    path: str | Path,
    into: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    verify: bool = True,
    mmap: bool = True,
    backend: Backend = "auto",
    cached_rows: str | int | None = None,
) -> nn.Module:
    """The module that :func:`recsys_embed.export` wrote, in evaluation mode, with the outputs of its source.

    Needs torch and numpy only. Tables stay in the file and are read as they are used; do not change the file in place
    while a loaded module lives (exporting to it again is safe: that makes a new one).

    Args:
        path: the file.
        into: the model to fill, freshly built (on any device, the meta device included), for files of models that the
            library does not know: embeddings at the paths of the source's are replaced by those of the file, and
            every other tensor is loaded.
        device: where the module goes; by default the CPU, or where ``into`` is.
        verify: compare every tensor with its digest; False skips reading a huge file once more, and checks its
            structure only.
        mmap: map the file into memory, where processes share it: on huge pages where the file cache of the system holds
            the file on them (Linux 6.16 and later, ext4 or XFS, a file that ``export`` wrote there or that is read from
            disk for the first time). False reads it whole into memory of this process, on huge pages of any Linux:
            lookups in large tables are up to twice as fast as from small pages.
        backend: what decodes rows on the CPU. ``"auto"``: the compiled kernels where all rows are kept, else FBGEMM for
            quantised rows where it is installed. ``"torch"``: the same numbers, slower. ``"fbgemm"``: its inference
            tables for all precisions but bf16, with its table of remapped indices, 4 bytes per row, for tables with
            pruned rows; rows narrower than 8 that share scales, and those of tables with pruned columns, are decoded by
            torch. The ``backend`` of a loaded collection is the one that reads its rows.
        cached_rows: bytes, such as ``"64MiB"``, that keep the computed rows (of methods ``tt`` and ``dhe``, and of
            ``compositional`` with combine ``"path"``) of the ids that are looked up most, shared equally by the
            features that compute; see :class:`recsys_embed.kernels.row_cache.RowCache`. Rows are those that the module
            computes, bit for bit where a row does not depend on the batch beside it, as products of torch's matrices
            (``dhe``) may in their last bits. Compiled models compute all rows.

    Returns:
        The module; ``into`` where it was given. A model whose file holds encoders scores raw rows by its ``predict``.

    Raises:
        CheckpointError: absent, damaged (says what: tensor, expected, got), of another version, or ``into`` is missing
            or does not fit (all faults at once).
        ConfigError: ``cached_rows`` is no size, is too small for rows, or nothing in the file computes rows.
        BackendError: FBGEMM is asked for and can read no table of the file.
        MissingDependencyError: FBGEMM is asked for and cannot be imported.
    """
    file = ExportFile(path, mmap)
    manifest = read_manifest(file)
    if verify:
        file.verify(manifest.digests)
    if backend not in get_args(Backend):
        raise unknown_name("backend", str(backend), get_args(Backend))
    with _naming(file.path):
        root = _loaded(_Loader(file, manifest, backend), into)
        name_backends(root)
        if manifest.encoders is not None and isinstance(root, CTRModel):
            root.scorer = scorer_of(file, manifest.encoders)
    if device is None and into is not None:
        device = next((p.device for p in into.parameters() if not p.is_meta and p.device.type != "cpu"), None)
    if device is not None:
        root.to(device)
    if cached_rows is not None:
        cache_rows(root, cached_rows)
    return root.eval()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Prepend the file's name to every CheckpointError."""
    try:
        yield
    except CheckpointError as e:
        if str(path) in str(e):
            raise
        raise CheckpointError(f"{path}: {e}") from e


def _loaded(loader: _Loader, into: nn.Module | None) -> nn.Module:
    file, manifest = loader.file, loader.manifest
    kind = manifest.model["kind"]
    if into is None and kind == "state":
        raise CheckpointError(
            f"{file.path} holds a model of class {str(manifest.model.get('class'))[:80]!r}, which the library cannot "
            "build; build it as you did for training and call load(path, into=model)"
        )
    if into is None:
        return loader.build()
    if kind == "embedding":
        raise CheckpointError(f"{file.path} holds a single embedding; call load(path) without `into`")
    return ModelFiller(file, manifest, loader.tables, loader.modules, loader.dense).fill(into)


def verify(path: str | Path) -> JSONMapping:
    """Check an exported file as ``load`` does, every byte of it, and return its manifest.

    Raises:
        CheckpointError: says what is wrong.
    """
    file = ExportFile(path)
    manifest = read_manifest(file)
    file.verify(manifest.digests)
    with _naming(file.path):
        loader = _Loader(file, manifest, "torch")
        if manifest.model["kind"] == "state":
            loader.modules()
        else:
            loader.build()
    return manifest.raw


class _Loader:
    def __init__(self, file: ExportFile, manifest: ExportManifest, backend: Backend) -> None:
        self.file, self.manifest, self.backend = file, manifest, backend
        # Asked for by name, torch and FBGEMM read rows in place of the compiled kernels.
        self.kernels = "auto" if backend == "auto" else "torch"
        self.tables: dict[str, dict[str, nn.Parameter | Stored]] = {}
        self.read: set[str] = set()  # paths of embeddings that have been found to read them
        row_lookups = 0
        for item in manifest.modules:
            row_lookups += count_row_lookups(item)
            # Those of one module are bounded by the plan; a file of many modules has the text to describe them.
            if row_lookups > MAX_ROW_LOOKUPS + file.header_size // 16:
                raise self._unfit(f"its embeddings read more than {row_lookups} rows for one id of each feature")
        for storage in with_tables_of_modules(manifest.storages, manifest.modules):
            values = self._storage(storage)
            for path, name in storage.targets:
                if name in self.tables.setdefault(path, {}):
                    raise self._unfit(f"{name!r} at {path!r} is to be filled twice")
                self.tables[path][name] = values
        stored = [v for row in self.tables.values() for v in row.values() if isinstance(v, Stored)]
        if backend == "fbgemm" and self.tables and not any(v.read_by_fbgemm for v in stored):
            raise BackendError(
                f"backend 'fbgemm' can read no table of {file.path}: it reads whole rows of fp32, fp16, int8, int4 "
                "and int2 that do not share scales; use backend 'auto', or export with another precision"
            )

    def _unfit(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path} is damaged: its manifest contradicts itself: {why}")

    # -- tables -----------------------------------------------------------------------------------------------------

    def _storage(self, storage: StorageItem) -> nn.Parameter | Stored:
        first, parts = storage.tables[0], [t.part for t in storage.tables]
        names = [t.name for t in storage.tables]
        if too_many_columns(parts):
            raise self._unfit(f"the columns kept of {len(parts)} tables with {first.name!r} take more than their rows")
        # Tables that earlier versions stored apart do not stand end to end.
        together = storage in self.manifest.storages
        data = self.file.run(names) if together else torch.cat([self.file.run([n]) for n in names])
        whole = all(p.form == "all" and p.columns is None for p in parts)
        if whole and data.dtype == first.dtype and not (self.backend == "fbgemm" and fbgemm.usable(parts[0].layout)):
            # Nothing to decode: the very parameter that the source reads.
            return nn.Parameter(data.view(-1, first.width), requires_grad=False)
        rows = sum(p.rows for p in parts)
        if self.backend == "fbgemm" and 4 * rows > _PLACES + 64 * data.nbytes and any(p.form != "all" for p in parts):
            raise BackendError(
                f"backend 'fbgemm' takes {format_bytes(4 * rows)} to say where {rows} rows of {first.name!r} are, of "
                f"which {format_bytes(data.nbytes)} are stored; use backend 'auto'"
            )
        arrays: dict[str, list[Tensor]] = {"words": [], "ranks": [], "values": []}
        for table in storage.tables:
            for end, values in self._index(table).items():
                arrays[end].append(values)
        longest = max((p.count for p in parts if p.form == "sorted"), default=0)
        kinds = {"words": torch.int64, "ranks": torch.int32, "values": torch.int32}
        held = {end: _joined(arrays[end], kind) for end, kind in kinds.items()}
        return Stored(parts, first.width, data, IndexArrays(held, longest), first.dtype, self.backend)

    def _index(self, table: TableItem) -> dict[str, Tensor]:
        """The arrays that know a table's kept rows; what they hold is checked, for rows beyond the table."""
        found = {end: self.file.tensor(name) for end, (name, _, _) in table.arrays().items()}
        good = True
        if table.part.form == "bitmap":
            good = is_bitmap(found["words"], found["ranks"], table.part.rows, table.part.count)
        elif table.part.form == "sorted":
            good = rises_within(found["values"], table.part.rows)
        if not good:
            raise CheckpointError(
                f"{self.file.path} is damaged: tensors '{table.name}.rows.*' do not tell {table.part.count} of "
                f"{table.part.rows} rows"
            )
        return found

    # -- modules ----------------------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """The root that the manifest describes."""
        manifest = self.manifest
        if manifest.model["kind"] == "embedding":
            roots = [item for item in manifest.modules if "" in item.paths]
            if len(roots) != 1 or len(manifest.modules) != 1:
                raise self._unfit("it should hold one embedding")
            module = self._module(roots[0], self.manifest.dense.keys())
            self._check_read()
            return module
        collections = {item.paths[0]: item for item in manifest.modules if item.kind == "collection"}
        sizes = {key: self.file.entries[item.tensor].shape for key, item in manifest.dense.items()}
        root: nn.Module = build_model(manifest.model, collections, sizes, self.kernels)
        self._finish(root, ("",), manifest.dense.keys())
        self._check_read()
        return root

    def modules(self) -> dict[int, nn.Module]:
        """Every embedding module, by its index in the manifest."""
        out = {}
        for i, item in enumerate(self.manifest.modules):
            prefix = f"{item.paths[0]}." if item.paths[0] else ""
            out[i] = self._module(item, [k for k in self.manifest.dense if k.startswith(prefix)])
        self._check_read()
        return out

    def _check_read(self) -> None:
        unread = sorted(self.tables.keys() - self.read)
        if unread:
            raise self._unfit(f"it fills tables at {unread[:5]}, where it has no embedding")

    def _module(self, item: ModuleItem, keys: Iterable[str]) -> nn.Module:
        module = build_module(item, self.kernels)
        for name in item.build.get(ADDED, ()):
            key = join_path(item.paths[0], name)
            if key not in self.manifest.dense or hasattr(module, name) or not name.isidentifier():
                raise self._unfit(f"{item.paths[0]!r} is to have a tensor {name!r} of the user's")
            shape, dtype = self.file.entries[self.manifest.dense[key].tensor].shape, self.manifest.dense[key].dtype
            module.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self._finish(module, item.paths, keys)
        return module

    def _finish(self, root: nn.Module, paths: Sequence[str], keys: Iterable[str]) -> None:
        """Fill a module that stands at ``paths``: tables, then the tensors of the state dict under ``keys``."""
        path = paths[0]
        where = f"{type(root).__name__} at {path!r}"
        filled = set()
        for inner, module in list(root.named_modules()):
            wanted = row_tables(module)
            if not wanted:
                continue
            full = join_path(path, inner)
            given = self.tables.get(full, {})
            self.read |= {join_path(p, inner) for p in paths}
            if wanted.keys() != given.keys():
                raise self._unfit(f"{where} reads {sorted(wanted)} at {full!r}; the file fills {sorted(given)}")
            for name, (rows, width) in wanted.items():
                have = _shape(given[name])
                if have != (rows, width):
                    raise self._unfit(
                        f"{where}: {name!r} has {rows} x {width} elements; the file {have[0]} x {have[1]}"
                    )
            put_tables(module, given)
            names = [parameter_name(module, name) for name in given]
            filled |= {join_path(inner, name) for name in names}
        prefix = len(path) + 1 if path else 0
        state = {key[prefix:]: self.dense(key) for key in keys}
        with refusals(where):
            missing, unexpected = root.load_state_dict(state, strict=False, assign=True)
        if unexpected:
            raise self._unfit(f"{where} has no {', '.join(unexpected[:5])}")
        lacking = [k for k in missing if k not in filled and not k.endswith("_extra_state") and "served." not in k]
        if lacking:
            raise self._unfit(f"{where}: the file does not fill {', '.join(lacking[:5])}")
        recreate_derived_tensors(root, _CPU)
        root.requires_grad_(False)
        empty = [k for k, v in [*root.named_parameters(), *root.named_buffers()] if v.is_meta]
        if empty:
            raise self._unfit(f"{where}: the file does not fill {', '.join(empty[:5])}")

    def dense(self, key: str) -> Tensor:
        """The tensor of a key in the state dict."""
        item = self.manifest.dense[key]
        # A copy, so that a model can be trained on without touching pages of the file.
        return self.file.tensor(item.tensor).to(item.dtype, copy=True)


def _joined(arrays: list[Tensor], kind: torch.dtype) -> Tensor:
    if not arrays:
        return torch.zeros(0, dtype=kind)
    return arrays[0] if len(arrays) == 1 else torch.cat(arrays)


def _shape(values: nn.Parameter | Stored) -> tuple[int, int]:
    return (values.rows, values.width) if isinstance(values, Stored) else cast("tuple[int, int]", tuple(values.shape))
