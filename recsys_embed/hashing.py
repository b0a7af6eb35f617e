"""Seeded 64-bit hashes in exact integer arithmetic: the definition every kernel matches bit for bit.

``splitmix64`` (Steele, Lea, Flood 2014) mixes, multiply-high (Lemire 2019) reduces to a row. Torch has no unsigned
64-bit arithmetic, so values are int64 holding the unsigned bits and every right shift masks the copied sign bits off.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_U64 = 1 << 64


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    value %= _U64
    return value - _U64 if value >= _U64 // 2 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def salt(seed: int, *parts: str | int) -> int:
    """A 64-bit salt (as int64) for one use of a hash, from the seed and stable names.

    Salting by name, never by position, keeps every feature's rows when features are added or reordered.

    >>> salt(0, "C1", 0) == salt(0, "C1", 0), salt(0, "C1", 0) == salt(0, "C1", 1)
    (True, False)
    """
    text = "\x1f".join([str(seed), *(f"{type(p).__name__[0]}{p}" for p in parts)])
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(ids: Tensor, salts: Tensor | int) -> Tensor:
    """Mix ``ids ^ salts`` to 64 uniform bits.

    Args:
        ids: int64, any shape, any value.
        salts: int64, broadcastable to ``ids``.

    Returns:
        int64 holding unsigned bits, the broadcast shape.

    >>> splitmix64(torch.tensor([0]), 0).item() % 2**64 == 0xE220A8397B1DCDAF
    True
    """
    z = (ids ^ salts) + _GAMMA
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def reduce_range(bits: Tensor, size: Tensor | int) -> Tensor:
    """Map 64 uniform bits to ``[0, size)`` as ``(bits * size) >> 64``, exact for ``size < 2**31``.

    >>> reduce_range(torch.tensor([-1, 0, 1 << 62]), 10).tolist()
    [9, 0, 2]
    """
    low = ((bits & 0xFFFFFFFF) * size) >> 32
    return (_shift_right(bits, 32) * size + low) >> 32


def hash_rows(ids: Tensor, salts: Tensor | int, size: Tensor | int) -> Tensor:
    """Rows in ``[0, size)``: int64 of the broadcast shape.

    >>> rows = hash_rows(torch.arange(1000), salt(0, "C1"), 7)
    >>> int(rows.min()), int(rows.max())
    (0, 6)
    """
    return reduce_range(splitmix64(ids, salts), size)


def hash_signs(ids: Tensor, salts: Tensor | int) -> Tensor:
    """Signs in {-1, +1} as int64 of the broadcast shape, from the top bit of the mix (Weinberger et al. 2009).

    >>> sorted(set(hash_signs(torch.arange(100), salt(0, "C1")).tolist()))
    [-1, 1]
    """
    return 1 - 2 * _shift_right(splitmix64(ids, salts), 63)


def sequence(salts: Tensor | int, numbers: Tensor) -> Tensor:
    """Salts of a numbered series of hashes under one salt: int64 of the broadcast shape; number 0 is the salt itself.

    >>> sequence(5, torch.arange(2))[0].item()
    5
    """
    # Steps of an odd constant with all bits in use keep `id ^ salt` of nearby ids and numbers apart.
    return salts + numbers * _GAMMA


_MURMUR1 = _signed(0x87C37B91114253D5)
_MURMUR2 = _signed(0x4CF5AD432745937F)


def _fmix64(h: Tensor) -> Tensor:
    h = (h ^ _shift_right(h, 33)) * _signed(0xFF51AFD7ED558CCD)
    h = (h ^ _shift_right(h, 33)) * _signed(0xC4CEB9FE1A85EC53)
    return h ^ _shift_right(h, 33)


def murmur3_words(ids: Tensor, seeds: Tensor | int) -> Tensor:
    """MurmurHash3_x64_128 of each id as 8 little-endian bytes, cut into four 32-bit words.

    These are the keys of thinc's (spaCy's) HashEmbed, whose function is called ``MurmurHash3_x86_128_uint64`` but
    computes the x64 variant.

    Args:
        ids: int64, any shape.
        seeds: uint32 values as int64, broadcastable to ``ids``.

    Returns:
        ``[*shape, 4]`` int64 holding four uint32 words.

    >>> murmur3_words(torch.tensor([0]), 0).shape
    torch.Size([1, 4])
    """
    # Eight bytes are a tail without a body, so only the first lane sees the key; the length 8 joins both lanes.
    k = ids * _MURMUR1
    k = ((k << 31) | _shift_right(k, 33)) * _MURMUR2
    h2 = k * 0 + (seeds ^ 8)
    h1 = (k ^ seeds ^ 8) + h2
    h2 = h2 + h1
    h1, h2 = _fmix64(h1), _fmix64(h2)
    h1 = h1 + h2
    h2 = h2 + h1
    return torch.stack([h1 & 0xFFFFFFFF, _shift_right(h1, 32), h2 & 0xFFFFFFFF, _shift_right(h2, 32)], -1)
