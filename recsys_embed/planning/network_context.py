"""What follows the lookups: whether a network reads a vector beside enough others to tell ids of one row apart.

Ids of one row have one vector. A network that reads the vector beside those of many other fields can still answer
differently, because the other fields differ too: on 10 and on 26 fields test AUC falls little. A dot product of two
towers, or a factorisation machine, has nothing else to go by: there the vector of an id is all that is known of it, and
a plan that shares rows keeps a fifth of the recall that narrow rows of as many bytes keep (MovieLens-100K, matrix
factorisation, a twentieth of the bytes).

A schema says nothing of the model, so what counts is its number of features. Of a model the layers are looked at. A
layer reads many fields' vectors side by side where the model has as many, the layer's input is as wide, and nothing
else explains that width: the output of another layer, or a text's or image's vector that is brought to the width of a
table. In doubt no layer does: that costs quality where one did, and no id its vector where none did.

Where a layer reads the vector of one feature, as in a tower of its own, ids had better have rows of one width: rows of
several widths come out in different subspaces, which the layer has to learn apart (the same data, a tenth of the bytes:
recall@20 .221 with one width and .206 with three; without layers wider rows of popular ids gain).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from recsys_embed.discover import FoundTable, find_tables, unwrapped
from recsys_embed.errors import raise_faults, unknown_name
from recsys_embed.features import Schema
from recsys_embed.planning.network_layers import FirstLayer, first_layers
from recsys_embed.typing import ModelOrSchema

FIELDS_TO_TELL_IDS_APART = 8
"""Vectors that a network must read together, so that the others tell ids of one row apart."""
_SEQUENCE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


class NetworkContext(NamedTuple):
    """What follows the lookups.

    Args:
        without_network: features that no network reads beside many others: ids that share a row cannot be told apart.
        equal_row_widths: those of them whose rows should have one width.
    """

    without_network: frozenset[str] = frozenset()
    equal_row_widths: frozenset[str] = frozenset()


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
    >>> sorted(found.without_network), sorted(found.equal_row_widths)
    (['user'], ['user'])
    """
    names = schema.names
    given_by_caller = dict.fromkeys(names, network) if isinstance(network, bool) else network
    if given_by_caller is None:
        given_by_caller = {}
    faults = []
    if not isinstance(given_by_caller, Mapping) or not all(isinstance(v, bool) for v in given_by_caller.values()):
        faults.append(f"`network` must be True, False, or these by feature; got {network!r:.80}")
        given_by_caller = {}
    faults += [str(unknown_name("feature in `network`", str(n), names)) for n in given_by_caller if n not in names]
    raise_faults(faults, "plan_for_budget")
    found = _of_model(given) if isinstance(given, nn.Module) else None
    if found is None:
        every = frozenset(() if len(names) >= FIELDS_TO_TELL_IDS_APART else names)
        found = NetworkContext(every, every)
    without_network = {n for n in names if not given_by_caller.get(n, n not in found.without_network)}
    return NetworkContext(
        frozenset(without_network), frozenset(without_network & found.equal_row_widths - given_by_caller.keys())
    )


def _of_model(model: nn.Module) -> NetworkContext | None:
    """What a model's layers say; None for a mere holder of tables, whose layers are elsewhere."""
    model = unwrapped(model)
    tables = find_tables(model)
    # First-order weights have no width to speak of; they go with the vectors of the same fields.
    vectors = [t for t in tables if t.width > 1]
    layers = first_layers(model, tables, sum(t.width for t in vectors))
    sequences = {
        m.embed_dim if isinstance(m, nn.MultiheadAttention) else m.input_size
        for m in model.modules()
        if isinstance(m, _SEQUENCE)
    }
    if not layers and not sequences and _holds_only(model, tables):
        return None
    side_by_side = {w for w in {t.width for t in vectors} if _read_side_by_side(w, vectors, layers)}
    read = side_by_side | (sequences - {1}) | ({1} if side_by_side else set())
    # The score of an id is a product with its own row, so ids of one row have one score.
    without_network = frozenset(t.name for t in tables if t.width not in read or t.output_layers)
    return NetworkContext(without_network, without_network if layers else frozenset())


def _holds_only(model: nn.Module, tables: Sequence[FoundTable]) -> bool:
    held = isinstance(model, nn.ModuleDict | nn.ModuleList)
    return held or any(m is model for t in tables for m in (t.module, *t.modules))


def _read_side_by_side(width: int, vectors: Sequence[FoundTable], layers: Sequence[FirstLayer]) -> bool:
    """Whether a layer reads vectors of ``width`` beside those of many other fields, or the products of all pairs."""
    many = len(vectors) >= FIELDS_TO_TELL_IDS_APART
    if not many and len(vectors) > 1:  # one table may hold all fields, the ids of one after those of another
        return False
    # All vectors, maybe with that of the numeric fields.
    every = sum(t.width for t in vectors)
    exactly = {every, every + width} if many else set()
    count = sum(t.width == width for t in vectors)
    if count >= FIELDS_TO_TELL_IDS_APART:
        # Products, maybe of vectors with themselves and with that of the numeric fields, maybe beside it.
        exactly |= {m * (m - 1) // 2 + beside for m in range(count, count + 3) for beside in (0, width)}
    return any(
        (layer.reads in exactly and not (layer.fed and layer.gives == 1))
        or (
            layer.reads >= FIELDS_TO_TELL_IDS_APART * width
            and not layer.fed
            and layer.gives != 1  # a first-order term of numeric fields
            and layer.ends != width  # a text's or image's vector as one of a table's
        )
        for layer in layers
    )
