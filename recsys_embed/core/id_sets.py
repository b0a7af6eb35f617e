"""Sets of ids as arrays that a lookup reads: which ids have their own row, and which row.

A method that treats frequent ids separately has to know them. If ids are numbered by descending frequency, this takes
no memory; otherwise the set is stored as a bitmap with ranks or as sorted ids, whichever is smaller. Rows are in the
order of ids, so no permutation has to be stored.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_embed.core import index as base
from recsys_embed.core.index import IndexArray, IndexArrays
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.utils.types import Parameter

Form = Literal["range", "bitmap", "sorted"]
_PIECE = 1 << 20  # bytes of a bitmap that are unpacked at once
_INPUT = 1 << 16
_WORDS = 1 << 14
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # set bits of each byte


def words_of(size: int) -> int:
    """64-bit words of a bitmap over ``size`` ids."""
    return -(-size // 64)


@dataclass(frozen=True)
class IdSet(base.Index):
    """The ids of ``[0, size)`` whose frequency rank lies in ``[start, start + count)``.

    Args:
        name: unique in its program.
        size: number of ids.
        start: first rank; 0 is the most frequent id.
        count: number of ids in the set.
        form: ``"range"`` if ids are ranks (no bytes), ``"bitmap"`` (12 bytes per 64 ids), ``"sorted"`` (4 bytes per id
            of the set).

    >>> IdSet.smallest("hot", size=1000, start=0, count=500).form, IdSet.smallest("hot", 10**6, 0, 10).nbytes
    ('bitmap', 40)
    """

    name: str
    size: int
    start: int
    count: int
    form: Form = "range"

    @classmethod
    def smallest(cls, name: str, size: int, start: int, count: int) -> IdSet:
        """The set as a bitmap or sorted ids, whichever takes fewer bytes."""
        forms: tuple[Form, Form] = ("bitmap", "sorted")
        return min((cls(name, size, start, count, form) for form in forms), key=lambda index: index.nbytes)

    @property
    def length(self) -> int:
        """Elements of each array."""
        if self.form == "bitmap":
            return words_of(self.size)
        return self.count if self.form == "sorted" else 0

    @property
    def arrays(self) -> tuple[IndexArray, ...]:
        if self.form == "bitmap":
            return IndexArray("words", torch.int64, self.length), IndexArray("ranks", torch.int32, self.length)
        return (IndexArray("values", torch.int32, self.length),) if self.form == "sorted" else ()

    @property
    def searched(self) -> int:
        return self.count if self.form == "sorted" else 0

    @property
    def by_frequency(self) -> bool:
        return True

    def initial(self, device: torch.device) -> dict[str, Tensor]:
        return self._arrays_of(torch.arange(self.start, self.start + self.count, device=device))

    def ranked(self, ids: Tensor) -> dict[str, Tensor]:
        return self._arrays_of(ids[self.start : self.start + self.count].sort().values)

    def packed(self, value: Tensor) -> dict[str, Tensor]:
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
        members = value.long().sort().values if whole and value.dim() == 1 else value
        if not whole or members.shape != (self.count,) or not rises_within(members, self.size):
            got = len(members) if whole and value.dim() == 1 else f"{value.dtype} {list(value.shape)}"
            raise ConfigError(f"index {self.name!r} takes {self.count} distinct ids of [0, {self.size}); got {got}")
        return self._arrays_of(members)

    def _arrays_of(self, members: Tensor) -> dict[str, Tensor]:
        if self.form == "sorted":
            return {"values": members.to(torch.int32)}
        words, ranks = bitmap(members, self.size)
        return {"words": words, "ranks": ranks}

    def value(self, at: int = 0, arrays: IndexArrays | None = None) -> Tensor:
        """Ids of the set in ascending order: int64 ``[count]``."""
        if self.form == "range":
            return torch.arange(self.start, self.start + self.count)
        if self.form == "sorted":
            return self._own("values", at, arrays).long()
        # In pieces, because a word takes 512 bytes meanwhile.
        places, found = torch.arange(64, device=self._own("words", at, arrays).device), []
        for number, words in enumerate(self._own("words", at, arrays).split(_WORDS)):
            bits = (words.unsqueeze(1) >> places) & 1
            found.append(bits.view(-1).nonzero().squeeze(1) + number * _WORDS * 64)
        return torch.cat(found)

    def damage(self, held: Mapping[str, Tensor]) -> str | None:
        if self.form == "sorted":
            good = rises_within(held["values"], self.size)
        else:
            good = is_bitmap(held["words"], held["ranks"], self.size, self.count)
        return None if good else f"index {self.name!r} is damaged: not {self.count} ids of [0, {self.size})"

    def faults(self) -> list[str]:
        """Faults of the description, one sentence each."""
        if self.start < 0 or self.count < 1 or self.start + self.count > self.size:
            return [
                f"index {self.name!r} must select at least one of ranks 0 to {self.size - 1}; "
                f"got {self.count} from {self.start}"
            ]
        return []


def rises_within(values: Tensor, size: int) -> bool:
    """Whether integers ``[n]`` rise and lie in ``[0, size)``: compared, for their differences may be too wide.

    >>> rises_within(torch.tensor([0, 1_500_000_000, -1_500_000_000, 5], dtype=torch.int32), 2**31 - 1)
    False
    """
    ends = not len(values) or 0 <= int(values[0]) <= int(values[-1]) < size
    return ends and bool((values[1:] > values[:-1]).all())


def is_bitmap(words: Tensor, ranks: Tensor, size: int, count: int) -> bool:
    """Whether they are what :func:`bitmap` makes of ``count`` ids of ``[0, size)``."""
    rest = words_of(size) * 64 - size
    beyond = int(words[-1]) >> (64 - rest) if rest else 0
    counts = popcount(words)
    before = counts.cumsum(0)
    return beyond == 0 and int(before[-1]) == count and bool((before - counts == ranks).all())


def bitmap(members: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Words int64 and ranks int32, both ``[words_of(size)]``, of distinct ``members`` in ``[0, size)``.

    >>> words, ranks = bitmap(torch.tensor([1, 64, 66]), 100)
    >>> words.tolist(), ranks.tolist()
    ([2, 5], [0, 1])
    """
    words = torch.zeros(words_of(size), dtype=torch.int64, device=members.device)
    # Ids are distinct, so the sum of their bits is the union.
    words.index_add_(0, members >> 6, torch.ones_like(members) << (members & 63))
    return words, ranks_of(words)


def set_text(members: Tensor, size: int) -> str:
    """Distinct ``members`` in ``[0, size)`` as a text for plans: base64 of a compressed bitmap; at most size / 6 long.

    >>> members_of(set_text(torch.tensor([64, 1]), 100), 100)
    tensor([ 1, 64])
    """
    bits = np.zeros(size, np.bool_)
    bits[members.cpu().numpy()] = True
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()


def members_of(text: str, size: int, count: int | None = None) -> Tensor:
    """Inverse of :func:`set_text`: ascending int64.

    A short text may stand for billions of ids, so it is counted in pieces before memory is taken for them.

    Args:
        text: the set.
        size: number of ids.
        count: members that are expected; None for any number.

    Raises:
        ConfigError: not such a text, or of another size or number of members.
    """
    length = held = 0
    for piece in _bitmap_pieces(text, size):
        length += len(piece)
        held += int(_BITS[piece].sum())
    unfit = ConfigError(f"a set of ids of [0, {size}) holds {-(-size // 8)} bytes; got {length}, or ids beyond")
    if length != -(-size // 8):
        raise unfit
    if count is not None and held != count:
        raise ConfigError(f"a set takes {count} distinct ids of [0, {size}) here; got {held}")
    found, at, start = np.empty(held, np.int64), 0, 0
    for piece in _bitmap_pieces(text, size):
        members = np.flatnonzero(np.unpackbits(piece))
        found[at : at + len(members)] = members + start
        at, start = at + len(members), start + 8 * len(piece)
    if at and found[-1] >= size:
        raise unfit
    return torch.from_numpy(found)


def members_of_texts(texts: Mapping[str, str], indexes: Sequence[base.Index], size: int) -> dict[str, Tensor]:
    """Members of sets that a plan holds, by the names of their indexes, each of as many ids as its index.

    Raises:
        ConfigError: a name that no set of ids has, or a text that is not such a set.
    """
    counts = {index.name: index.count for index in indexes if isinstance(index, IdSet) and index.arrays}
    unknown = [
        f"no set of ids {name!r} here; there are: {', '.join(counts) or 'none'}" for name in texts.keys() - counts
    ]
    raise_faults(sorted(unknown), "sets of ids")
    return {name: members_of(text, size, counts[name]) for name, text in texts.items()}


def _bitmap_pieces(text: str, size: int) -> Iterator[NDArray[np.uint8]]:
    """Bytes of the bitmap in pieces, at most one byte more than ``size`` ids take."""
    left = -(-size // 8) + 1
    try:
        packed, decoder = base64.b64decode(text, validate=True), zlib.decompressobj()
        for start in range(0, len(packed), _INPUT):
            rest = packed[start : start + _INPUT]
            while rest and left > 0:
                piece = decoder.decompress(rest, min(left, _PIECE))
                rest = decoder.unconsumed_tail
                left -= len(piece)
                yield np.frombuffer(piece, np.uint8)
    except (binascii.Error, zlib.error, ValueError) as e:
        raise ConfigError(f"a set of ids is base64 of a compressed bitmap; got {text!r:.40} ({e})") from e


def ranks_of(words: Tensor) -> Tensor:
    """Members before each word: int32 of the shape of ``words``."""
    counts = popcount(words)
    return (counts.cumsum(0) - counts).to(torch.int32)


def popcount(x: Tensor) -> Tensor:
    """Bits set in each int64.

    >>> popcount(torch.tensor([0, 7, -1, -(2**63)])).tolist()
    [0, 3, 64, 1]
    """
    # Torch's right shifts copy the sign bit; the masks clear the copies.
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56) & 0x7F


def positions(
    form: Form, ids: Tensor, params: tuple[Parameter, Parameter, Parameter], at: Parameter, arrays: IndexArrays | None
) -> Tensor:
    """Rank of each id in its set, in order of ids: int64 of the shape of ``ids``; -1 for ids that are not in it.

    Args:
        form: of the index.
        ids: int64, any value.
        params: start, count and size of the index: integers, or tensors that broadcast with ``ids``.
        at: offset of the index in ``arrays``: likewise.
        arrays: of the module; not needed for ranges.
    """
    start, count, size = params
    if form == "range":
        place = ids - start
        return torch.where((place >= 0) & (place < count), place, -1)
    if arrays is None:
        raise RuntimeError("a lookup with index arrays was run without them")
    if form == "bitmap":
        inside = (ids >= 0) & (ids < size)
        word = torch.where(inside, (ids >> 6) + at, at)
        bits, bit = arrays.held["words"][word], ids & 63
        below = popcount(bits & ((torch.ones_like(ids) << bit) - 1))
        member = inside & (((bits >> bit) & 1) != 0)
        return torch.where(member, arrays.held["ranks"][word].long() + below, -1)
    last, values = at + count, arrays.held["values"]
    place = torch.zeros_like(ids) + (at - 1)
    for step in reversed(range(arrays.longest.bit_length())):
        ahead = place + (1 << step)
        known = values[torch.minimum(ahead, torch.zeros_like(ids) + (last - 1))]
        place = torch.where((ahead < last) & (known <= ids), ahead, place)
    found = (place >= at) & (values[torch.maximum(place, torch.zeros_like(ids) + at)] == ids)
    return torch.where(found, place - at, -1)
