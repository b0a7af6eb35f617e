"""Vocabularies that are looked up where they lie in a mapped file: nothing is read but what a search touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recsys_embed.core.hashing import splitmix64
from recsys_embed.data.columns.vocabulary import VALUE_TYPES, ValueVocabulary
from recsys_embed.data.serving.stored import StoredVocabulary
from recsys_embed.data.vocab import OOV_ID
from recsys_embed.errors import ConfigError

_SEED = 0x5E7B
_PROBES = 64
"""Values of one hash that a search looks at; of 2^31 values no 16 have one."""
_SLICE = 4 << 20
"""Bytes of text that are hashed or compared at once."""
_I32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class IntegerIds:
    """Ids of integers, by binary search.

    Args:
        keys: int32 or int64 [K], sorted.
        ids: int32 [K].

    >>> lookup = IntegerIds.of(np.array([7, 2**60]), np.array([1, 2]))
    >>> lookup.keys.dtype, lookup(np.array([2**60, 5, 7])).tolist()
    (dtype('int64'), [2, 0, 1])
    """

    keys: NDArray[Any]
    ids: NDArray[np.int32]

    @classmethod
    def of(cls, values: NDArray[Any], ids: NDArray[Any]) -> IntegerIds:
        """From int32 or int64 values in any order; 64 bits that 32 can hold become these."""
        order = np.argsort(values, kind="stable")
        keys = values[order]
        if len(keys) and _I32.min <= keys[0] and keys[-1] <= _I32.max:
            keys = keys.astype(np.int32)
        return cls(keys, ids[order].astype(np.int32))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"keys": self.keys, "ids": self.ids}

    def __call__(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """Ids of values [n], 0 for unknown ones."""
        if not len(self.keys):
            return np.zeros(len(values), np.int32)
        wanted, fits = values, None
        if values.dtype.itemsize > self.keys.dtype.itemsize:
            fits = (values >= _I32.min) & (values <= _I32.max)
            wanted = np.where(fits, values, 0).astype(np.int32)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        known = self.keys[at] == wanted
        found: NDArray[np.int32] = np.where(known if fits is None else known & fits, self.ids[at], np.int32(OOV_ID))
        return found

    def values(self) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """All values and their ids."""
        return self.keys, self.ids

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The values at some places of ``ids``."""
        return self.keys[places].astype(np.int64)


@dataclass(frozen=True)
class TextIds:
    """Ids of strings, by binary search among their hashes and comparison with the strings of equal hash.

    Args:
        hashes: int32 [K], sorted as unsigned numbers.
        ids: int32 [K].
        ends: int32 or int64 [K], where each string ends in ``text``.
        text: uint8 [n], the strings in UTF-8 one after another.

    >>> lookup = TextIds.of(pl.Series(["ann", "zoë"]), np.array([1, 2]))
    >>> lookup(pl.Series(["zoë", "bob", "", "ann"])).tolist()
    [2, 0, 0, 1]
    """

    hashes: NDArray[np.int32]
    ids: NDArray[np.int32]
    ends: NDArray[Any]
    text: NDArray[np.uint8]

    @classmethod
    def of(cls, values: pl.Series, ids: NDArray[Any]) -> TextIds:
        """From strings that differ, in any order.

        Raises:
            ConfigError: more strings have one hash than a search looks at.
        """
        text, lengths = _bytes(values)
        hashes = _hashes(text, lengths)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        if len(hashes) > _PROBES and (hashes[_PROBES:] == hashes[:-_PROBES]).any():
            raise ConfigError(f"more than {_PROBES} values of a vocabulary have one hash: leave some of them out")
        text, lengths = _bytes(values.gather(order))
        ends = np.cumsum(lengths)
        return cls(
            hashes.view(np.int32),
            ids[order].astype(np.int32),
            ends.astype(np.int32) if not len(ends) or ends[-1] <= _I32.max else ends,
            text,
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"hashes": self.hashes, "ids": self.ids, "ends": self.ends, "text": self.text}

    def __call__(self, values: pl.Series) -> NDArray[np.int32]:
        """Ids of strings [n] without nulls, 0 for unknown ones; each distinct one should be there once."""
        found = np.zeros(len(values), np.int32)
        known = self.hashes.view(np.uint32)
        text, lengths = _bytes(values)
        ends = np.cumsum(lengths)
        wanted = _hashes(text, lengths)
        at = np.searchsorted(known, wanted)
        left = np.flatnonzero(lengths > 0)
        for _ in range(_PROBES):
            left = left[at[left] < len(known)]
            left = left[known[at[left]] == wanted[left]]
            if not len(left):
                break
            place = at[left]
            stop = self.ends[place].astype(np.int64)
            start = np.where(place > 0, self.ends[place - 1], 0).astype(np.int64)
            # The lengths are compared first, so that no more is read than there was asked for.
            same = stop - start == lengths[left]
            same[same] = self._equal(start[same], text, (ends - lengths)[left[same]], lengths[left[same]])
            found[left[same]] = self.ids[place[same]]
            left = left[~same]
            at[left] += 1
        return found

    def _equal(
        self, start: NDArray[np.int64], text: NDArray[np.uint8], other: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether strings of this vocabulary from ``start`` on are those of ``text`` from ``other`` on."""
        equal = np.empty(len(start), bool)
        for part in _slices(lengths):
            inside, firsts = _inside(lengths[part])
            mine = self.text.take(np.repeat(start[part], lengths[part]) + inside, mode="clip")
            theirs = text[np.repeat(other[part], lengths[part]) + inside]
            equal[part] = np.logical_and.reduceat(mine == theirs, firsts)
        return equal

    def values(self) -> tuple[list[str], NDArray[np.int32]]:
        """All values and their ids."""
        whole, ends = self.text.tobytes(), self.ends.tolist()
        return [whole[a:b].decode() for a, b in pairwise([0, *ends])], self.ids

    def at(self, places: NDArray[np.int64]) -> list[str]:
        """The values at some places of ``ids``."""
        starts = np.where(places > 0, self.ends[places - 1], 0)
        return [self.text[a:b].tobytes().decode() for a, b in zip(starts, self.ends[places], strict=True)]


def _bytes(values: pl.Series) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Strings without nulls one after another in UTF-8, and their lengths."""
    if not len(values):
        return np.zeros(0, np.uint8), np.zeros(0, np.int64)
    joined: str = values.str.join("").item()
    return np.frombuffer(joined.encode(), np.uint8), values.str.len_bytes().to_numpy().astype(np.int64)


def _slices(lengths: NDArray[np.int64]) -> Iterator[slice]:
    """Consecutive strings of at most ``_SLICE`` bytes, or one longer one, for work that takes many bytes per byte."""
    if len(lengths) and lengths.sum() <= _SLICE:
        yield slice(0, len(lengths))
        return
    ends, start = np.cumsum(lengths), 0
    while start < len(lengths):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _SLICE, side="right")))
        yield slice(start, stop)
        start = stop


def _inside(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The place of each byte in its string, for strings one after another, and where each string begins."""
    firsts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(firsts, lengths), firsts


def _hashes(text: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.uint32]:
    """A hash of each of some strings: the sum of their bytes times random odd numbers by position (Dietzfelbinger)."""
    longest = int(lengths.max(initial=0))
    factors = splitmix64(torch.arange(longest + 1), _SEED).numpy().view(np.uint64) | np.uint64(1)
    sums = np.zeros(len(lengths), np.uint64)
    at = 0
    for part in _slices(lengths):
        inside, firsts = _inside(lengths[part])
        terms = (text[at : at + len(inside)].astype(np.uint64) + np.uint64(1)) * factors[inside]
        at += len(inside)
        # A string of no bytes would make `reduceat` take its neighbour's.
        there = lengths[part] > 0
        if there.any():
            sums[part][there] = np.add.reduceat(terms, firsts[there])
    mixed = splitmix64(torch.from_numpy((sums + factors[lengths]).view(np.int64)), 0).numpy().view(np.uint64)
    return (mixed >> np.uint64(32)).astype(np.uint32)


@dataclass(frozen=True)
class MappedVocabulary:
    """A vocabulary of a file, for encoders in place of a :class:`ValueVocabulary`.

    Args:
        name: of the vocabulary.
        dtype: of its values.
        size: rows of the table.
        missing_id: id of a missing value.
        lookup: of its values.
    """

    name: str
    dtype: pl.DataType
    size: int
    missing_id: int
    lookup: IntegerIds | TextIds
    missing_count: int = field(default=0, repr=False)
    unknown_count: int = field(default=0, repr=False)

    def find(self, keys: pl.Series) -> pl.Series:
        """Ids of values in the vocabulary's type: Int32, 0 for unknown ones and nulls."""
        if isinstance(self.lookup, TextIds):
            distinct = keys.unique().drop_nulls()
            known = pl.DataFrame({"value": distinct, "id": self.lookup(distinct)})
            found = keys.to_frame("value").join(known, on="value", how="left", maintain_order="left")
            return found["id"].fill_null(OOV_ID)
        ids = pl.Series("id", self.lookup(integers(keys)))
        gone = keys.is_null()
        return ids.set(gone, OOV_ID) if gone.any() else ids

    @cached_property
    def places(self) -> NDArray[np.int32]:
        """Where each id is in the lookup's ``ids``, -1 for those that stand for no value: int32 ``[size]``."""
        found = np.full(self.size, -1, np.int32)
        found[self.lookup.ids] = np.arange(len(self.lookup.ids), dtype=np.int32)
        return found

    def values_of(self, ids: NDArray[np.int64]) -> pl.Series:
        """The values of ids ``[n]`` of ``[0, size)`` or -1; null for those that stand for no value."""
        places = np.where(ids < 0, -1, self.places[ids]).astype(np.int64)
        distinct, at = np.unique(places, return_inverse=True)
        known = distinct[distinct >= 0]
        values = from_integers(self.lookup.at(known), self.dtype)
        if len(known) < len(distinct):
            values = pl.concat([pl.Series("value", [None], dtype=self.dtype), values])
        return values.gather(at)


def integers(keys: pl.Series) -> NDArray[np.int64]:
    """Values that are not strings as int64, of which nulls are anything; unsigned ones keep their bits."""
    if keys.dtype == pl.UInt64:
        return keys.fill_null(0).to_numpy().view(np.int64)
    return keys.to_physical().cast(pl.Int64).fill_null(0).to_numpy()


def from_integers(values: NDArray[np.int64] | list[str], dtype: pl.DataType) -> pl.Series:
    """Values of a type by what :func:`integers` made of them, or the strings that they are."""
    if isinstance(values, list):
        return pl.Series("value", values, dtype=pl.String)
    found = pl.Series("value", values.view(np.uint64) if dtype == pl.UInt64 else values)
    return (found.cast(pl.Int32) if dtype == pl.Date else found).cast(dtype)


def store_vocabulary(known: ValueVocabulary) -> dict[str, NDArray[Any]]:
    """The arrays of a vocabulary of values."""
    if known.dtype == pl.String:
        return TextIds.of(known.values, known.ids).arrays()
    return IntegerIds.of(integers(known.values), known.ids).arrays()


def make_lookup(item: StoredVocabulary, arrays: Mapping[str, NDArray[Any]]) -> IntegerIds | TextIds:
    """The lookup of a stored vocabulary."""
    parts = {part: arrays[item.array(part)] for part in item.parts}
    return TextIds(**parts) if item.type == "string" else IntegerIds(**parts)


def make_vocabulary(item: StoredVocabulary, arrays: Mapping[str, Any]) -> MappedVocabulary | ValueVocabulary:
    """A vocabulary of a file, or the edges of buckets."""
    if item.type == "edges":
        edges = np.concatenate([[-np.inf], arrays[item.array("edges")]])
        ids = np.arange(1, len(edges) + 1, dtype=np.int32)
        return ValueVocabulary(item.name, pl.Series("value", edges), ids, np.zeros(len(edges), np.int64), 0, 0, 0)
    return MappedVocabulary(item.name, VALUE_TYPES[item.type], item.size, item.missing_id, make_lookup(item, arrays))
