"""Fill a model that somebody else built with the tables and tensors of an exported file: all of it, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from recsys_embed.collection.optimizer_state import weights_of
from recsys_embed.compress.exchange import ModuleExchange, ReversibleChange, apply_all
from recsys_embed.compress.inplace import adapt_to_libraries
from recsys_embed.discover import join_path, key_without_wrappers, names_without_wrappers, unwrapped
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.plain_table import PlainTable
from recsys_embed.embedding.stored_parameters import StoredParameters
from recsys_embed.embedding.tied_linear import tied_output
from recsys_embed.errors import CheckpointError, raise_faults
from recsys_embed.exports.file_format import ExportFile
from recsys_embed.exports.manifest import ExportManifest
from recsys_embed.exports.served_modules import ADDED, ModuleItem, output_layers, put_tables, refusals
from recsys_embed.kernels.stored_tables import Stored
from recsys_embed.methods.full import FullConfig


class ModelFiller:
    """Fills one model.

    Args:
        file, manifest: what was read.
        tables: by path of an embedding, its tables by their names.
        build: gives every embedding module of the file, by its index in the manifest.
        read_dense: gives a copy of the tensor of a key in the state dict.
    """

    def __init__(
        self,
        file: ExportFile,
        manifest: ExportManifest,
        tables: Mapping[str, Mapping[str, nn.Parameter | Stored]],
        build: Callable[[], Mapping[int, nn.Module]],
        read_dense: Callable[[str], Tensor],
    ) -> None:
        self.file, self.items, self.tables = file, manifest.modules, tables
        self.build, self.read_dense = build, read_dense
        # Names without those of wrappers, which earlier versions wrote.
        self.keys = {_without_compile(key): key for key in manifest.dense}
        self.dense = {name: manifest.dense[key] for name, key in self.keys.items()}

    def fill(self, model: nn.Module) -> nn.Module:
        """Put embeddings and every other tensor of the file into ``model``; nothing is changed unless all of it fits.

        Raises:
            CheckpointError: all that does not fit.
        """
        model, given_model = unwrapped(model), model
        names = names_without_wrappers(model)
        here = {names[path]: module for path, module in model.named_modules(remove_duplicate=False)}
        places = [(i, path, _without_compile(path)) for i, item in enumerate(self.items) for path in item.paths]
        inside = tuple(f"{where}." for _, _, where in places)
        faults = [
            fault
            for i, path, where in places
            for fault in _place_faults(where, self.items[i], here.get(where), self.tables.get(path, {}))
        ]
        state = weights_of(model, keep_vars=True)
        keys = {key_without_wrappers(key, names): key for key in state}
        held = {k: state[key] for k, key in keys.items() if not k.startswith(inside)}
        given = {k: item for k, item in self.dense.items() if not k.startswith(inside)}
        layers = output_layers(model, here, {where: i for i, _, where in places}, given)
        computed = {join_path(path, "weight") for path, module in here.items() if module in layers}
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
        modules = {
            i: m for i, m in self.build().items() if i in scored or not _stays(self.items[i], here, self.tables, m)
        }
        scoring = {layer: tied_output(layer, modules[i]) for layer, i in layers.items()}
        references = self._references(model, here, modules, scoring)
        values = {keys[k]: self.read_dense(self.keys[k]) for k in given}
        assign = any(v.is_meta for v in held.values())
        undo = _restorer(model, () if assign else held.values())
        try:
            for i, path, where in places:
                if i in modules:
                    _put(here, where, modules[i])
                else:
                    put_tables(here[where], self.tables[path])
                    added = self.items[i].build.get(ADDED, ())
                    own = {name: self.read_dense(f"{path}.{name}") for name in added}
                    here[where].load_state_dict(own, strict=False)
            for path, layer in here.items():
                if layer in scoring:
                    _put(here, path, scoring[layer])
            with refusals(f"{type(model).__name__}, filled from {self.file.path}"):
                model.load_state_dict(values, strict=False, assign=assign)
            if assign:
                _tie(model, {keys[k]: held[k] for k in given})
            apply_all(references)
            adapt_to_libraries(model)
        except BaseException:
            undo()
            raise
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
        for i, item in enumerate(self.items):
            for path in item.paths:
                old = here[_without_compile(path)]
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


def _restorer(model: nn.Module, values: Iterable[Tensor]) -> Callable[[], None]:
    """A function that gives all modules of ``model`` the children, tensors and ``values`` that they have now."""
    owned: list[Any] = [own for m in model.modules() for own in (m._parameters, m._buffers, m._modules)]
    held = [(own, dict(own)) for own in owned if type(own) is dict or isinstance(own, StoredParameters)]
    kept = [(v, v.detach().clone()) for v in values]

    def restore() -> None:
        for own, before in held:
            own.clear()
            own.update(before)
        with torch.no_grad():
            for value, old in kept:
                value.copy_(old)

    return restore


def _put(here: Mapping[str, nn.Module], path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    here[parent]._modules[name] = module


def _without_compile(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _tie(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Tie parameters again that were tied before new ones were assigned."""
    first: dict[int, str] = {}
    for key, tensor in before.items():
        known = first.setdefault(id(tensor), key)
        if known != key and isinstance(tensor, nn.Parameter):
            parent, _, name = key.rpartition(".")
            model.get_submodule(parent)._parameters[name] = model.get_parameter(known)


def _stays(
    item: ModuleItem, here: Mapping[str, nn.Module], tables: Mapping[str, Mapping[str, Any]], built: nn.Module
) -> bool:
    """Whether torch's own modules keep their places: the source had such there, and what they get is a plain table.

    With ``max_norm`` they would change rows that are read, and the file's are of that norm already.
    """
    plain = item.build.get("config") == FullConfig().to_dict() and item.build["spec"].get("unseen") is None
    return plain and all(
        isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and getattr(module, "max_norm", None) is None
        and isinstance(tables[path].get("weight"), Tensor)
        and all(
            isinstance(own := getattr(module, name, None), Tensor) and own.shape == getattr(built, name).shape
            for name in item.build.get(ADDED, ())
        )
        for path in item.paths
        for module in [here[_without_compile(path)]]
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
