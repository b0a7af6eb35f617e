"""The encoders of a data folder in the form of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys_embed.data.columns import Label, Time, read_encoder
from recsys_embed.data.columns.vocabulary import TYPE_NAMES, ValueVocabulary
from recsys_embed.data.loader import Dataset, open_dataset
from recsys_embed.data.serving.lookups import IntegerIds, store_vocabulary
from recsys_embed.data.serving.stored import VERSION, Output, StoredEncoders, StoredVocabulary, as_arrays
from recsys_embed.data.vocab import Vocabulary
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.utils.types import JSON


def pack_encoders(data: Dataset, output: Output | None = None) -> StoredEncoders:
    """What turns raw rows into the ids and numbers of a data folder.

    Args:
        data: the folder; labels, weights, groups and times that are no inputs are left out.
        output: what a score is; None: a probability, unless the folder's labels are any real numbers.
    """
    manifest = data.manifest
    about: JSON = {
        "version": VERSION,
        "kind": "table" if manifest.columns else "criteo",
        "output": output or ("value" if _real_labels(data) else "probability"),
        "features": [{"name": f.name, "form": f.form} for f in manifest.features],
        "dense": list(manifest.dense),
        "preset": manifest.extra.get("preset"),
    }
    arrays: dict[str, NDArray[Any]] = {}
    vocabularies: JSON = {}
    if manifest.columns:
        inputs = [e for e in manifest.columns if _is_input(e)]
        about["columns"] = [_entry(e) for e in inputs]
        about["source"] = dict(manifest.settings.get("schema", {}).get("source", {}))
        for entry in inputs:
            file = entry["learned"].get("vocab")
            if file is not None and file not in vocabularies:
                known = read_encoder(entry, data.path).vocabulary
                item, parts = _stored(len(vocabularies), known, entry)
                vocabularies[file], arrays = item, {**arrays, **parts}
    else:
        settings = manifest.settings
        about["options"] = {key: settings[key] for key in ("ids", "id_bits", "dense")}
        for feature in manifest.features:
            if feature.vocab is not None:
                numbers = Vocabulary.read(data.path / feature.vocab, feature.name)
                values = numbers.values.view(np.int32 if numbers.values.dtype.itemsize == 4 else np.int64)
                item = _item(len(vocabularies), feature.name, "integer", numbers.size, numbers.missing_id)
                vocabularies[feature.vocab] = item
                arrays |= as_arrays(IntegerIds.of(values, numbers.ids).arrays(), StoredVocabulary(place="", **item))
    about["vocabularies"] = vocabularies
    return StoredEncoders({k: v for k, v in about.items() if v is not None}, arrays)


def _real_labels(data: Dataset) -> bool:
    schema = data.table_schema
    return schema is not None and any(isinstance(c, Label) and c.task == "real" for c in schema.used)


def _is_input(entry: Mapping[str, Any]) -> bool:
    """Whether a column gives an input of a model."""
    if entry["kind"] == "time":
        return bool(entry.get("parts", Time.parts))
    return entry["kind"] not in ("label", "weight", "group")


def _entry(entry: Mapping[str, Any]) -> JSON:
    """A column as it is served: the time of an event is a time as any other."""
    return {**entry, "event": False} if entry["kind"] == "time" else dict(entry)


def _item(number: int, name: str, kind: str, size: int, missing_id: int) -> JSON:
    return {"number": number, "name": name, "type": kind, "size": size, "missing_id": missing_id}


def _stored(number: int, known: ValueVocabulary, entry: Mapping[str, Any]) -> tuple[JSON, dict[str, NDArray[Any]]]:
    buckets = entry.get("buckets") is not None
    kind = "edges" if buckets else TYPE_NAMES[str(known.dtype)]
    item = _item(number, known.name, kind, known.size, known.missing_id)
    parts = {"edges": known.values.to_numpy()[1:]} if buckets else store_vocabulary(known)
    return item, as_arrays(parts, StoredVocabulary(place="", **item))


def check_model(stored: StoredEncoders, schema: Schema, num_dense: int, sizes: Mapping[str, int]) -> None:
    """Refuse encoders whose ids and numbers are not those of a model.

    Args:
        stored: the encoders.
        schema: the model's features.
        num_dense: its numeric columns.
        sizes: ids that the encoders give of each feature.

    Raises:
        ConfigError: names all that differs.
    """
    about = stored.about
    mine, theirs = [f["name"] for f in about["features"]], [f.name for f in schema]
    faults = []
    if mine != theirs:
        faults.append(f"the model has the features {', '.join(theirs)}; the data {', '.join(mine)}")
    else:
        wrong = [f for f in schema if f.ids == "index" and f.num_embeddings != sizes[f.name]]
        faults += [f"feature {f.name!r} has {f.num_embeddings} ids; in the data, {sizes[f.name]}" for f in wrong]
    if len(about["dense"]) != num_dense:
        faults.append(f"the model has {num_dense} numeric columns; the data {len(about['dense'])}")
    raise_faults(faults, "the encoders must be those of the data that the model was trained on")


def encoders_of(given: Dataset | str | Path, output: Output | None, schema: Schema, num_dense: int) -> StoredEncoders:
    """Encoders of an opened data folder, or of its path, for a model.

    Raises:
        ConfigError: not a data folder, or that of another model.
        DataError: the folder is damaged.
    """
    data = given if isinstance(given, Dataset) else open_dataset(given) if isinstance(given, str | Path) else None
    if data is None:
        raise ConfigError(
            "`encoders` must be a data set of recsys_embed.data.open_dataset, or its folder; got "
            f"{type(given).__name__}"
        )
    stored = pack_encoders(data, output)
    check_model(stored, schema, num_dense, {f.name: f.num_embeddings for f in data.manifest.features})
    return stored
