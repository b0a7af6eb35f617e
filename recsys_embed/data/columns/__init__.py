"""Kinds of columns, each in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recsys_embed.data.columns.base import (
    PARTS,
    Column,
    Encoded,
    Encoder,
    Fault,
    FeatureOutput,
    FixedColumn,
    LearnedColumn,
    Limits,
    Vocabularies,
)
from recsys_embed.data.columns.categorical import Categorical, CategoricalEncoder
from recsys_embed.data.columns.group import Group, GroupEncoder
from recsys_embed.data.columns.label import Label, LabelEncoder
from recsys_embed.data.columns.lists import ListColumn, ListEncoder
from recsys_embed.data.columns.numeric import Numeric, NumericEncoder
from recsys_embed.data.columns.sequence import Sequence
from recsys_embed.data.columns.time import Time, TimeEncoder
from recsys_embed.data.columns.vector import Vector, VectorEncoder
from recsys_embed.data.columns.vocabulary import FolderVocabularies
from recsys_embed.data.columns.weight import Weight, WeightEncoder
from recsys_embed.errors import ConfigError, DataError, UnknownNameError, unknown_name

KINDS: dict[str, tuple[type[Column], type[Encoder]]] = {
    "label": (Label, LabelEncoder),
    "categorical": (Categorical, CategoricalEncoder),
    "list": (ListColumn, ListEncoder),
    "sequence": (Sequence, ListEncoder),
    "numeric": (Numeric, NumericEncoder),
    "vector": (Vector, VectorEncoder),
    "time": (Time, TimeEncoder),
    "weight": (Weight, WeightEncoder),
    "group": (Group, GroupEncoder),
}
"""Every kind of column by name: its settings, and the encoder that reads back what one learned."""
LATER = {"text": "n-gram features", "cross": "cross features"}
"""Kinds that have a name already."""

__all__ = [
    "KINDS",
    "LATER",
    "PARTS",
    "Categorical",
    "Column",
    "Encoded",
    "Encoder",
    "Fault",
    "FeatureOutput",
    "FixedColumn",
    "Group",
    "Label",
    "LearnedColumn",
    "Limits",
    "ListColumn",
    "Numeric",
    "Sequence",
    "Time",
    "Vector",
    "Vocabularies",
    "Weight",
    "make_column",
    "read_encoder",
]


def make_column(values: Mapping[str, Any]) -> Column:
    """A column from plain values: ``name``, ``kind`` and the settings of the kind.

    Raises:
        UnknownNameError: no such kind or setting.
        ConfigError: a kind that comes later, or settings that are wrong; all of these at once.

    >>> make_column({"name": "user", "kind": "categorical", "min_count": 5})
    Categorical(name='user', column=None, ids='vocab', min_count=5, max_size=None, vocab=None)
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a column is its `name`, its `kind` and their settings; got {values!r:.80}")
    settings = dict(values)
    name, kind = settings.get("name"), settings.pop("kind", None)
    if isinstance(kind, str) and kind in LATER:
        raise ConfigError(
            f"column {name!r}: kind {kind!r} comes with {LATER[kind]}; until then leave the column out, or make it "
            "a category or a list in the table"
        )
    if kind is None:
        raise ConfigError(f"column {name!r} lacks a `kind`, one of {', '.join(KINDS)}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnknownNameError(f"column {name!r:.80}: {unknown_name('kind of column', str(kind), KINDS)}")
    made: Column = KINDS[kind][0].from_dict(settings)
    return made


def read_encoder(entry: Mapping[str, Any], source: Path | Vocabularies) -> Encoder:
    """The encoder of an entry of a manifest's ``columns``.

    Args:
        entry: the column with what it learned.
        source: of the vocabularies: the data folder, or what reads them from an exported file.

    Raises:
        DataError: the entry or a vocabulary is damaged.
    """
    try:
        learned = entry["learned"]
        column = make_column({k: v for k, v in entry.items() if k != "learned"})
    except (KeyError, ConfigError) as e:
        where = f"{source}: what schema.json" if isinstance(source, Path) else "what the file"
        raise DataError(f"{where} says of a column cannot be read ({e})") from e
    vocabularies = FolderVocabularies(source) if isinstance(source, Path) else source
    return KINDS[column.kind][1].restore(column, learned, vocabularies)
