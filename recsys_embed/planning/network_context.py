"""What follows the lookups: whether a network reads a vector beside enough others to tell ids of one row apart.

Ids of one row have one vector. A network that reads the vector beside those of many other fields can still answer
differently, because the other fields differ too: on 10 and on 26 fields test AUC falls little. A dot product of two
towers, or a factorisation machine, has nothing else to go by: there the vector of an id is all that is known of it, and
a plan that shares rows keeps a fifth of the recall that narrow rows of as many bytes keep (MovieLens-100K, matrix
factorisation, a twentieth of the bytes).

A schema says nothing of the model, so what counts is its number of features. Of a model the matrices that are no tables
are looked at: how wide an input the first of them read, and whether they read sequences.

Where a layer reads the vector of one feature, as in a tower of its own, ids had better have rows of one width: rows of
several widths come out in different subspaces, which the layer has to learn apart (the same data, a tenth of the bytes:
recall@20 .221 with one width and .206 with three; without layers wider rows of popular ids gain).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from recsys_embed.discover import FoundTable, find_tables
from recsys_embed.errors import raise_faults, unknown_name
from recsys_embed.features import Schema
from recsys_embed.typing import ModelOrSchema

MANY = 8
"""Vectors that a network must read together, so that the others tell ids of one row apart."""
_SEQUENCE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NetworkContext(NamedTuple):
    """What follows the lookups.

    Args:
        alone: features that no network reads beside many others: ids that share a row cannot be told apart.
        one_width: those of them whose rows should have one width.
    """

    alone: frozenset[str] = frozenset()
    one_width: frozenset[str] = frozenset()


def network_context(given: ModelOrSchema, schema: Schema, network: Any = None) -> NetworkContext:
    """What follows the lookups of a schema's features.

    Args:
        given: the schema or the model that a plan is for.
        schema: its features.
        network: what the caller says, for all or by feature: whether a network reads it beside many others. None, or
            features left out: found out.

    Raises:
        ConfigError: ``network`` is neither, or names a feature that there is not.

    >>> from recsys_embed import FeatureSpec
    >>> schema = Schema([FeatureSpec("user", 9000, 64), FeatureSpec("item", 5000, 64)])
    >>> found = network_context(schema, schema, {"item": True})
    >>> sorted(found.alone), sorted(found.one_width)
    (['user'], ['user'])
    """
    names = schema.names
    said = dict.fromkeys(names, network) if isinstance(network, bool) else network
    faults = []
    if said is not None and (not isinstance(said, Mapping) or not all(isinstance(v, bool) for v in said.values())):
        faults.append(f"`network` must be True, False, or these by feature; got {network!r:.80}")
        said = None
    said = {} if said is None else said
    faults += [str(unknown_name("feature in `network`", str(n), names)) for n in said if n not in names]
    raise_faults(faults, "plan_for_budget")
    found = _of_model(given) if isinstance(given, nn.Module) else None
    if found is None:
        alone = frozenset(() if len(names) >= MANY else names)
        found = NetworkContext(alone, alone)
    alone = (found.alone - {n for n, yes in said.items() if yes}) | {n for n, yes in said.items() if not yes}
    return NetworkContext(alone, (alone & found.one_width) - said.keys())


class _Layers(NamedTuple):
    """The matrices of a model that are no tables.

    Args:
        inputs: numbers that those read which do not read another one's output.
        sequences: widths of the vectors that recurrent and attention layers read.
    """

    inputs: list[int]
    sequences: set[int]


def _of_model(model: nn.Module) -> NetworkContext | None:
    """What a model's layers say; None for a mere holder of tables, whose layers are elsewhere."""
    tables = find_tables(model)
    layers = _layers_of(model, tables)
    if not layers.inputs and not layers.sequences and _holds_only(model, tables):
        return None
    read = {t.name for t in tables if t.width > 1 and _read_together(t.width, tables, layers)}
    # First-order weights have no width to speak of; they go with the vectors of the same fields.
    if read or (all(t.width == 1 for t in tables) and _read_together(1, tables, layers)):
        read |= {t.name for t in tables if t.width == 1}
    # The score of an id is a product with its own row, so ids of one row have one score.
    alone = frozenset(t.name for t in tables if t.name not in read or t.output_layers)
    return NetworkContext(alone, alone if layers.inputs else frozenset())


def _holds_only(model: nn.Module, tables: Sequence[FoundTable]) -> bool:
    held = isinstance(model, nn.ModuleDict | nn.ModuleList)
    return held or any(m is model for t in tables for m in (t.module, *t.modules))


def _read_together(width: int, tables: Sequence[FoundTable], layers: _Layers) -> bool:
    """Whether a layer reads vectors of ``width`` beside many others: side by side, as their products, or in a row."""
    if width in layers.sequences or any(n >= MANY * width for n in layers.inputs):
        return True
    count = sum(t.width == width for t in tables)
    if count < MANY:
        return False
    # Products of all pairs of vectors, maybe with themselves and with that of the numeric fields, maybe beside it.
    pairs = {m * (m - 1) // 2 for m in range(count, count + 3)}
    return any(n - beside in pairs for n in layers.inputs for beside in (0, width))


def _layers_of(model: nn.Module, tables: Sequence[FoundTable]) -> _Layers:
    inside = {
        id(m) for t in tables for holder in (t.module, *t.modules) if holder is not model for m in holder.modules()
    }
    every = sum(t.width for t in tables)
    layers, made = _Layers([], set()), set[int]()
    for module in model.modules():
        if id(module) in inside:
            continue
        if isinstance(module, _SEQUENCE):
            layers.sequences.add(module.embed_dim if isinstance(module, nn.MultiheadAttention) else module.input_size)
        for reads, gives in _shapes(module, every):
            if reads not in made:
                layers.inputs.append(reads)
            made.add(gives)
    return layers


def _shapes(module: nn.Module, every: int) -> Iterator[tuple[int, int]]:
    """Numbers that a layer reads and gives; ``every`` is what one reads whose input is not known yet."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if is_lazy(weight):
        yield every, 0
    elif weight.dim() == 2 or isinstance(module, _CONVOLUTION):
        yield prod(weight.shape[1:]), weight.shape[0]
