"""Load an exported file as a module that serves it; no code in the file is executed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from recsys_embed.core.id_sets import popcount, ranks_of, words_of
from recsys_embed.core.index import IndexArrays
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import CheckpointError, raise_faults, unknown_name
from recsys_embed.exports.earlier_files import with_tables_of_modules
from recsys_embed.exports.file_format import ExportFile
from recsys_embed.exports.manifest import ExportManifest, StorageItem, TableItem, read_manifest
from recsys_embed.exports.served_modules import (
    ModuleItem,
    build_model,
    build_module,
    put_tables,
    refusals,
    revive,
    row_tables,
)
from recsys_embed.kernels.stored_tables import Stored
from recsys_embed.methods.full import FullConfig
from recsys_embed.utils.types import JSONMapping

Backend = Literal["auto", "torch", "fbgemm"]
_CPU = torch.device("cpu")


def load(
    path: str | Path,
    into: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    verify: bool = True,
    mmap: bool = True,
    backend: Backend = "auto",
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
        mmap: map the file into memory; False reads it whole.
        backend: what decodes rows on the CPU. ``"auto"``: the compiled kernels where all rows are kept, else FBGEMM for
            quantised rows where it is installed. ``"torch"``: the same numbers, slower. ``"fbgemm"``: its inference
            tables for all precisions but bf16, with its table of remapped indices, 4 bytes per row, for tables with
            pruned rows; rows narrower than 8 that share scales, and those of tables with pruned columns, are decoded by
            torch.

    Returns:
        The module; ``into`` where it was given.

    Raises:
        CheckpointError: absent, damaged (says what: tensor, expected, got), of another version, or ``into`` is missing
            or does not fit (all faults at once).
    """
    file = ExportFile(path, mmap)
    manifest = read_manifest(file)
    if verify:
        file.verify(manifest.digests)
    if backend not in get_args(Backend):
        raise unknown_name("backend", str(backend), get_args(Backend))
    with _naming(file.path):
        root = _loaded(_Loader(file, manifest, backend), into)
    if device is None and into is not None:
        device = next((p.device for p in into.parameters() if not p.is_meta and p.device.type != "cpu"), None)
    if device is not None:
        root.to(device)
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
    return loader.fill(into)


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
        self.tables: dict[str, dict[str, nn.Parameter | Stored]] = {}
        self.read: set[str] = set()  # paths of embeddings that have been found to read them
        for storage in with_tables_of_modules(manifest.storages, manifest.modules):
            values = self._storage(storage)
            for path, name in storage.targets:
                if name in self.tables.setdefault(path, {}):
                    raise self._unfit(f"{name!r} at {path!r} is to be filled twice")
                self.tables[path][name] = values

    def _unfit(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path} is damaged: its manifest contradicts itself: {why}")

    # -- tables -----------------------------------------------------------------------------------------------------

    def _storage(self, storage: StorageItem) -> nn.Parameter | Stored:
        first, parts = storage.tables[0], [t.part for t in storage.tables]
        names = [t.name for t in storage.tables]
        # Tables that earlier versions stored apart do not stand end to end.
        together = storage in self.manifest.storages
        data = self.file.run(names) if together else torch.cat([self.file.run([n]) for n in names])
        if all(p.form == "all" and p.columns is None for p in parts) and data.dtype == first.dtype:
            # Nothing to decode: the very parameter that the source reads.
            return nn.Parameter(data.view(-1, first.width), requires_grad=False)
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
            words, size = found["words"], table.part.rows
            rest = words_of(size) * 64 - size
            beyond = int(words[-1]) >> (64 - rest) if rest else 0
            whole = int(popcount(words).sum()) == table.part.count
            good = whole and beyond == 0 and bool((ranks_of(words) == found["ranks"]).all())
        elif table.part.form == "sorted":
            values = found["values"]
            good = bool((values.diff() > 0).all()) and int(values[0]) >= 0 and int(values[-1]) < table.part.rows
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
        root: nn.Module = build_model(manifest.model, collections, sizes)
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
        module = build_module(item)
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
            full = _joined_path(path, inner)
            given = self.tables.get(full, {})
            self.read |= {_joined_path(p, inner) for p in paths}
            if wanted.keys() != given.keys():
                raise self._unfit(f"{where} reads {sorted(wanted)} at {full!r}; the file fills {sorted(given)}")
            for name, (rows, width) in wanted.items():
                have = _shape(given[name])
                if have != (rows, width):
                    raise self._unfit(
                        f"{where}: {name!r} has {rows} x {width} elements; the file {have[0]} x {have[1]}"
                    )
            put_tables(module, given)
            filled |= {f"{inner}.{name}" if inner else name for name in given}
        prefix = len(path) + 1 if path else 0
        state = {key[prefix:]: self._dense(key) for key in keys}
        with refusals(where):
            missing, unexpected = root.load_state_dict(state, strict=False, assign=True)
        if unexpected:
            raise self._unfit(f"{where} has no {', '.join(unexpected[:5])}")
        lacking = [k for k in missing if k not in filled and not k.endswith("_extra_state") and "served." not in k]
        if lacking:
            raise self._unfit(f"{where}: the file does not fill {', '.join(lacking[:5])}")
        revive(root, _CPU)
        root.requires_grad_(False)
        empty = [k for k, v in [*root.named_parameters(), *root.named_buffers()] if v.is_meta]
        if empty:
            raise self._unfit(f"{where}: the file does not fill {', '.join(empty[:5])}")

    def _dense(self, key: str) -> Tensor:
        item = self.manifest.dense[key]
        # A copy, so that a model can be trained on without touching pages of the file.
        return self.file.tensor(item.tensor).to(item.dtype, copy=True)

    # -- somebody else's model --------------------------------------------------------------------------------------

    def fill(self, model: nn.Module) -> nn.Module:
        """Put embeddings and every other tensor of the file into ``model``; nothing is changed unless all of it fits.

        Raises:
            CheckpointError: all that does not fit.
        """
        items = self.manifest.modules
        here = dict(model.named_modules(remove_duplicate=False))
        inside = tuple(f"{path}." for item in items for path in item.paths)
        faults = [
            fault
            for item in items
            for path in item.paths
            for fault in _place_faults(path, item, here.get(path), self.tables.get(path, {}))
        ]
        held = {k: v for k, v in model.state_dict(keep_vars=True).items() if not k.startswith(inside)}
        held = {k: v for k, v in held.items() if isinstance(v, Tensor)}
        given = {k: item for k, item in self.manifest.dense.items() if not k.startswith(inside)}
        faults += [f"the model has {k!r}, which the file lacks" for k in held if k not in given]
        faults += [f"the file has {k!r}, which the model lacks" for k in given if k not in held]
        for key in given.keys() & held.keys():
            shape, dtype = self.file.entries[given[key].tensor].shape, given[key].dtype
            if tuple(held[key].shape) != shape or held[key].dtype != dtype:
                ours = f"{held[key].dtype} {list(held[key].shape)}"
                faults.append(f"{key!r} is {ours} in the model, {dtype} {list(shape)} in the file")
        raise_faults(sorted(faults), f"load of {self.file.path}", CheckpointError)
        modules = {i: m for i, m in self.modules().items() if not _stays(items[i], here, self.tables)}
        for i, item in enumerate(items):
            for path in item.paths:
                if i in modules:
                    parent, _, name = path.rpartition(".")
                    here[parent]._modules[name] = modules[i]
                else:
                    put_tables(here[path], self.tables[path])
        state = {key: self._dense(key) for key in given}
        assign = any(v.is_meta for v in held.values())
        with refusals(f"{type(model).__name__}, filled from {self.file.path}"):
            model.load_state_dict(state, strict=False, assign=assign)
        if assign:
            _tie(model, {k: held[k] for k in given})
        return model


def _tie(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Tie parameters again that were tied before new ones were assigned."""
    first: dict[int, str] = {}
    for key, tensor in before.items():
        known = first.setdefault(id(tensor), key)
        if known != key and isinstance(tensor, nn.Parameter):
            parent, _, name = key.rpartition(".")
            model.get_submodule(parent)._parameters[name] = model.get_parameter(known)


def _joined_path(path: str, inner: str) -> str:
    return f"{path}.{inner}" if path and inner else path or inner


def _joined(arrays: list[Tensor], kind: torch.dtype) -> Tensor:
    if not arrays:
        return torch.zeros(0, dtype=kind)
    return arrays[0] if len(arrays) == 1 else torch.cat(arrays)


def _shape(values: nn.Parameter | Stored) -> tuple[int, int]:
    return (values.rows, values.width) if isinstance(values, Stored) else cast("tuple[int, int]", tuple(values.shape))


def _stays(item: ModuleItem, here: Mapping[str, nn.Module], tables: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether torch's own modules keep their places: the source had such there, and what they get is a plain table.

    With ``max_norm`` they would change rows that are read, and the file's are of that norm already.
    """
    plain = item.build.get("config") == FullConfig().to_dict() and item.build["spec"].get("unseen") is None
    return plain and all(
        isinstance(here[path], nn.Embedding | nn.EmbeddingBag)
        and getattr(here[path], "max_norm", None) is None
        and isinstance(tables[path].get("weight"), Tensor)
        for path in item.paths
    )


def _place_faults(
    path: str, item: ModuleItem, module: nn.Module | None, tables: Mapping[str, nn.Parameter | Stored]
) -> list[str]:
    """Faults because of which an embedding of the file cannot replace ``module``."""
    if module is None:
        return [f"the model has no module {path!r}, where the file has an embedding"]
    if item.kind == "collection":
        if type(module).__name__ != "EmbeddingCollection":
            return [f"{path!r} is a {type(module).__name__} in the model, an EmbeddingCollection in the file"]
        return []
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag | CompressedEmbedding):
        return [f"{path!r} is a {type(module).__name__} in the model, an embedding in the file"]
    spec = item.build["spec"]
    wanted = (spec.get("num_embeddings"), spec.get("embedding_dim"), item.build["mode"])
    found = (module.num_embeddings, module.embedding_dim, getattr(module, "mode", None))
    if wanted != found:
        return [
            f"{path!r} is {found[0]} x {found[1]}, mode {found[2]}; in the file {wanted[0]} x {wanted[1]}, {wanted[2]}"
        ]
    return []
