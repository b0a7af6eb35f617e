"""Seeded 64-bit hashes in exact integer arithmetic; all kernels match these definitions bit for bit.

``splitmix64`` (Steele, Lea, Flood 2014) mixes, multiply-high (Lemire 2019) reduces to a row. Torch has no unsigned
64-bit arithmetic, so values are int64 holding the unsigned bits and every right shift masks the copied sign bits off.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_embed.errors import ConfigError
from recsys_embed.utils.types import IdValues

_U64 = 1 << 64


def as_signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    value %= _U64
    return value - _U64 if value >= _U64 // 2 else value


_GAMMA = as_signed(0x9E3779B97F4A7C15)
_MIX1 = as_signed(0xBF58476D1CE4E5B9)
_MIX2 = as_signed(0x94D049BB133111EB)


def salt(seed: int, *parts: str | int) -> int:
    """A 64-bit salt (as int64) for one use of a hash, from the seed and stable names.

    Salts depend on names, not positions, so rows stay the same when features are added or reordered.

    >>> salt(0, "C1", 0) == salt(0, "C1", 0), salt(0, "C1", 0) == salt(0, "C1", 1)
    (True, False)
    """
    text = "\x1f".join([str(seed), *(f"{type(p).__name__[0]}{p}" for p in parts)])
    return as_signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


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
    return mix64((ids ^ salts) + _GAMMA)


def mix64(z: Tensor) -> Tensor:
    """The finaliser of splitmix64: int64 of the shape of ``z``, one to one.

    >>> mix64(torch.tensor([0])).tolist()
    [0]
    """
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
    """Salts of a numbered series of hashes, derived from one salt: int64 of the broadcast shape; number 0 is the salt.

    >>> sequence(5, torch.arange(2))[0].item()
    5
    """
    # Multiples of an odd constant of random bits: `id ^ salt` of nearby ids and numbers do not coincide.
    return salts + numbers * _GAMMA


_MURMUR1 = as_signed(0x87C37B91114253D5)
_MURMUR2 = as_signed(0x4CF5AD432745937F)


def _fmix64(h: Tensor) -> Tensor:
    h = (h ^ _shift_right(h, 33)) * as_signed(0xFF51AFD7ED558CCD)
    h = (h ^ _shift_right(h, 33)) * as_signed(0xC4CEB9FE1A85EC53)
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
    # An 8-byte key is only a tail: it enters the first lane, and the length 8 enters both.
    k = ids * _MURMUR1
    k = ((k << 31) | _shift_right(k, 33)) * _MURMUR2
    h2 = k * 0 + (seeds ^ 8)
    h1 = (k ^ seeds ^ 8) + h2
    h2 = h2 + h1
    h1, h2 = _fmix64(h1), _fmix64(h2)
    h1 = h1 + h2
    h2 = h2 + h1
    return torch.stack([h1 & 0xFFFFFFFF, _shift_right(h1, 32), h2 & 0xFFFFFFFF, _shift_right(h2, 32)], -1)


# -- strings ----------------------------------------------------------------------------------------------------------

EMPTY_ID = {32: 1 << 32, 64: -(1 << 63)}
"""Id of an empty value by the bits of the data's ids, as in the data tool's raw mode."""
_DIGITS = np.full(256, 255, np.uint8)
for _text in (b"0123456789abcdef", b"0123456789ABCDEF"):
    _DIGITS[list(_text)] = np.arange(16)


def string_ids(values: IdValues, *, id_bits: Literal[32, 64] = 32, hexadecimal: bool = False) -> Tensor:
    """64-bit ids of strings, equal on every machine and in every version; hashing methods use them for strings.

    - A string of exactly 8 or 16 hexadecimal digits, in either case, is the number it spells, which is the form of
      Criteo's values; ``recsys-embed data criteo --ids raw`` gives the same ids.
    - An empty string, None or NaN is ``2**32``, or ``-2**63`` with ``id_bits=64``: that tool's id of the empty field.
    - Any other string is the first 8 bytes of its BLAKE2b hash (RFC 7693, ``digest_size=8``) in UTF-8, little-endian.
    - Bytes are text in UTF-8. An integer is itself; from 2**63 to 2**64 - 1 it is the int64 of the same bits.

    No string is read as a decimal number: ``"17"`` and 17 are different ids.

    Args:
        values: one value, or (nested) sequences or an array of them, or a tensor of integers.
        id_bits: of the data, see ``--id-bits`` of the data tool; affects empty values and ``hexadecimal``.
        hexadecimal: every string is empty or a number of at most ``id_bits / 4`` hexadecimal digits, as the data tool
            reads all categories. Anything else is an error.

    Returns:
        int64 of the shape of ``values``, on the CPU unless ``values`` are a tensor elsewhere.

    Raises:
        ConfigError: a value is of another type, too large, or not hexadecimal; or nested sequences differ in length.

    >>> string_ids(["68fd1e64", "Zürich", ""]).tolist()
    [1761418852, 636548684707296368, 4294967296]
    >>> string_ids([[2**64 - 1, 7]])
    tensor([[-1,  7]])
    """
    if id_bits not in EMPTY_ID:
        raise ConfigError(f"`id_bits` must be 32 or 64; got {id_bits!r}")
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ConfigError(f"ids must be strings or integers; got a tensor of {values.dtype}")
        return values.view(torch.int64) if values.dtype == torch.uint64 else values.long()
    array = np.asarray(values) if hasattr(values, "__array__") else np.array(values, dtype=object)
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.kind not in "OUST":
        raise ConfigError(f"ids must be strings or integers; got an array of {array.dtype}")
    flat = array.ravel().tolist()
    _check_types(flat)
    # Python handles each distinct value once; the rest are dict lookups in C.
    ids = _distinct_ids(list(set(flat)), id_bits, hexadecimal)
    found = np.fromiter(map(ids.__getitem__, flat), np.int64, len(flat))
    return torch.from_numpy(found.reshape(array.shape))


def _check_types(values: list[Any]) -> None:
    """Raise unless all are strings, bytes, integers of 64 bits, None or NaN."""
    for kind in set(map(type, values)):
        if issubclass(kind, (str, bytes)) or kind is type(None):
            continue
        if issubclass(kind, (list, tuple, np.ndarray)):
            raise ConfigError("nested sequences of ids must be of equal length; for bags give values and offsets")
        some: list[Any] = [v for v in values if type(v) is kind]
        if issubclass(kind, (int, np.integer)) and kind is not bool:
            wrong = [v for v in some if not -(1 << 63) <= v < _U64]
        else:
            # NaN differs from itself; comparing pandas' NA gives neither true nor false.
            wrong = [v for v in some if kind.__name__ != "NAType" and not (isinstance(v, float) and v != v)]
        if wrong:
            raise ConfigError(
                f"ids must be strings, bytes, integers of 64 bits, or None; got {wrong[0]!r:.80} ({kind.__name__})"
            )


def _distinct_ids(values: list[Any], id_bits: int, hexadecimal: bool) -> dict[Any, int]:
    """The id of each value; see :func:`string_ids`."""
    ids: dict[Any, int] = {}
    texts: list[tuple[Any, bytes]] = []
    for value in values:
        if isinstance(value, str):
            texts.append((value, value.encode("utf-8", "surrogatepass")))
        elif isinstance(value, bytes):
            texts.append((value, value))
        elif isinstance(value, (int, np.integer)):
            ids[value] = as_signed(int(value))
        else:
            ids[value] = EMPTY_ID[id_bits]
    lengths = range(1, id_bits // 4 + 1) if hexadecimal else (8, 16)
    spelt = [text.rjust(16, b"0") for _, text in texts if len(text) in lengths]
    digits = _DIGITS[np.frombuffer(b"".join(spelt), np.uint8)].reshape(-1, 16)
    numbers: NDArray[Any] = np.zeros(len(digits), np.uint64)
    for column in digits.T:
        numbers = (numbers << np.uint64(4)) | (column & 15)
    valid_rows = np.all(digits < 16, axis=1)
    read = iter(zip(numbers.view(np.int64).tolist(), valid_rows.tolist(), strict=True))
    for value, text in texts:
        number, valid = next(read) if len(text) in lengths else (0, False)
        if not text:
            ids[value] = EMPTY_ID[id_bits]
        elif valid and not (hexadecimal and number == EMPTY_ID[64]):
            ids[value] = number
        elif hexadecimal:
            raise ConfigError(
                f"ids must be up to {id_bits // 4} hexadecimal digits, or empty, with `hexadecimal`; got {value!r:.80}"
                + (", the id of the empty field" if valid else "")
            )
        else:
            digest = hashlib.blake2b(text, digest_size=8).digest()
            ids[value] = as_signed(int.from_bytes(digest, "little"))
    return ids
