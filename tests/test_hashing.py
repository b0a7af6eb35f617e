"""Hashes against Python's unbounded integers, frozen values and the statistics that collisions rest on."""

from __future__ import annotations

import hashlib
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recsys_embed.core.hashing import hash_rows, hash_signs, murmur3_words, reduce_range, salt, splitmix64

M64 = 2**64 - 1
int64 = st.integers(-(2**63), 2**63 - 1)
sizes = st.integers(1, 2**31 - 1)
IDS = [0, 1, -1, 2**24 + 1, 2**40 + 3, 2**63 - 1, -(2**63)]


# Independent definitions, in Python integers and from the published descriptions.


def python_salt(seed: int, *parts: str | int) -> int:
    text = "\x1f".join([str(seed)] + [("s" if isinstance(p, str) else "i") + str(p) for p in parts])
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int(struct.unpack("<q", digest)[0])


def python_splitmix64(x: int, s: int) -> int:
    z = ((x & M64) ^ (s & M64)) + 0x9E3779B97F4A7C15 & M64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & M64
    return z ^ z >> 31


def python_murmur3_x64_128(key: bytes, seed: int) -> tuple[int, ...]:
    """Appleby's MurmurHash3_x64_128 for any length, blocks included, as four uint32 words."""
    c1, c2 = 0x87C37B91114253D5, 0x4CF5AD432745937F

    def rotl(v: int, r: int) -> int:
        return (v << r | v >> 64 - r) & M64

    def fmix(v: int) -> int:
        v = (v ^ v >> 33) * 0xFF51AFD7ED558CCD & M64
        v = (v ^ v >> 33) * 0xC4CEB9FE1A85EC53 & M64
        return v ^ v >> 33

    h1 = h2 = seed
    blocks = len(key) // 16
    for i in range(blocks):
        k1, k2 = struct.unpack_from("<QQ", key, 16 * i)
        h1 ^= rotl(k1 * c1 & M64, 31) * c2 & M64
        h1 = (rotl(h1, 27) + h2) * 5 + 0x52DCE729 & M64
        h2 ^= rotl(k2 * c2 & M64, 33) * c1 & M64
        h2 = (rotl(h2, 31) + h1) * 5 + 0x38495AB5 & M64
    tail = key[16 * blocks :].ljust(16, b"\0")
    k1, k2 = struct.unpack("<QQ", tail)
    h2 ^= rotl(k2 * c2 & M64, 33) * c1 & M64
    h1 ^= rotl(k1 * c1 & M64, 31) * c2 & M64
    h1, h2 = h1 ^ len(key), h2 ^ len(key)
    h1 = h1 + h2 & M64
    h2 = h2 + h1 & M64
    h1, h2 = fmix(h1), fmix(h2)
    h1 = h1 + h2 & M64
    h2 = h2 + h1 & M64
    return h1 & 0xFFFFFFFF, h1 >> 32, h2 & 0xFFFFFFFF, h2 >> 32


def rows_of(values: torch.Tensor, size: int, *parts: str | int, seed: int = 0) -> torch.Tensor:
    return hash_rows(values, salt(seed, *parts), size)


# --- frozen: a change here moves every row of every model ever saved ------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0,), 8493733112532773764),
        ((0, "C1", 0), 3457716553168064619),
        ((0, "C1", "row", 0), 4397578236039572516),
        ((-7, "üñï", 12), 8887018473310557511),
    ],
)
def test_salts_are_frozen(arguments: tuple[int | str, ...], expected: int) -> None:
    assert salt(*arguments) == python_salt(*arguments) == expected


def test_mixes_are_frozen() -> None:
    s = salt(0, "C1", 0)
    expected = [
        -378393668060748208,
        7904685878872499064,
        4011491965094828115,
        7114499264722560247,
        6599147339068804191,
        4616032417434885631,
        5327842816577934815,
    ]
    assert splitmix64(torch.tensor(IDS), s).tolist() == expected
    assert [python_splitmix64(x, s) for x in IDS] == [v & M64 for v in expected]


def test_first_output_of_the_published_generator() -> None:
    # Vigna's splitmix64.c, state 0 and 1234567: the first numbers it prints.
    assert splitmix64(torch.tensor([0, 1234567]), 0).tolist() == [0xE220A8397B1DCDAF - 2**64, 6457827717110365317]


def test_rows_and_signs_are_frozen() -> None:
    s, ids = salt(0, "C1", 0), torch.tensor(IDS)
    assert hash_rows(ids, s, 1000).tolist() == [979, 428, 217, 385, 357, 250, 288]
    assert hash_rows(ids, s, 2**31 - 1).tolist() == [
        2103432826,
        920226550,
        466999127,
        828236721,
        768241860,
        537376899,
        620242535,
    ]
    assert hash_signs(ids, s).tolist() == [-1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("key", "seed", "words"),
    [
        (0, 0, [3428303819, 685728695, 3303603794, 4065689084]),
        (1, 0, [4211459146, 4457399, 3547175942, 1032506804]),
        (2**40 + 3, 7, [623007057, 821872277, 1293080303, 403186894]),
        (2**64 - 1, 2**32 - 1, [88181733, 672240216, 4087153151, 3796020537]),
    ],
)
def test_murmur_words_are_those_of_mmh3(key: int, seed: int, words: list[int]) -> None:
    """Values of ``mmh3.hash_bytes(struct.pack("<Q", key), seed, x64arch=True)``, cut into uint32."""
    signed = key - 2**64 if key >= 2**63 else key
    assert murmur3_words(torch.tensor(signed), seed).tolist() == words
    assert list(python_murmur3_x64_128(struct.pack("<Q", key), seed)) == words


# --- exact over the whole domain ------------------------------------------------------------------------------------


@given(int64, int64)
def test_splitmix64_is_exact(x: int, s: int) -> None:
    assert int(splitmix64(torch.tensor(x), s)) & M64 == python_splitmix64(x, s)
    assert int(splitmix64(torch.tensor([x]), torch.tensor([s]))) & M64 == python_splitmix64(x, s)


@given(int64, sizes)
def test_reduce_range_is_exact(bits: int, size: int) -> None:
    expected = (bits & M64) * size >> 64
    assert int(reduce_range(torch.tensor(bits), size)) == expected
    assert int(reduce_range(torch.tensor([bits]), torch.tensor([size]))) == expected
    assert 0 <= expected < size


@pytest.mark.parametrize("size", [1, 2, 3, 2**16, 2**24 + 1, 2**31 - 1])
def test_reduce_range_at_the_edges(size: int) -> None:
    bits = [0, 1, M64, M64 - 1, 2**63, 2**63 - 1, 2**32, 2**32 - 1, M64 ^ 0xFFFFFFFF]
    # The steps of the staircase: the smallest value of a row, and its predecessor in the row below.
    bits += [
        v for r in (1, size // 2, size - 1) for up in [-(-(r << 64) // size)] for v in (up, up - 1) if 0 <= v <= M64
    ]
    signed = torch.tensor([b - 2**64 if b >= 2**63 else b for b in bits])
    assert reduce_range(signed, size).tolist() == [b * size >> 64 for b in bits]


@given(int64, st.integers(0, 2**32 - 1))
def test_murmur_is_exact(x: int, seed: int) -> None:
    expected = list(python_murmur3_x64_128(struct.pack("<q", x), seed))
    assert murmur3_words(torch.tensor(x), seed).tolist() == expected
    assert murmur3_words(torch.tensor([[x]]), torch.tensor(seed)).tolist() == [[expected]]


@given(st.lists(int64, min_size=1, max_size=5), sizes, st.integers(0, 2**31))
def test_rows_are_the_composition(ids: list[int], size: int, seed: int) -> None:
    s = salt(seed, "f")
    assert hash_rows(torch.tensor(ids), s, size).tolist() == [python_splitmix64(x, s) * size >> 64 for x in ids]
    assert hash_signs(torch.tensor(ids), s).tolist() == [-1 if python_splitmix64(x, s) >> 63 else 1 for x in ids]


def test_shapes_broadcast_and_stay_int64() -> None:
    ids, salts, size = torch.tensor([[0], [-5], [2**62]]), torch.tensor([1, 2]), torch.tensor([7, 11])
    rows = hash_rows(ids, salts, size)
    assert rows.shape == (3, 2)
    assert rows.dtype == torch.int64
    assert hash_rows(ids, 1, 7).dtype == hash_signs(ids, 1).dtype == murmur3_words(ids, 1).dtype == torch.int64
    for i in range(3):
        for j in range(2):
            assert rows[i, j] == hash_rows(ids[i, 0], int(salts[j]), int(size[j]))
    assert hash_rows(torch.empty(0, 3, dtype=torch.int64), 1, 7).shape == (0, 3)
    assert murmur3_words(torch.empty(0, 3, dtype=torch.int64), 1).shape == (0, 3, 4)


# --- statistics -----------------------------------------------------------------------------------------------------


def chi_square_p(rows: torch.Tensor, size: int) -> float:
    """Two-sided: loads far too even are as suspicious as far too uneven ones."""
    load = torch.bincount(rows, minlength=size).double()
    mean = len(rows) / size
    value = float(((load - mean) ** 2 / mean).sum())
    return float(2 * min(stats.chi2.sf(value, size - 1), stats.chi2.cdf(value, size - 1)))


@pytest.mark.parametrize("size", [2, 97, 1000, 1024, 4099])
@pytest.mark.parametrize("shift", [0, 1, 7, 8, 16, 20, 31, 32, 33, 40])
def test_bucket_loads_are_uniform(size: int, shift: int) -> None:
    """Sequential ids and multiples of 2**shift; 50 cases, so the threshold is a family-wise one in a million."""
    ids = torch.arange(40_000) << shift
    assert chi_square_p(rows_of(ids, size, "C1", 0), size) > 1e-6 / 50


@pytest.mark.parametrize("size", [97, 1000, 1024])
@pytest.mark.parametrize("word", range(4))
def test_murmur_loads_are_uniform(size: int, word: int) -> None:
    assert chi_square_p(murmur3_words(torch.arange(40_000), 3)[:, word] % size, size) > 1e-6 / 12


def test_remainders_would_fail_that_test() -> None:
    """The test has teeth: plain remainders of sequential ids are too even, and of multiples far too uneven."""
    for ids in (torch.arange(40_000), torch.arange(40_000) << 20):
        assert chi_square_p(ids % 1024, 1024) < 1e-12


@pytest.mark.parametrize("size", [97, 1000, 1024])
def test_features_collide_at_the_rate_of_chance(size: int) -> None:
    """P(row of (C1, x) = row of (C2, y)) = 1/size over all pairs, within 3 standard deviations of independent draws."""
    n = 3000
    first = torch.bincount(rows_of(torch.arange(n), size, "C1", 0), minlength=size)
    second = torch.bincount(rows_of(torch.arange(n), size, "C2", 0), minlength=size)
    pairs = float((first * second).sum())
    mean, deviation = n * n / size, math.sqrt(n * n / size * (1 - 1 / size))
    assert abs(pairs - mean) < 3 * deviation
    equal = float((rows_of(torch.arange(60_000), size, "C1", 0) == rows_of(torch.arange(60_000), size, "C2", 0)).sum())
    assert abs(equal - 60_000 / size) < 3 * math.sqrt(60_000 / size)


@pytest.mark.parametrize("row_lookups", [2, 3])
def test_row_lookups_are_independent(row_lookups: int) -> None:
    """All k rows of two ids agree with probability size**-k."""
    n, size = 20_000, 60 if row_lookups == 2 else 20
    ids = torch.arange(n)
    joint = sum(rows_of(ids, size, "C1", j) * size**j for j in range(row_lookups))
    assert isinstance(joint, torch.Tensor)
    load = torch.bincount(joint, minlength=size**row_lookups).double()
    pairs = float((load * (load - 1)).sum() / 2)
    mean = n * (n - 1) / 2 / size**row_lookups
    assert abs(pairs - mean) < 4 * math.sqrt(mean)


def test_signs_are_unbiased_and_independent_of_rows() -> None:
    ids = torch.arange(100_000)
    signs = hash_signs(ids, salt(0, "C1", "sign", 0)).double()
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(len(ids))
    assert abs(float((signs[1:] * signs[:-1]).mean())) < 4 / math.sqrt(len(ids))
    upper = (rows_of(ids, 1000, "C1", "row", 0) >= 500).double() * 2 - 1
    assert abs(float((signs * upper).mean())) < 4 / math.sqrt(len(ids))


def test_every_input_bit_moves_half_the_output_bits() -> None:
    ids = torch.randint(-(2**62), 2**62, (2000,), generator=torch.Generator().manual_seed(0))
    base = splitmix64(ids, 1)
    weights = torch.arange(64)
    for bit in range(64):
        flipped = (splitmix64(ids ^ (-(2**63) if bit == 63 else 1 << bit), 1) ^ base).unsqueeze(1) >> weights & 1
        share = flipped.double().mean(0)
        assert (share - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(len(ids)), f"input bit {bit}"


def test_salts_separate_names_positions_and_types() -> None:
    seen = [salt(s, *p) for s in (0, 1) for p in ((), ("C1",), ("C1", 0), ("C1", 1), ("C10",), ("C1", "0"), ("C", 10))]
    assert len(set(seen)) == len(seen)
    assert all(-(2**63) <= s < 2**63 for s in seen)
