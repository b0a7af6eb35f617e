"""splitmix64 over numpy arrays: hashing and reproducible random numbers that do not depend on a library's version."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
GOLDEN = 0x9E3779B97F4A7C15
_A, _B = U64(0xBF58476D1CE4E5B9), U64(0x94D049BB133111EB)


def mix64(x: NDArray[Any]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser of ``x + golden`` per element (Steele, Lea and Flood, OOPSLA 2014).

    >>> hex(int(mix64(np.array([0], np.uint64))[0]))
    '0xe220a8397b1dcdaf'
    """
    z = x.astype(U64) + U64(GOLDEN)
    t = z >> U64(30)
    z ^= t
    z *= _A
    np.right_shift(z, U64(27), out=t)
    z ^= t
    z *= _B
    np.right_shift(z, U64(31), out=t)
    z ^= t
    return z


def stream_key(seed: int, *tags: int) -> int:
    """A 64-bit key for the random stream named by ``tags`` under ``seed``."""
    key = seed & ((1 << 64) - 1)
    for tag in tags:
        key = int(mix64(np.array([key ^ (tag * GOLDEN & ((1 << 64) - 1))], U64))[0])
    return key


def random_bits(key: int, start: int, count: int) -> NDArray[np.uint64]:
    """Words ``start .. start+count`` of the stream ``key``: any piece of a stream can be made on its own."""
    return mix64((np.arange(start, start + count, dtype=U64)) * U64(GOLDEN) + U64(key))


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words to floats in the open interval (0, 1), on a grid of 2**-53.

    >>> float(uniform(np.array([0], np.uint64))[0]) > 0
    True
    """
    out: NDArray[np.float64] = ((bits >> U64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return out
