"""Contents of a model for an export: embeddings with their tables, and the rest of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.collection.optimizer_state import weights_of
from recsys_embed.discover import FoundTable, find_tables, join_path, key_without_wrappers, names_without_wrappers
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.tied_linear import TiedLinear
from recsys_embed.errors import raise_faults
from recsys_embed.exports.file_format import NAMES
from recsys_embed.exports.served_modules import ADDED, ModuleItem, build_module, plain_spec
from recsys_embed.features import spec_to_dict
from recsys_embed.kernels.derived_tensors import recreate_derived_tensors
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.kernels.stored_tables import Stored
from recsys_embed.methods.full import FullConfig
from recsys_embed.plan import Plan
from recsys_embed.registry import get_method

Source = Tensor | Stored


@dataclass
class Storage:
    """Tables that are stacked in one tensor, and the modules that read it.

    Args:
        source: the rows of all of them.
        tables: name in the file and number of rows of each, in order.
        targets: path of every embedding that reads them, and the name it has for them.
        renorm: ``max_norm`` and ``norm_type`` that lookups would apply.
        precision: that the plan wants for the rows.
    """

    source: Source
    tables: list[tuple[str, int]]
    targets: list[tuple[str, str]] = field(default_factory=list)
    renorm: tuple[float, float] | None = None
    precision: str = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def width(self) -> int:
        return self.source.width if isinstance(self.source, Stored) else int(self.source.shape[1])

    def steps_of(self, precision: str) -> Callable[[int, int], Tensor] | None:
        """Reads the steps ``[n, 1]`` of rows ``[start, stop)`` of integers that were trained at this precision."""
        source = self.source
        if not isinstance(source, LowPrecisionTable) or source.format.kind != precision or not source.format.bits:
            return None
        return lambda start, stop: source.distances(start, stop).cpu()

    def share_clipped(self, start: int, count: int) -> float:
        """Share of the numbers of ``count`` rows that stand at the outermost codes of a fixed step, where that tells
        of clipping: half as many again as at the codes beside them.
        """
        source = self.source
        if not isinstance(source, LowPrecisionTable) or source.format.learns or not source.format.bits:
            return 0.0
        last, outermost, beside = 1 << (source.format.bits - 1), 0, 0
        size = max(1, (1 << 18) // self.width)
        for first in range(start, start + count, size):
            codes = source.rows(first, min(first + size, start + count)) / source.format.step
            # Codes are whole numbers from -last to last - 1.
            places = torch.where(codes < 0, codes + last, last - 1 - codes).round()
            outermost, beside = outermost + int((places == 0).sum()), beside + int((places == 1).sum())
        return outermost / max(count * self.width, 1) if outermost > 1.5 * beside else 0.0

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` as lookups see them, on the CPU."""
        if isinstance(self.source, Stored):
            return self.source.dense(start, stop - start).cpu()
        if isinstance(self.source, LowPrecisionTable):
            rows, unrounded = self.source.rows(start, stop), self.source.unrounded_rows(start, stop)
            # A float32 row that is not finite is read as 0 once it is rounded, which is no value that it learned.
            return rows.where(torch.isfinite(unrounded), torch.nan).cpu()
        rows = self.source.detach()[start:stop].cpu()
        if self.renorm is not None:
            # As nn.Embedding does in place to the rows that it reads.
            rows = torch.embedding_renorm_(rows.clone(), torch.arange(len(rows)), *self.renorm)
        return rows


@dataclass
class ModelContents:
    """Embeddings, their storages, and every other tensor of the state dict by its key.

    ``owned`` are the keys of ``rest`` that belong to embeddings, ``rounded`` those with a precision of their own;
    ``notes`` say what was left as it is, and why.
    """

    modules: list[ModuleItem] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    rest: dict[str, Tensor] = field(default_factory=dict)
    owned: set[str] = field(default_factory=set)
    rounded: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def scan(model: nn.Module) -> ModelContents:
    """Collect the contents of a model, without copies.

    Raises:
        ConfigError: something in it cannot be exported; all of it is named.
    """
    scanner = _Scanner(model)
    scanner.run()
    return scanner.found


class _Scanner:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, ModelContents()
        self.names = names_without_wrappers(model)
        state = weights_of(model, keep_vars=True)
        self.state = {key_without_wrappers(key, self.names): value for key, value in state.items()}
        self.faults: list[str] = []
        self.paths: dict[int, list[str]] = {}
        self.storages: dict[int, Storage] = {}
        self.skipped: set[str] = set()  # keys of the state that are tables, or say what the manifest says

    def run(self) -> None:
        paths = self.paths
        for path, module in self.model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(self.names[path])
        seen: set[int] = set()
        tables = find_tables(self.model)
        for table in tables:
            for module in table.modules:
                if id(module) not in seen:
                    seen.add(id(module))
                    self._embedding(module, table, paths[id(module)])
        scoring = {id(layer) for table in tables for layer in table.output_layers}
        for path, module in self.model.named_modules():
            if isinstance(module, TiedLinear) and id(module) not in scoring:
                self.faults.append(
                    f"{path} scores by a compressed table that is no longer in the model; replace it too"
                )
        self._rest()
        raise_faults(self.faults, "export")
        self.found.storages = list(self.storages.values())
        _unique_names(self.found)

    def _embedding(self, module: Any, table: FoundTable, paths: list[str]) -> None:
        where = f"{type(module).__name__} at {paths[0] or 'the top'!r}"
        added = _added(module)
        if isinstance(module, CompressedEmbedding | EmbeddingCollection):
            item = _item(module, tuple(paths), added)
            faults = [*_class_faults(module)] or [*_state_faults(module, item)]
            if table.obstacle:
                faults.append(f"{table.obstacle}; give each a tensor of its own")
            self.faults += [f"{where}: {fault}" for fault in faults]
            if faults:
                return
        elif table.obstacle or table.tied:
            why = table.obstacle or f"its weight is also {', '.join(table.tied)}"
            self.found.notes.append(f"{paths[0]}: kept whole, {why}")
            return
        else:
            item = _plain_item(module, table.name, tuple(paths), added)
        self.found.modules.append(item)
        if isinstance(module, CompressedEmbedding):
            # Output layers score by what the file has for the table.
            self.skipped |= {f"{p}.weight" for layer in table.output_layers for p in self.paths[id(layer)]}
        for path in paths:
            self._tables(module, path)
            # A user's own tensors are kept as they are, whatever the precision.
            self.found.owned -= {join_path(path, name) for name in added}

    def _tables(self, module: Any, path: str) -> None:
        """Storages that the module at a path reads, and whose keys of the state are whose."""
        prefix = f"{path}." if path else ""
        self.found.owned |= {key for key in self.state if key.startswith(prefix)}
        said = tuple(prefix + name for name in ("_extra_state", "served.", "shared."))
        self.skipped |= {key for key in self.state if key.startswith(said)}
        if isinstance(module, EmbeddingCollection):
            for name in module.storages:
                keys = sorted((k for k, p in module.places.items() if p.storage == name), key=_offset_in(module))
                tables = [(prefix + k, module.tables[k].rows) for k in keys]
                self._storage(module, name, tables, path, module.tables[keys[0]].precision)
            names = {id(p): name for name, p in module.named_parameters()}
            for feature, program in module.bundle.programs.items():
                for table in () if program.head is None else program.head.tables:
                    key = names[id(module.bundle.heads.parameter(feature, table))]
                    self.found.rounded[prefix + key] = program.table(table).precision
            for name, own in module.bundle.own.items():
                if isinstance(own, CompressedEmbedding):  # the tables of heads stay as they are
                    self._tables(own, f"{prefix}bundle.own.{name}")
        elif isinstance(module, CompressedEmbedding):
            for t in module.program.tables:
                if t.dense:
                    self.found.rounded[prefix + module.parameter_name(t.name)] = t.precision
                else:
                    self._storage(module, t.name, [(prefix + t.name, t.rows)], path, t.precision)
        else:
            self._storage(module, "weight", [(prefix + "weight", module.num_embeddings)], path)

    def _storage(
        self, module: Any, name: str, tables: list[tuple[str, int]], path: str, precision: str = "fp32"
    ) -> None:
        source = _source(module, name)
        storage = self.storages.setdefault(id(source), Storage(source, tables, precision=precision))
        if storage.precision != precision:
            self.faults.append(
                f"table {tables[0][0]!r} is to be stored at {precision}, and at {storage.precision} by another module "
                "that reads it; give both one precision"
            )
        storage.targets.append((path, name))
        if getattr(module, "max_norm", None) is not None:
            storage.renorm = (float(module.max_norm), float(module.norm_type))
        key = module.parameter_name(name) if isinstance(module, CompressedEmbedding) else name
        self.skipped.add(join_path(path, key))

    def _rest(self) -> None:
        for key, value in self.state.items():
            if key in self.skipped:
                continue
            if not isinstance(value, Tensor):
                self.faults.append(f"state {key!r} is of type {type(value).__name__}; only tensors can be exported")
            elif value.is_meta:
                self.faults.append(f"tensor {key!r} is on the meta device and holds nothing")
            elif value.layout != torch.strided or value.dtype not in NAMES:
                self.faults.append(f"tensor {key!r} is {value.dtype}, {value.layout}, which the file cannot hold")
            else:
                self.found.rest[key] = value
        self.faults += [
            f"table {s.tables[0][0]!r} is on the meta device and holds nothing"
            for s in self.storages.values()
            if s.source.device.type == "meta"
        ]
        self.found.owned &= self.found.rest.keys()


def _offset_in(module: EmbeddingCollection) -> Any:
    return lambda key: module.places[key].offset


def _class_faults(module: CompressedEmbedding | EmbeddingCollection) -> Iterator[str]:
    known: type = EmbeddingCollection
    if isinstance(module, CompressedEmbedding):
        known = get_method(module.config.method).embedding_cls
    if is_parametrized(module):
        names = ", ".join(map(repr, module.parametrizations))  # type: ignore[arg-type]
        yield (
            f"parametrized ({names}), which a file cannot bring back; fix the values first: "
            "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
        )
    elif type(module) is not known:
        yield f"a subclass of {known.__name__}, which a file cannot bring back; register it as a method of its own"


def _state_faults(module: CompressedEmbedding | EmbeddingCollection, item: ModuleItem) -> Iterator[str]:
    """Faults: tensors that were added to a module or removed from it."""
    inner, built = ("served.", "shared."), build_module(item)
    ours = {k: tuple(v.shape) for k, v in _tensors(module).items() if not k.startswith(inner) and ".served." not in k}
    theirs = {k: tuple(v.shape) for k, v in _tensors(built).items()}
    # Tables that are read from elsewhere (shared, or served) are not among the module's own.
    odd = [k for k, shape in ours.items() if theirs.get(k) != shape and k not in item.build.get(ADDED, ())]
    if odd:
        yield f"not as its configuration makes it; it also holds {', '.join(odd[:5])}"
    recreate_derived_tensors(built, torch.device("cpu"))
    lost = [k for k, v in built.named_buffers() if v.is_meta and k not in theirs]
    if lost:
        yield f"buffers {', '.join(lost[:5])} are in no state dict, so no file holds them; make them persistent"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in weights_of(module, keep_vars=True).items() if not k.endswith("_extra_state")}


def _source(module: Any, name: str) -> Source:
    """The tensor that an embedding reads under a name: a parameter or a stored table."""
    served = getattr(module, "served", None)
    if served is not None and name in served:
        return cast("Stored", served[name])
    return cast("Tensor", module.table(name) if isinstance(module, CompressedEmbedding) else getattr(module, name))


def _added(module: nn.Module) -> tuple[str, ...]:
    """Names of the tensors that a user gave an embedding beside its own."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        own = {"weight"}
    elif isinstance(module, CompressedEmbedding):
        own = {module.parameter_name(t.name) for t in module.program.tables}
    else:
        return ()
    held = [*module._buffers, *module._parameters]
    return tuple(n for n in held if n not in own and n not in module._non_persistent_buffers_set)


def _item(
    module: CompressedEmbedding | EmbeddingCollection, paths: tuple[str, ...], added: tuple[str, ...]
) -> ModuleItem:
    if isinstance(module, EmbeddingCollection):
        build: dict[str, Any] = {"schema": module.schema.to_dict(), "plan": Plan(module.plan.configs).to_dict()}
        return ModuleItem("collection", paths, build, _dtype(module))
    build = {
        "spec": spec_to_dict(module.spec),
        "config": module.config.to_dict(),
        "padding_idx": module.padding_idx,
        "mode": module.mode,
        "include_last_offset": module.include_last_offset,
        "stands_in": bool(module.stands_in),
        **({ADDED: list(added)} if added else {}),
    }
    return ModuleItem("embedding", paths, build, _dtype(module))


def _plain_item(module: Any, name: str, paths: tuple[str, ...], added: tuple[str, ...]) -> ModuleItem:
    """The item of a torch module, which the method ``full`` replaces."""
    bag = isinstance(module, nn.EmbeddingBag)
    mode = module.mode if bag else None
    build = {
        "spec": plain_spec(name, module.num_embeddings, module.embedding_dim, mode),
        "config": FullConfig().to_dict(),
        "padding_idx": module.padding_idx,
        "mode": mode,
        "include_last_offset": bool(bag and module.include_last_offset),
        "stands_in": True,
        **({ADDED: list(added)} if added else {}),
    }
    return ModuleItem("embedding", paths, build, module.weight.dtype)


def _dtype(module: nn.Module) -> torch.dtype:
    served = getattr(module, "served", None)
    if served is not None:
        return cast("Tensor", served.like).dtype
    floats = (p.dtype for p in module.parameters())
    return next(floats, torch.float32)


def _unique_names(found: ModelContents) -> None:
    """Append a number to tensor names that are equal."""
    taken = set(found.rest)
    for storage in found.storages:
        for i, (name, rows) in enumerate(storage.tables):
            unique, n = name, 1
            while unique in taken or unique == "__metadata__":
                n += 1
                unique = f"{name}#{n}"
            taken.add(unique)
            storage.tables[i] = (unique, rows)
