"""Sets of ids as arrays a lookup reads: which ids own a row, and which row that is.

A method that treats frequent ids apart needs to know them. Where ids are numbered by falling frequency this costs
nothing; elsewhere the set is kept as a bitmap with running counts (rank), or as the sorted members, whichever is
smaller. Rows stand in order of ids, so no array has to hold a permutation.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recsys_embed.core import index as base
from recsys_embed.core.index import IndexArray, IndexArrays
from recsys_embed.errors import ConfigError
from recsys_embed.utils.types import Parameter

Form = Literal["range", "bitmap", "sorted"]


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
        count: members.
        form: ``"range"`` where ids are ranks (no bytes), ``"bitmap"`` (12 bytes per 64 ids), ``"sorted"`` (4 bytes per
            member).

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
        """The set in whichever array form takes fewer bytes."""
        forms: tuple[Form, Form] = ("bitmap", "sorted")
        return min((cls(name, size, start, count, form) for form in forms), key=lambda index: index.nbytes)

    @property
    def length(self) -> int:
        """Entries of each array."""
        return {"range": 0, "bitmap": words_of(self.size), "sorted": self.count}[self.form]

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
        members = value.sort().values
        if (
            members.shape != (self.count,)
            or not bool((members.diff() > 0).all())
            or not 0 <= int(members[0]) <= int(members[-1]) < self.size
        ):
            raise ConfigError(
                f"index {self.name!r} takes {self.count} distinct ids of [0, {self.size}); got {len(members)}"
            )
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
        words = self._own("words", at, arrays)
        bits = (words.unsqueeze(1) >> torch.arange(64, device=words.device)) & 1
        return bits.view(-1).nonzero().squeeze(1)

    def damage(self, held: Mapping[str, Tensor]) -> str | None:
        if self.form == "sorted":
            values = held["values"]
            good = bool((values.diff() > 0).all()) and int(values[0]) >= 0 and int(values[-1]) < self.size
        else:
            words, ranks = held["words"], held["ranks"]
            rest = words_of(self.size) * 64 - self.size
            beyond = int(words[-1]) >> (64 - rest) if rest else 0
            whole = int(popcount(words).sum()) == self.count
            good = whole and beyond == 0 and bool((ranks_of(words) == ranks).all())
        return None if good else f"index {self.name!r} is damaged: not {self.count} ids of [0, {self.size})"

    def faults(self) -> list[str]:
        """What is wrong with the description, in words."""
        if self.start < 0 or self.count < 1 or self.start + self.count > self.size:
            return [
                f"index {self.name!r} must select at least one of ranks 0 to {self.size - 1}; "
                f"got {self.count} from {self.start}"
            ]
        return []


def bitmap(members: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Words int64 and ranks int32, both ``[words_of(size)]``, of distinct ``members`` in ``[0, size)``.

    >>> words, ranks = bitmap(torch.tensor([1, 64, 66]), 100)
    >>> words.tolist(), ranks.tolist()
    ([2, 5], [0, 1])
    """
    words = torch.zeros(words_of(size), dtype=torch.int64, device=members.device)
    # Members are distinct, so the sum of their bits is the union.
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


def members_of(text: str, size: int) -> Tensor:
    """Inverse of :func:`set_text`: ascending int64.

    Raises:
        ConfigError: not such a text, or of another size.
    """
    wanted = -(-size // 8)
    try:
        found = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), wanted + 1)
    except (binascii.Error, zlib.error, ValueError) as e:
        raise ConfigError(f"a set of ids is base64 of a compressed bitmap; got {text!r:.40} ({e})") from e
    bits = np.unpackbits(np.frombuffer(found, np.uint8))
    if len(found) != wanted or bits[size:].any():
        raise ConfigError(f"a set of ids of [0, {size}) holds {wanted} bytes; got {len(found)}, or ids beyond")
    return torch.from_numpy(np.flatnonzero(bits))


def ranks_of(words: Tensor) -> Tensor:
    """Members before each word: int32 of the shape of ``words``."""
    counts = popcount(words)
    return (counts.cumsum(0) - counts).to(torch.int32)


def popcount(x: Tensor) -> Tensor:
    """Bits set in each int64.

    >>> popcount(torch.tensor([0, 7, -1, -(2**63)])).tolist()
    [0, 3, 64, 1]
    """
    # Torch shifts copy the sign bit in; each mask takes those copies away again.
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56) & 0x7F


def positions(
    form: Form, ids: Tensor, params: tuple[Parameter, Parameter, Parameter], at: Parameter, arrays: IndexArrays | None
) -> Tensor:
    """Place of each id among the members in order of ids: int64 of the shape of ``ids``; -1 for others.

    Args:
        form: of the index.
        ids: int64, any value.
        params: start, count and size of the index: integers, or tensors that broadcast with ``ids``.
        at: where the index begins in ``arrays``: likewise.
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
