"""Stochastic rounding: a number becomes one of its two neighbours, with probabilities by which the mean is kept.

Rows of few bits that train need it: steps are smaller than the distance of two codes, so that rounding to nearest would
drop them. The random bits of an element are a function of a seed, the optimizer's step, the row and the column, so
that results do not depend on threads, chunks or backends; all kernels match these definitions bit for bit
(``ops/cpu/rounding.inl``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_embed.core.hashing import as_signed, mix64

_GAMMA = 0x9E3779B97F4A7C15
_LOW = 0xFFFFFFFF


def random_words(rows: Tensor, width: int, seed: int, step: int) -> Tensor:
    """32 random bits per element of rows: int64 ``[n, width]`` in ``[0, 2**32)``.

    Args:
        rows: int64 ``[n]``, of the storage.
        width: columns.
        seed: of the table, any integer.
        step: of the optimizer.

    >>> words = random_words(torch.arange(2), 3, seed=0, step=1)
    >>> words.shape, bool((words == random_words(torch.arange(2), 3, seed=0, step=2)).any())
    (torch.Size([2, 3]), False)
    """
    base = mix64(torch.tensor(as_signed(seed + step * _GAMMA), device=rows.device))
    key = mix64(base ^ rows).unsqueeze(1)
    low, high = key & _LOW, (key >> 32) & _LOW
    # Products of numbers below 2^32 wrap in int64, which keeps their low 32 bits.
    x = (low + torch.arange(width, device=rows.device) * 0x9E3779B9) & _LOW
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = x ^ high
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def uniform(words: Tensor) -> Tensor:
    """Float32 in ``[0, 1)``, multiples of 2^-24, of 32 random bits."""
    return (words >> 8).float() * 2.0**-24


def round_to_codes(values: Tensor, step: Tensor | float, bits: int, words: Tensor | None) -> Tensor:
    """Unsigned codes ``q + 2**(bits - 1)`` of values ``q * step``: uint8 of the shape of ``values``.

    Values beyond the codes become the outermost ones; NaN becomes 0.

    Args:
        values: float32 ``[n, width]``.
        step: distance of two codes, > 0; float32 ``[n, 1]`` if rows have their own.
        bits: 8, 4 or 2.
        words: of :func:`random_words`; None rounds to nearest, ties to even.

    >>> codes = round_to_codes(torch.full((10_000, 1), 0.3), 1.0, 8, random_words(torch.arange(10_000), 1, 0, 1))
    >>> codes.unique().tolist(), round(float(codes.float().mean()) - 128, 1)
    ([128, 129], 0.3)
    """
    half = 1 << (bits - 1)
    steps = torch.as_tensor(step, dtype=torch.float32, device=values.device)
    x = values / steps
    x = torch.round(x) if words is None else torch.floor(x + uniform(words))
    return (x.nan_to_num(0.0, torch.inf, -torch.inf).clamp_(-half, half - 1) + half).to(torch.uint8)


def from_codes(codes: Tensor, step: Tensor | float, bits: int) -> Tensor:
    """The values of unsigned codes, one to an element: float32.

    >>> from_codes(torch.tensor([[0, 128, 255]], dtype=torch.uint8), 0.5, 8).tolist()
    [[-64.0, 0.0, 63.5]]
    """
    steps = torch.as_tensor(step, dtype=torch.float32, device=codes.device)
    return (codes.float() - (1 << (bits - 1))) * steps


def round_to_halves(values: Tensor, dtype: torch.dtype, words: Tensor | None) -> Tensor:
    """Values in float16 or bfloat16; beyond their range they become infinite, as torch's conversion makes them.

    Args:
        values: float32 ``[n, width]``.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
        words: of :func:`random_words`; None rounds to nearest.

    >>> values, words = torch.full((10_000, 1), 1.001), random_words(torch.arange(10_000), 1, 0, 1)
    >>> halves = round_to_halves(values, torch.bfloat16, words)
    >>> halves.unique().tolist(), round(float(halves.float().mean()), 3)
    ([1.0, 1.0078125], 1.001)
    """
    if words is None:
        return values.to(dtype)
    dropped = 16 if dtype == torch.bfloat16 else 13
    bits = values.contiguous().view(torch.int32).long()
    moved = (bits + (words >> (32 - dropped))) & ~((1 << dropped) - 1)
    rounded = moved.to(torch.int32).view(torch.float32)
    if dtype == torch.float16:
        # Below 2^-14 the distance of two halves is 2^-24, whatever the exponent.
        size = torch.floor(values.abs() * 2.0**24 + uniform(words)) * 2.0**-24
        rounded = torch.where(values.abs() < 2.0**-14, torch.copysign(size, values), rounded)
    return torch.where(torch.isfinite(values), rounded, values).to(dtype)
