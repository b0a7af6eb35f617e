"""Codes: rows stored per id, for learned clusterings, product quantisation and semantic ids.

Codes below ``rows`` take ``bits = ceil(log2(rows))`` bits each. They are packed into consecutive 32-bit words,
lowest bits first, so that a code spans at most two words; a word of zeros follows the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.core.index import Index, IndexArray, IndexArrays
from recsys_embed.core.transforms import Sharing, Transform
from recsys_embed.errors import ConfigError
from recsys_embed.features import MAX_ROWS
from recsys_embed.utils.types import Parameter, Signature

_WORD = 32
_MASK = (1 << _WORD) - 1
_CHUNK = 1 << 18
WORDS = "codes"


def packed_words(count: int, bits: int) -> int:
    """Number of 32-bit words for ``count`` numbers of ``bits`` bits, including the final word of zeros."""
    return -(-count * bits // _WORD) + 1


def pack(values: Tensor, bits: int) -> Tensor:
    """Numbers ``[n]`` in ``[0, 2**bits)`` as int32 ``[packed_words(n, bits)]``, for 1 to 31 bits.

    >>> pack(torch.tensor([1, 2, 3]), 4).tolist()
    [801, 0]
    """
    blocks = -(-len(values) // _WORD)
    # 32 numbers fill exactly `bits` words, so blocks of 32 are packed alike.
    words = torch.zeros(blocks, bits + 1, dtype=torch.int64, device=values.device)
    padded = torch.nn.functional.pad(values.long(), (0, blocks * _WORD - len(values))).view(blocks, _WORD)
    for i in range(_WORD):
        word, shift = divmod(i * bits, _WORD)
        wide = padded[:, i] << shift
        words[:, word] |= wide & _MASK
        words[:, word + 1] |= wide >> _WORD
    flat = words[:, :bits].reshape(-1)[: packed_words(len(values), bits) - 1]
    return torch.nn.functional.pad(flat, (0, 1)).to(torch.int32)


def unpack(words: Tensor, places: Tensor, bits: Parameter, at: Parameter = 0) -> Tensor:
    """Numbers at ``places`` (int64, any shape) among those that :func:`pack` wrote from word ``at`` on: int64.

    >>> unpack(pack(torch.tensor([1, 2, 3]), 4), torch.tensor([2, 0]), 4).tolist()
    [3, 1]
    """
    first = places * bits
    word, shift = (first >> 5) + at, first & (_WORD - 1)
    both = (words[word].long() & _MASK) | (words[word + 1].long() << _WORD)
    return (both >> shift) & ((torch.ones_like(first) << bits) - 1)


@dataclass(frozen=True)
class CodesIndex(Index):
    """``columns`` codes in ``[0, rows)`` for each of ``size`` ids.

    Before codes are assigned, they are hashes of the ids.

    Args:
        name: unique in its program.
        size: number of ids.
        columns: codes per id.
        rows: upper bound of the codes, exclusive.
        salt: of the hash for the initial codes.

    >>> CodesIndex("codes", size=1000, columns=4, rows=16).nbytes  # 4 bits each, and a word
    2004
    """

    name: str
    size: int
    columns: int
    rows: int
    salt: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(1, (self.rows - 1).bit_length())

    @property
    def arrays(self) -> tuple[IndexArray, ...]:
        return (IndexArray(WORDS, torch.int32, packed_words(self.size * self.columns, self.bits)),)

    def faults(self) -> list[str]:
        if self.size < 1 or self.columns < 1 or not 1 <= self.rows <= MAX_ROWS:
            return [
                f"index {self.name!r} must hold at least one code for at least one id, each in [0, rows) with rows in "
                f"[1, {MAX_ROWS}]; got {self.columns} codes for {self.size} ids, rows {self.rows}"
            ]
        return []

    def initial(self, device: torch.device) -> dict[str, Tensor]:
        ids = torch.arange(self.size, device=device)
        salts = hashing.sequence(self.salt, torch.arange(self.columns, device=device))
        return self.packed(hashing.hash_rows(ids.unsqueeze(1), salts, self.rows))

    def packed(self, value: Tensor) -> dict[str, Tensor]:
        wanted = (self.size, self.columns)
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
        if tuple(value.shape) != wanted or not whole:
            raise ConfigError(
                f"index {self.name!r} takes integers {list(wanted)}, the codes of each id; "
                f"got {value.dtype} {list(value.shape)}"
            )
        low, high = (int(v) for v in value.aminmax())
        if low < 0 or high >= self.rows:
            raise ConfigError(f"codes of index {self.name!r} must be in [0, {self.rows}); got {low} to {high}")
        return {WORDS: pack(value.reshape(-1), self.bits)}

    def value(self, at: int = 0, arrays: IndexArrays | None = None) -> Tensor:
        return self._unpacked(self._own(WORDS, at, arrays)).view(self.size, self.columns)

    def damage(self, held: Mapping[str, Tensor]) -> str | None:
        if all(int(part.max()) < self.rows for part in self._parts(held[WORDS])):
            return None
        return f"index {self.name!r} is damaged: its codes must be in [0, {self.rows})"

    def _unpacked(self, words: Tensor) -> Tensor:
        return torch.cat(list(self._parts(words)))

    def _parts(self, words: Tensor) -> Iterator[Tensor]:
        """The codes, in pieces."""
        count = self.size * self.columns
        for start in range(0, count, _CHUNK):
            places = torch.arange(start, min(start + _CHUNK, count), device=words.device)
            yield unpack(words, places, self.bits)


@dataclass(frozen=True)
class Codes(Transform):
    """Maps an id to its code number ``column`` in the index; ids outside the index have no row."""

    index: CodesIndex
    column: int = 0

    def signature(self) -> Signature:
        return (Codes,)

    def parameters(self) -> tuple[int, ...]:
        return (self.index.size, self.index.columns, self.column, self.index.bits)

    @staticmethod
    def map(
        signature: Signature,
        ids: Tensor,
        params: Sequence[Parameter],
        at: Parameter = 0,
        arrays: IndexArrays | None = None,
    ) -> Tensor:
        if arrays is None:
            raise RuntimeError("a lookup of codes was run without their arrays")
        size, columns, column, bits = params
        inside = (ids >= 0) & (ids < size)
        places = torch.where(inside, ids, 0) * columns + column
        return torch.where(inside, unpack(arrays.held[WORDS], places, bits, at), -1)

    @property
    def may_be_absent(self) -> bool:
        return True

    @property
    def needs(self) -> CodesIndex:
        return self.index

    def encoded(self) -> tuple[str, dict[str, int]]:
        index = self.index
        fields = {"size": index.size, "stride": index.columns, "offset": self.column, "bits": index.bits}
        return "codes", fields

    def reach(self, ids: int) -> int | None:
        return self.index.rows

    def sharing(self, ids: int, rows: int) -> Sharing:
        return Sharing(rows=self.index.rows, key=("codes", self.index.name, self.column))
