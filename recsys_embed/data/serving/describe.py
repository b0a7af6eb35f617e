"""Encoders as JSON that a client in any language can follow; docs/serving.md says what each key means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys_embed.core.hashing import EMPTY_ID
from recsys_embed.data.columns import Encoder, ListColumn, Numeric, Time, Vector
from recsys_embed.data.columns.categorical import VocabularyEncoder
from recsys_embed.data.columns.lists import ListSettings
from recsys_embed.data.columns.numeric import BucketEncoder, NumericEncoder
from recsys_embed.data.columns.sequence import Sequence
from recsys_embed.data.columns.time import TimeEncoder
from recsys_embed.data.columns.vector import VectorEncoder
from recsys_embed.data.columns.vocabulary import TYPE_NAMES
from recsys_embed.data.criteo.layout import CAT_NAMES, INT_NAMES
from recsys_embed.data.criteo.transform import LOG_SHIFT
from recsys_embed.data.serving.criteo_rows import CriteoEncoder
from recsys_embed.data.serving.lookups import IntegerIds, make_lookup
from recsys_embed.data.serving.read import read_row_encoder
from recsys_embed.data.serving.stored import StoredEncoders, StoredVocabulary
from recsys_embed.data.serving.table_rows import TableEncoder
from recsys_embed.utils.types import JSON


def describe_encoders(stored: StoredEncoders) -> JSON:
    """What a client has to do with raw rows.

    Returns:
        ``columns``: what becomes of each column of the rows; ``vocabularies``: ids by value, as text; ``dense``,
        ``features`` and ``lists``: names in the order of the inputs; ``score``: what the output becomes.
    """
    encoder = read_row_encoder(stored)
    if isinstance(encoder, CriteoEncoder):
        columns = _criteo(encoder)
    elif isinstance(encoder, TableEncoder):
        columns = [_column(e) for e in encoder.encoders]
    texts = {
        item.name: _values(item, stored.arrays, stored.about.get("options"))
        for item in stored.vocabularies.values()
        if item.type != "edges"
    }
    return {
        "format": "recsys_embed.rows",
        "version": 1,
        "score": "sigmoid" if stored.about["output"] == "probability" else "output",
        "dense": list(encoder.dense),
        "features": [*encoder.single, *encoder.lists],
        "lists": list(encoder.lists),
        "columns": columns,
        "vocabularies": texts,
    }


def _values(item: StoredVocabulary, arrays: Mapping[str, NDArray[Any]], criteo: Any) -> dict[str, int]:
    """Ids of a vocabulary's values by their text, in the order of the ids."""
    lookup = make_lookup(item, arrays)
    values, ids = lookup.values()
    texts: Any = values
    if isinstance(lookup, IntegerIds):
        numbers = np.asarray(values)
        if criteo is not None and item.name in CAT_NAMES:
            bits = criteo["id_bits"]
            texts = [f"{v % (1 << bits):x}" for v in numbers.tolist()]
        elif item.type == "unsigned":
            texts = [str(v) for v in numbers.astype(np.int64).view(np.uint64).tolist()]
        else:
            texts = [str(v) for v in numbers.tolist()]
    order = np.argsort(ids, kind="stable")
    return {texts[i]: int(ids[i]) for i in order.tolist()}


def _column(encoder: Encoder) -> JSON:
    column: Any = encoder.column
    about: JSON = {"column": column.source, "kind": column.kind}
    if isinstance(encoder, BucketEncoder):
        edges = encoder.known.values.to_numpy()[1:].tolist()
        return {**about, "kind": "bucket", "feature": column.name, "edges": edges, **_steps(column)}
    if isinstance(encoder, VocabularyEncoder):
        about |= {"feature": column.name, "type": TYPE_NAMES[str(encoder.dtype)], "missing_id": encoder.missing_id}
        if encoder.known is None:
            about["ids"] = "hash"
        else:
            about |= {"ids": "vocabulary", "vocabulary": encoder.known.name, "unknown_id": 0}
        if isinstance(column, ListSettings):
            about |= {"separator": column.separator, "max_length": column.max_length}
            about["keep"] = "first" if isinstance(column, ListColumn) else "last"
            about["reverse"] = isinstance(column, Sequence) and column.newest == "first"
        return about
    if isinstance(encoder, NumericEncoder):
        scale = {"shift": encoder.shift, "scale": encoder.scale} if column.standardise else {}
        return {**about, "dense": list(encoder.dense), **_steps(column), **scale, "fill": encoder.fill}
    if isinstance(encoder, TimeEncoder) and isinstance(column, Time):
        settings = {"unit": column.unit, "format": column.format, "time_zone": column.time_zone}
        parts = {"parts": list(column.parts), "latest": encoder.latest, "fill": dict(encoder.means)}
        return {**about, "dense": list(encoder.dense), **settings, **parts}
    if isinstance(encoder, VectorEncoder) and isinstance(column, Vector):
        return {**about, "dense": list(encoder.dense), "width": encoder.width}
    raise TypeError(f"columns of kind {column.kind} are no inputs")


def _steps(column: Numeric) -> JSON:
    """Steps of a number before the others."""
    return {"clip": None if column.clip is None else list(column.clip), "transform": column.transform}


def _criteo(encoder: CriteoEncoder) -> list[JSON]:
    found: list[JSON] = []
    for name in INT_NAMES:
        if encoder.bucket:
            about: JSON = {"column": name, "kind": "criteo_bucket", "feature": name}
            found.append({**about, **_criteo_ids(encoder, name, "integer")})
        else:
            found.append({"column": name, "kind": "criteo_log", "dense": [name], "shift": LOG_SHIFT[name], "fill": 0.0})
    for name in CAT_NAMES:
        found.append(
            {"column": name, "kind": "criteo_category", "feature": name, **_criteo_ids(encoder, name, "hexadecimal")}
        )
    return found


def _criteo_ids(encoder: CriteoEncoder, name: str, kind: str) -> JSON:
    if encoder.raw:
        return {"type": kind, "ids": "hash", "missing_id": EMPTY_ID[encoder.bits]}
    return {
        "type": kind, "ids": "vocabulary", "vocabulary": name, "unknown_id": 0,
        "missing_id": encoder.known[name].missing_id,
    }  # fmt: skip
