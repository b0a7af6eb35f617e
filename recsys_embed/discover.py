"""The embedding tables of any model: plain, TorchRec's and this library's, with every place where each is used."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recsys_embed.errors import ConfigError, raise_faults

TableKind = Literal["embedding", "embedding_bag", "torchrec_ebc", "torchrec_ec", "compressed", "collection"]
Pooling = Literal["sum", "mean", "max"]


@dataclass(frozen=True, eq=False)
class FoundTable:
    """One logical embedding table of a model and every place that reads it.

    Args:
        name: the first dotted path with ``/`` for ``.``, as :class:`FeatureSpec` names are; unique in the model.
        paths: every dotted path at which the same module, or another one with the same weight, stands.
        kind: ``"embedding"``, ``"embedding_bag"``, a table of a TorchRec ``"torchrec_ebc"`` or ``"torchrec_ec"``, a
            ``"compressed"`` drop-in, or a feature of this library's ``"collection"``.
        rows: number of ids.
        width: width of one id's vector.
        dtype: of the stored values.
        requires_grad: whether any of them is trained.
        module: the module at the first path: the embedding, or the collection that holds the table.
        table: name of the table (TorchRec) or feature (this library's collection) within ``module``.
        pooling: how bags are pooled; None where there is one vector per id.
        modules: the embedding module at each of ``paths``; for a feature of a collection, the collection.
        tied: dotted names of parameters of other modules that are the same tensor, e.g. a tied output layer's.
        output_layers: the linear layers among those modules, and those that score by a compressed table.
        obstacle: why the table cannot be replaced as it is; empty where it can.
    """

    name: str
    paths: tuple[str, ...]
    kind: TableKind
    rows: int
    width: int
    dtype: torch.dtype
    requires_grad: bool
    module: nn.Module = field(repr=False)
    table: str | None = None
    pooling: Pooling | None = None
    modules: tuple[nn.Module, ...] = field(default=(), repr=False)
    tied: tuple[str, ...] = ()
    output_layers: tuple[nn.Module, ...] = field(default=(), repr=False)
    obstacle: str = ""

    @property
    def weight(self) -> Tensor | None:
        """The full table ``[rows, width]``; None for the kinds of this library, which store something else."""
        if self.kind in ("compressed", "collection"):
            return None
        weight: Tensor = self.modules[0].weight  # type: ignore[assignment]
        return weight

    @property
    def device(self) -> torch.device:
        """Where its values are; also of a loaded export, which has no parameters."""
        first: Any = self.modules[0]
        own = next(first.parameters(), None)
        device: torch.device = (first.served.like if own is None else own).device
        return device


# Modules that are called in place of one that they hold: by class, the name under which its parameters stand.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``nn.DataParallel`` and DistributedDataParallel, whose names have no prefix.

    >>> linear = nn.Linear(2, 2)
    >>> unwrapped(nn.DataParallel(linear)) is linear
    True
    """
    while is_wrapper(model):
        model = model._modules[_WRAPPERS[type(model).__name__]]  # type: ignore[assignment]
    return model


def is_wrapper(module: object) -> bool:
    """Whether a module is called in place of one that it holds."""
    name = _WRAPPERS.get(type(module).__name__)
    ours = isinstance(module, nn.Module) and type(module).__module__.startswith("torch.")
    return ours and module._modules.get(name or "") is not None  # type: ignore[attr-defined]


def join_path(path: str, name: str) -> str:
    """Two parts of a dotted path, of which one may be empty."""
    return f"{path}.{name}" if path and name else path or name


def names_without_wrappers(model: nn.Module, *, remove_duplicate: bool = False) -> dict[str, str]:
    """By path of ``named_modules``, the path in a model whose parts are in no ``torch.compile`` or DataParallel.

    >>> names_without_wrappers(nn.ModuleDict({"tower": nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))}))
    {'': '', 'tower': 'tower', 'tower.module': 'tower', 'tower.module.0': 'tower.0'}
    """
    names, modules = {"": ""}, {}
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        parent, _, name = path.rpartition(".")
        modules[path] = module
        if path:
            names[path] = _name_of_child(modules[parent], names[parent], name)
    return names


def _name_of_child(module: nn.Module, path: str, name: str) -> str:
    return path if is_wrapper(module) and _WRAPPERS[type(module).__name__] == name else join_path(path, name)


def key_without_wrappers(key: str, names: Mapping[str, str]) -> str:
    """A key of a state dict, as that of the model without its wrappers; ``names`` as above."""
    module, _, name = key.rpartition(".")
    return join_path(names[module], name) if module in names else key


@dataclass(frozen=True)
class BareTable:
    """A parameter that has the shape of an embedding table and stands in no embedding module."""

    name: str
    rows: int
    width: int
    nbytes: int

    def __str__(self) -> str:
        return (
            f"{self.name}, a parameter {self.rows} x {self.width} ({self.nbytes / 2**20:.2f} MiB), may be an embedding "
            "table but stands in no nn.Embedding, so it cannot be replaced: hold it in nn.Embedding, and look ids up "
            "by calling that"
        )


_BARE_ROWS, _BARE_RATIO = 1000, 4


def bare_tables(model: nn.Module) -> list[BareTable]:
    """Parameters of a model's own that look like embedding tables: 1000 rows or more, and 4 times as many as columns.

    Those of torch's layers, and those that are the weight of an embedding too, are none.

    >>> model = nn.ParameterDict({"user": torch.zeros(2000, 16)})
    >>> [(t.name, t.rows, t.width) for t in bare_tables(model)]
    [('user', 2000, 16)]
    """
    model = unwrapped(model)
    found, seen = [], {_tensor_key(t.weight) for t in find_tables(model) if t.weight is not None}
    names = names_without_wrappers(model, remove_duplicate=True)
    for path, module in model.named_modules():
        layer = type(module).__module__.startswith(("torch.", "recsys_embed.", "torchrec."))
        if layer and not isinstance(module, nn.ParameterDict | nn.ParameterList):
            continue
        for name, p in module._parameters.items():
            if p is None or is_lazy(p) or p.dim() != 2 or _tensor_key(p) in seen:
                continue
            rows, width = p.shape
            if rows >= max(_BARE_ROWS, _BARE_RATIO * width) and p.is_floating_point():
                seen.add(_tensor_key(p))
                found.append(BareTable(join_path(names[path], name), rows, width, p.nbytes))
    return found


def find_tables(model: nn.Module, *, subclasses: Collection[type] = ()) -> list[FoundTable]:
    """Every embedding table in a tree of modules, in the order of the tree; builds nothing, works on meta tensors.

    A module that stands at several paths, and modules that hold the same weight, are one table. Sharded and quantised
    TorchRec modules are not tables that a process owns and are left out. ``torch.compile``, ``nn.DataParallel`` and
    DistributedDataParallel leave no trace in names, around the model or a part of it.

    Args:
        model: any module.
        subclasses: classes derived from ``nn.Embedding`` or ``nn.EmbeddingBag`` that may be replaced like their base.

    Raises:
        ConfigError: ``model`` is not a module.

    >>> model = nn.ModuleDict({"user": nn.Embedding(100, 8), "tags": nn.EmbeddingBag(50, 8, mode="sum")})
    >>> [(t.name, t.kind, t.rows, t.width, t.pooling) for t in find_tables(model)]
    [('user', 'embedding', 100, 8, None), ('tags', 'embedding_bag', 50, 8, 'sum')]
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be a torch.nn.Module; got {type(model).__name__}")
    model = unwrapped(model)
    groups: dict[Any, list[_Seen]] = {}
    for seen in _walk(model, "", ()):
        groups.setdefault(seen.key, []).append(seen)
    known = (nn.Embedding, nn.EmbeddingBag, *subclasses)
    others = _other_parameters(model, {id(s.module) for group in groups.values() for s in group})
    taken: set[str] = set()
    found = [_describe(group, others, taken, known) for group in groups.values()]
    scoring = [m for m in model.modules() if getattr(type(m), "table_kind", None) == "output_layer"]
    if not scoring:
        return found
    return [
        replace(t, output_layers=(*t.output_layers, *(m for m in scoring if any(map(m.scores_by, t.modules)))))  # type: ignore[arg-type]
        for t in found
    ]


@dataclass(frozen=True)
class _Seen:
    """One place in the tree that reads a table."""

    path: str
    kind: TableKind
    module: nn.Module
    owner: nn.Module
    table: str | None
    key: Any
    registered: bool = True


def _walk(module: nn.Module, path: str, above: tuple[int, ...]) -> Iterator[_Seen]:
    """Every place of the tree below ``module``; a module that contains itself is entered once."""
    if id(module) in above:
        return
    own_kind = getattr(type(module), "table_kind", None)
    if own_kind == "collection":
        for name in module.schema.names:  # type: ignore[union-attr]
            yield _Seen(join_path(path, name), "collection", module, module, name, (id(module), name))
        return
    if own_kind == "compressed":
        # Drop-ins of one name over the same parameters stand for one table, as tied plain modules do; a loaded
        # export has none.
        own = tuple(id(p) for p in module.parameters()) or (id(module),)
        key = (module.spec.name, *own)  # type: ignore[union-attr]
        yield _Seen(path, "compressed", module, module, None, key)
        return
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        kind: TableKind = "embedding" if isinstance(module, nn.Embedding) else "embedding_bag"
        yield _Seen(path, kind, module, module, None, _weight_key(module))
        return
    held = _torchrec_tables(module)
    if held is not None:
        kind, folder, tables = held
        for name, bag in tables.items():
            where = join_path(path, f"{folder}.{name}")
            for seen in _walk(bag, where, (*above, id(module))):
                plain = seen.kind in ("embedding", "embedding_bag")
                yield _Seen(where, kind if plain else seen.kind, bag, module if plain else bag, name, seen.key)
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, _name_of_child(module, path, name), (*above, id(module)))
    for name, value in vars(module).items():
        if name not in _TORCH_OWN:
            for where, table in _unregistered(value, join_path(path, name)):
                if not any(table is m for m in module.modules()):
                    yield from (replace(seen, registered=False) for seen in _walk(table, where, ()))


_TORCH_OWN = frozenset(vars(nn.Module()))


def _unregistered(value: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Embeddings in plain lists, tuples and dictionaries, which are no part of the tree that torch sees."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        if isinstance(item, nn.Embedding | nn.EmbeddingBag):
            yield f"{path}[{key!r}]", item


def _torchrec_tables(module: nn.Module) -> tuple[TableKind, str, nn.ModuleDict] | None:
    """Kind, attribute and tables of a TorchRec collection; None for other modules."""
    torchrec = sys.modules.get("torchrec.modules.embedding_modules")
    if torchrec is None:
        return None  # without the import no module can be of it
    if isinstance(module, torchrec.EmbeddingBagCollection):
        return "torchrec_ebc", "embedding_bags", module.embedding_bags
    if isinstance(module, torchrec.EmbeddingCollection):
        return "torchrec_ec", "embeddings", module.embeddings
    return None


def _tensor_key(tensor: Tensor) -> Any:
    """What two parameters over the same memory have in common; works without memory, on the meta device."""
    tensor = getattr(tensor, "stored", tensor)  # rows that train in few bits lie in another tensor
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel())


def _weight_key(module: nn.Module) -> Any:
    named = getattr(module, "parameter_name", None)
    weight = module._parameters.get("weight" if named is None else named("weight"))
    return id(module) if weight is None else _tensor_key(weight)


_Others = dict[Any, list[tuple[str, nn.Module]]]


def _other_parameters(model: nn.Module, tables: set[int]) -> _Others:
    """Dotted names and modules of the parameters and buffers outside embedding modules, by what they store."""
    found: _Others = {}
    names = names_without_wrappers(model, remove_duplicate=True)
    for path, module in model.named_modules():
        if id(module) in tables:
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and not is_lazy(tensor):
                found.setdefault(_tensor_key(tensor), []).append((join_path(names[path], name), module))
    return found


def _describe(group: list[_Seen], others: _Others, taken: set[str], known: tuple[type, ...]) -> FoundTable:
    first = group[0]
    # '#' separates parts of table names elsewhere; the model itself may be a table, whose path is empty.
    name = base = first.path.replace(".", "/").replace("#", "_") or "embedding"
    n = 1
    while name in taken:
        n += 1
        name = f"{base}_{n}"
    taken.add(name)
    common: dict[str, Any] = {
        "name": name,
        "paths": tuple(s.path for s in group),
        "kind": first.kind,
        "module": first.owner,
        "table": first.table,
        "modules": tuple(s.module for s in group),
    }
    module: Any = first.module
    if first.kind in ("compressed", "collection"):
        spec = module.spec if first.kind == "compressed" else module.schema[first.table]
        pooling = module.mode if first.kind == "compressed" else spec.pooling
        parameters = list(module.parameters())
        trained = any(p.requires_grad for p in parameters) or getattr(module, "optimizer", None) is not None
        if first.kind == "compressed":
            common |= _ties_of_drop_ins(group, others)
        return FoundTable(
            rows=spec.num_embeddings,
            width=spec.embedding_dim,
            dtype=parameters[0].dtype if parameters else module.served.like.dtype,
            requires_grad=trained,
            pooling=pooling,
            **common,
        )
    weight = module.weight
    ties = _ties(weight, others.get(first.key, []))
    faults = [fault for s in group for fault in _obstacles(s, known)]
    faults += [ties.pop("obstacle")] if ties["obstacle"] else []
    return FoundTable(
        rows=module.num_embeddings,
        width=module.embedding_dim,
        dtype=weight.dtype,
        requires_grad=any(s.module.weight.requires_grad for s in group),
        pooling=getattr(module, "mode", None),
        **{**ties, "obstacle": "; ".join(dict.fromkeys(faults))},
        **common,
    )


def _ties(weight: Tensor, holders: list[tuple[str, nn.Module]], all_rows: bool = True) -> dict[str, Any]:
    """What a table says of others that hold its ``weight``, which has ``all_rows`` of the ids or some."""
    odd = [where for where, holder in holders if not (all_rows and _scores(holder, weight))]
    return {
        "tied": tuple(where for where, _ in holders),
        "output_layers": () if odd else tuple(holder for _, holder in holders),
        "obstacle": f"its weight is also {', '.join(odd)}" if odd else "",
    }


def _ties_of_drop_ins(group: list[_Seen], others: _Others) -> dict[str, Any]:
    """Others that hold a parameter of a drop-in which a user shared with them; a full table may score."""
    module: Any = group[0].module
    inside = {id(m) for s in group for m in s.module.modules()}
    for name, parameter in module.named_parameters():
        holders = [h for h in others.get(_tensor_key(parameter), []) if id(h[1]) not in inside]
        if holders:
            full = module.config.method == "full" and module.spec.num_ids == module.num_embeddings
            return _ties(parameter, holders, full and name == "weight")
    return {}


def _scores(layer: nn.Module, weight: Tensor) -> bool:
    """Whether a module is a linear layer that does nothing else with the table ``weight`` than score by its rows."""
    own = layer._parameters.get("weight")
    return type(layer) is nn.Linear and "forward" not in vars(layer) and own is not None and own.shape == weight.shape


def _obstacles(seen: _Seen, known: tuple[type, ...]) -> Iterator[str]:
    module = seen.module
    if not seen.registered:
        yield f"it stands in a plain list or dictionary ({seen.path}), which torch does not look into"
    if module._parameters.get("weight") is None:
        yield "its weight is computed (a parametrization, or weight_norm), not stored"
    elif type(module) not in known:
        cls = type(module)
        yield f"it is of {cls.__module__}.{cls.__qualname__}, a subclass that may do more than its base"
    if "forward" in vars(module):
        yield "its forward is replaced on the instance"


def select_tables(
    tables: Sequence[FoundTable], include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> list[FoundTable]:
    """Tables whose name or a dotted path matches a pattern of ``include`` (all, without any) and none of ``exclude``.

    Args:
        include: shell patterns, e.g. ``"linear_model.*"``; one text or several.
        exclude: as ``include``.

    Raises:
        ConfigError: a pattern matches no table.

    >>> tables = find_tables(nn.ModuleDict({"user": nn.Embedding(9, 2), "item": nn.Embedding(9, 2)}))
    >>> [t.name for t in select_tables(tables, exclude=["us*"])]
    ['item']
    """
    wanted, unwanted = (list([p] if isinstance(p, str) else p) for p in (include, exclude))

    def matches(table: FoundTable, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in (table.name, *table.paths))

    idle = [p for p in [*wanted, *unwanted] if not any(matches(t, p) for t in tables)]
    names = ", ".join(t.name for t in tables) or "none"
    raise_faults([f"pattern {p!r} matches no table; tables: {names}" for p in idle], "include and exclude")
    chosen = [t for t in tables if not wanted or any(matches(t, p) for p in wanted)]
    return [t for t in chosen if not any(matches(t, p) for p in unwanted)]
