"""Items for raw rows: names of those that a model finds, of rows in memory as arrays, of files as a file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recsys_embed.data.batch import Batch
from recsys_embed.data.columns import Categorical, Encoder, ListColumn
from recsys_embed.data.columns.categorical import VocabularyEncoder
from recsys_embed.data.columns.lists import ListSettings
from recsys_embed.data.serving.lookups import MappedVocabulary
from recsys_embed.data.serving.read import rows_of
from recsys_embed.data.serving.row_encoder import EncodedRows
from recsys_embed.data.serving.score import ROW, SCORE, Output, batches_of, staged
from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.data.serving.table_rows import TableEncoder
from recsys_embed.data.sources import Source
from recsys_embed.data.sources.base import Chunk
from recsys_embed.errors import ConfigError
from recsys_embed.utils.types import BagIds, RowsLike

Find = Callable[[Batch, BagIds | None], tuple[NDArray[np.int64], NDArray[np.float32]]]
"""Ids of items and their scores ``[B, k]`` for a batch, best first; id -1 where there is none left."""
_ITEM_BYTES = 64
"""Measured peak per recommended item of a file that is written, names of 12 bytes."""
_EXCLUDED = "\0excluded"
"""Column of an encoded frame: ids of the items that are left out."""


class UserEncoder(TableEncoder):
    """Rows of users, of which the columns of the item need not be known.

    Args:
        stored: encoders as a file holds them.
        item: the feature of the candidate.
        unread: features and numeric columns that do not enter the user's vector.
        exclude: columns of the rows that hold items to leave out: one item each, a list of them, or delimited text as
            a list of the model's is read.

    Raises:
        ConfigError: the items have no names.
    """

    item: VocabularyEncoder
    known: MappedVocabulary
    exclude: tuple[str, ...]

    def __init__(self, stored: StoredEncoders, item: str, unread: Collection[str], exclude: Sequence[str] = ()) -> None:
        super().__init__(stored, unread)
        found = [e for e in self.encoders if item in (f.name for f in e.features)]
        of_item = found[0] if found else None
        if not isinstance(of_item, VocabularyEncoder) or not isinstance(of_item.known, MappedVocabulary):
            raise ConfigError(
                f"feature {item!r} is no category, so that its ids have no names: recommend by ids, "
                "`recommend(dense, ids, k)`"
            )
        self.item, self.known, self.exclude = of_item, of_item.known, tuple(exclude)
        self.columns = tuple(dict.fromkeys([*self.columns, *self.exclude]))

    def others(self, types: Mapping[str, pl.DataType]) -> list[Encoder]:
        return [self._excluder(name, types[name]) for name in self.exclude if name in types]

    def _excluder(self, name: str, dtype: pl.DataType) -> Encoder:
        """The encoder of a column with items to leave out: by the item's vocabulary, and lists uncut."""
        lists = [e.column for e in self.encoders if isinstance(e.column, ListSettings) and e.column.source == name]
        column: Any = Categorical(name)
        if lists or isinstance(dtype, pl.List | pl.Array):
            split = [c for c in lists if c.separator is not None]
            column = (
                ListColumn(name, separator=split[0].separator, values=split[0].values) if split else ListColumn(name)
            )
        made: Encoder = column.encoder(known=self.item.known, dtype=self.item.dtype)
        return made

    def encode(self, source: Source, chunk: Chunk) -> EncodedRows:
        rows = super().encode(source, chunk)
        if not self.exclude:
            return rows
        encoded = {e.column.name: e.encode(rows.frame[e.column.source]) for e in self.others(rows.frame.schema)}
        ids = [next(iter(made.columns.values())).alias(name) for name, made in encoded.items()]
        excluded = pl.DataFrame(ids).select(pl.concat_list(pl.all())).to_series().alias(_EXCLUDED)
        counts = {**rows.counts, **{name: made.counts for name, made in encoded.items()}}
        return EncodedRows(rows.batch, rows.frame.with_columns(excluded), rows.bad, counts)

    def named(self, size: int) -> NDArray[np.bool_]:
        """The ids that stand for an item: bool ``[size]``."""
        return np.asarray(self.known.places >= 0)[:size]


def _found(encoder: UserEncoder, frame: pl.DataFrame, batches: list[Batch], find: Find) -> Iterator[Any]:
    """What is found for each batch of some rows."""
    start = 0
    for batch in batches:
        excluded = None
        if encoder.exclude:
            lists = frame[_EXCLUDED].slice(start, len(batch.label))
            lengths = torch.from_numpy(lists.list.len().to_numpy().astype(np.int64))
            values = lists.filter(lists.list.len() > 0).explode().to_numpy().astype(np.int64)
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            excluded = BagIds(torch.from_numpy(values), offsets)
        yield find(batch, excluded)
        start += len(batch.label)


def recommend_rows(
    encoder: UserEncoder, find: Find, rows: RowsLike, k: int, batch_size: int
) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
    """Names of items, objects ``[n, k]``, and their scores float32 ``[n, k]``, of rows in memory.

    Raises:
        ConfigError: no table, or one row that is in no list; columns that are absent or of another type.
        DataError: values that cannot be used, with row, column and reason.
    """
    ids, scores = [np.zeros((0, k), np.int64)], [np.zeros((0, k), np.float32)]
    if not isinstance(rows, Sequence) or isinstance(rows, str) or len(rows):
        with staged(encoder.open(rows_of(rows, encoder))) as source:
            for frame, batches in batches_of(encoder, source, batch_size):
                for found, best in _found(encoder, frame, batches, find):
                    ids.append(found)
                    scores.append(best)
    whole = np.concatenate(ids)
    names = np.empty(whole.size, object)
    names[:] = encoder.known.values_of(whole.ravel()).to_list()
    return names.reshape(whole.shape), np.concatenate(scores)


def recommended(encoder: UserEncoder, find: Find, k: int) -> Output:
    """A row for each of the ``k`` items that are found for a row: ``row`` from 0, ``rank`` from 1, ``item`` and
    ``score``."""

    def make(frame: pl.DataFrame, batches: list[Batch]) -> pl.DataFrame:
        pairs = list(_found(encoder, frame, batches, find))
        ids, scores = (np.concatenate(part) for part in zip(*pairs, strict=True))
        rows, places = np.nonzero(ids >= 0)
        items = encoder.known.values_of(ids[rows, places])
        numbers = {ROW: rows.astype(np.int64), "rank": (places + 1).astype(np.int32)}
        return pl.DataFrame({**numbers, "item": items, SCORE: scores[rows, places]})

    columns = {ROW: pl.Int64(), "rank": pl.Int32(), "item": encoder.known.dtype, SCORE: pl.Float32()}
    return Output(columns, make, k * _ITEM_BYTES)
