"""The matrices of a model that are no tables: how many numbers each reads, and which of them read a layer's output."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from recsys_embed.discover import FoundTable, bare_tables, join_path, names_without_wrappers

_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FirstLayer(NamedTuple):
    """A layer that follows no other one in a ``Sequential`` or ``ModuleList``.

    Args:
        reads: numbers of its input.
        gives: numbers of its output.
        ends: numbers of the output of the last layer of those that follow it, also as attributes of one module.
        fed: whether another layer's output, read by none that follows it, is as wide as this one's input.
    """

    reads: int
    gives: int
    ends: int
    fed: bool


def first_layers(model: nn.Module, tables: Sequence[FoundTable], unknown: int) -> list[FirstLayer]:
    """The first layers of a model's networks; ``unknown`` is what a lazy one is taken to read.

    >>> network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    >>> first_layers(network, [], 0)
    [FirstLayer(reads=8, gives=32, ends=1, fed=False)]
    """
    holders = {id(h): h for t in tables for h in (t.module, *t.modules)}
    inside = {id(m) for h in holders.values() if h is not model for m in h.modules()}
    bare, names = {t.name for t in bare_tables(model)}, names_without_wrappers(model, remove_duplicate=True)
    shapes: dict[int, list[tuple[int, int]]] = {}
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        known = _layer_shape(module, unknown)
        if known is not None:
            shapes[id(module)] = [known]
        elif id(module) not in holders and _holds_matrices(module):
            own = {n: s for n, s in _matrices(module).items() if join_path(names[path], n) not in bare}
            shapes[id(module)] = list(_products(own, {t.width for t in tables}, unknown))
    in_row, siblings = _followers(model, shapes)
    after = set(in_row.values())
    first = [(key, *numbers) for key, made in shapes.items() if key not in after for numbers in made]
    # What gives as much as it reads, such as cross layers, does not say where that comes from.
    given = {last for key, reads, gives in first if (last := _last(key, gives, in_row, shapes)) != reads}
    return [
        FirstLayer(reads, gives, _last(key, gives, siblings | in_row, shapes), reads in given)
        for key, reads, gives in first
    ]


_Shapes = Mapping[int, list[tuple[int, int]]]


def _followers(model: nn.Module, shapes: _Shapes) -> tuple[dict[int, int], dict[int, int]]:
    """By layer, the next one where that reads as many numbers as it gives: in a container, which surely is called in
    this order, and among the attributes of a module, which maybe is."""
    in_row: dict[int, int] = {}
    siblings: dict[int, int] = {}
    for holder in model.modules():
        certain = isinstance(holder, nn.Sequential | nn.ModuleList)
        row = [id(m) for m in (holder.modules() if certain else holder.children()) if len(shapes.get(id(m), ())) == 1]
        pairs = ((a, b) for a, b in pairwise(row) if shapes[a][0][1] == shapes[b][0][0])
        (in_row if certain else siblings).update(pairs)
    return in_row, siblings


def _last(key: int, gives: int, follower: Mapping[int, int], shapes: _Shapes) -> int:
    """Numbers that the last layer of the chain gives that a layer begins."""
    seen = {key}
    while follower.get(key, key) not in seen:
        key = follower[key]
        seen.add(key)
    return gives if len(seen) == 1 else shapes[key][0][1]


def _layer_shape(module: Any, unknown: int) -> tuple[int, int] | None:
    """Numbers that a linear layer or convolution reads and gives, however its weight is stored; None for others."""
    lazy = is_lazy(module._parameters.get("weight"))
    if isinstance(module, _CONVOLUTION):
        read = prod(module.kernel_size) * module.in_channels // module.groups
        return unknown if lazy else read, module.out_channels
    reads, gives = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not isinstance(reads, int) or not isinstance(gives, int):
        return None
    return unknown if lazy else reads, gives


def _holds_matrices(module: nn.Module) -> bool:
    """Whether a module's own parameters may be matrices of a user's: those of torch's other modules are not."""
    cls = type(module).__mro__[1] if is_parametrized(module) else type(module)
    return cls in (nn.Module, nn.ParameterDict, nn.ParameterList) or not cls.__module__.startswith(
        ("torch.", "torchrec.")
    )


def _matrices(module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's own parameters of two dimensions; those behind parametrizations by their largest part."""
    held: dict[str, list[Any]] = {name: [p] for name, p in module._parameters.items() if "bias" not in name}
    if is_parametrized(module):
        held |= {name: list(parts._parameters.values()) for name, parts in module.parametrizations.items()}
    shapes = {
        name: [tuple(p.shape) for p in parts if p is not None and not is_lazy(p) and p.dim() == 2]
        for name, parts in held.items()
    }
    return {name: max(several, key=prod) for name, several in shapes.items() if several}


def _products(
    matrices: Mapping[str, tuple[int, ...]], widths: Collection[int], every: int
) -> Iterator[tuple[int, int]]:
    """Numbers that bare matrices read and give: ``weight`` as that of a linear layer, others as in ``x @ matrix``."""
    for name, (rows, columns) in matrices.items():
        if min(rows, columns) == 1 or (name != "weight" and columns in widths and rows > columns):
            continue  # a vector, or a small table
        yield (columns, rows) if name == "weight" or columns == every else (rows, columns)
