"""Load an exported file as a module that serves it; no code in the file is executed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from recsys_embed.collection.optimizer_state import weights_of
from recsys_embed.compress.exchange import ModuleExchange, ReversibleChange, apply_all
from recsys_embed.compress.inplace import adapt_to_libraries
from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.id_sets import is_bitmap, rises_within
from recsys_embed.core.index import IndexArrays
from recsys_embed.discover import unwrapped
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.plain_table import PlainTable
from recsys_embed.embedding.tied_linear import tied_output
from recsys_embed.errors import BackendError, CheckpointError, raise_faults, unknown_name
from recsys_embed.exports.earlier_files import with_tables_of_modules
from recsys_embed.exports.file_format import ExportFile
from recsys_embed.exports.manifest import ExportManifest, StorageItem, TableItem, read_manifest
from recsys_embed.exports.served_modules import (
    ADDED,
    ModuleItem,
    build_model,
    build_module,
    count_row_lookups,
    name_backends,
    output_layers,
    parameter_name,
    put_tables,
    refusals,
    row_tables,
)
from recsys_embed.kernels import fbgemm
from recsys_embed.kernels.derived_tensors import recreate_derived_tensors
from recsys_embed.kernels.stored_tables import Stored, too_many_columns
from recsys_embed.methods.full import FullConfig
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
            torch. The ``backend`` of a loaded collection is the one that reads its rows.

    Returns:
        The module; ``into`` where it was given.

    Raises:
        CheckpointError: absent, damaged (says what: tensor, expected, got), of another version, or ``into`` is missing
            or does not fit (all faults at once).
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
                f"backend 'fbgemm' can read no table of {file.path}: it reads whole rows of fp32, fp16, int8 and int4 "
                "that do not share scales; use backend 'auto', or export with another precision"
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
            key = f"{item.paths[0]}.{name}" if item.paths[0] else name
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
            names = [parameter_name(module, name) for name in given]
            filled |= {f"{inner}.{name}" if inner else name for name in names}
        prefix = len(path) + 1 if path else 0
        state = {key[prefix:]: self._dense(key) for key in keys}
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
        model, given_model = unwrapped(model), model
        items = self.manifest.modules
        here = dict(model.named_modules(remove_duplicate=False))
        inside = tuple(f"{path}." for item in items for path in item.paths)
        faults = [
            fault
            for item in items
            for path in item.paths
            for fault in _place_faults(path, item, here.get(path), self.tables.get(path, {}))
        ]
        held = {k: v for k, v in weights_of(model, keep_vars=True).items() if not k.startswith(inside)}
        given = {k: item for k, item in self.manifest.dense.items() if not k.startswith(inside)}
        layers = output_layers(model, here, items, given)
        computed = {_joined_path(path, "weight") for path, module in here.items() if module in layers}
        held = {k: v for k, v in held.items() if isinstance(v, Tensor) and k not in computed}
        faults += [f"the model has {k!r}, which the file lacks" for k in held if k not in given]
        faults += [f"the file has {k!r}, which the model lacks" for k in given if k not in held]
        for key in given.keys() & held.keys():
            shape, dtype = self.file.entries[given[key].tensor].shape, given[key].dtype
            if tuple(held[key].shape) != shape or held[key].dtype != dtype:
                ours = f"{held[key].dtype} {list(held[key].shape)}"
                faults.append(f"{key!r} is {ours} in the model, {dtype} {list(shape)} in the file")
        raise_faults(sorted(faults), f"load of {self.file.path}", CheckpointError)
        scored = set(layers.values())
        modules = {i: m for i, m in self.modules().items() if i in scored or not _stays(items[i], here, self.tables, m)}
        scoring = {layer: tied_output(layer, modules[i]) for layer, i in layers.items()}
        references = self._references(model, here, modules, scoring)
        for i, item in enumerate(items):
            for path in item.paths:
                if i in modules:
                    parent, _, name = path.rpartition(".")
                    here[parent]._modules[name] = modules[i]
                else:
                    put_tables(here[path], self.tables[path])
                    own = {name: self._dense(f"{path}.{name}") for name in item.build.get(ADDED, ())}
                    here[path].load_state_dict(own, strict=False)
        for path, layer in here.items():
            if layer in scoring:
                parent, _, name = path.rpartition(".")
                here[parent]._modules[name] = scoring[layer]
        state = {key: self._dense(key) for key in given}
        assign = any(v.is_meta for v in held.values())
        with refusals(f"{type(model).__name__}, filled from {self.file.path}"):
            model.load_state_dict(state, strict=False, assign=assign)
        if assign:
            _tie(model, {k: held[k] for k in given})
        apply_all(references)
        adapt_to_libraries(model)
        return given_model

    def _references(
        self,
        model: nn.Module,
        here: Mapping[str, nn.Module],
        modules: Mapping[int, nn.Module],
        scoring: Mapping[nn.Module, nn.Module],
    ) -> list[ReversibleChange]:
        """Changes to attributes, lists and dictionaries of ``model`` that hold embeddings or their weights as well.

        Raises:
            CheckpointError: names those that cannot be changed and would go on reading the old tables.
        """
        replaced: dict[int, nn.Module] = {id(layer): new for layer, new in scoring.items()}
        parameters: dict[int, list[nn.Parameter]] = {}
        names: dict[int, str] = dict.fromkeys(replaced, "output layer")
        interchangeable: set[int] = set()
        readable: dict[int, nn.Module] = {}
        for i, item in enumerate(self.manifest.modules):
            for path in item.paths:
                old = here[path]
                if i in modules:
                    replaced[id(old)] = modules[i]
                    fresh = list(modules[i].parameters())
                else:
                    fresh = [v for v in self.tables[path].values() if isinstance(v, nn.Parameter)]
                for at, parameter in enumerate(old.parameters()):
                    parameters[id(parameter)] = fresh if at == 0 else []
                    if i not in modules and [p.shape for p in fresh] == [parameter.shape]:
                        interchangeable.add(id(parameter))
                    names[id(parameter)] = path
                    if at == 0 and isinstance(modules.get(i), CompressedEmbedding):
                        readable[id(parameter)] = modules[i]
                names[id(old)] = path
        exchange = _ServedExchange(replaced, parameters, names)
        exchange.interchangeable, exchange.readable = interchangeable, readable
        changes = exchange.in_containers(model)
        raise_faults(exchange.faults, f"load of {self.file.path}", CheckpointError)
        for sentence in exchange.part_searched():
            warnings.warn(sentence, stacklevel=5)
        return changes


class _ServedExchange(ModuleExchange):
    """An exchange of weights which are no parameters once loaded, as quantised rows are not.

    References in lists, as regularisers keep them, read the rows that the new module serves; others are refused.

    Attributes:
        readable: the new modules that have one vector per id, by the parameter they replace.
    """

    readable: Mapping[int, nn.Module] = MappingProxyType({})

    def _rewrite(
        self, value: Any, where: str, changes: list[ReversibleChange], seen: set[int], depth: int
    ) -> list[Any]:
        if self.parameters.get(id(value)) == []:
            new = self.readable.get(id(value))
            if new is not None and isinstance(new.weight, PlainTable):
                return [new.weight]
            self._refuse(where, value, "whose rows are stored as no parameter in the file")
            return [value]
        return super()._rewrite(value, where, changes, seen, depth)


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


def _stays(
    item: ModuleItem, here: Mapping[str, nn.Module], tables: Mapping[str, Mapping[str, Any]], built: nn.Module
) -> bool:
    """Whether torch's own modules keep their places: the source had such there, and what they get is a plain table.

    With ``max_norm`` they would change rows that are read, and the file's are of that norm already.
    """
    plain = item.build.get("config") == FullConfig().to_dict() and item.build["spec"].get("unseen") is None
    return plain and all(
        isinstance(here[path], nn.Embedding | nn.EmbeddingBag)
        and getattr(here[path], "max_norm", None) is None
        and isinstance(tables[path].get("weight"), Tensor)
        and all(
            isinstance(own := getattr(here[path], name, None), Tensor) and own.shape == getattr(built, name).shape
            for name in item.build.get(ADDED, ())
        )
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
