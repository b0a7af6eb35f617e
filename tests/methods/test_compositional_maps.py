"""Index maps of complementary partitions: injective, exact for large ids, and the number theory under them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed.core.program import MixedRadixDigit
from recsys_embed.method_parts.partition_sizes import balanced, coprime_run, covering_moduli, is_prime, next_prime
from recsys_embed.methods.compositional import CompositionalConfig, class_maps
from tests.methods.complementary import PARTITIONS, SHAPES, classes_by_definition, make_spec

BIG = [2**24 + 1, 2**31 - 2, 2**40 + 3]


def _inverse(partition: str, moduli: tuple[int, ...], classes: list[int]) -> int:
    """The id of its classes: a map that can be inverted is unique."""
    if partition == "quotient_remainder":
        return classes[0] * moduli[1] + classes[1]
    if partition == "generalized":
        return sum(c * math.prod(moduli[:j]) for j, c in enumerate(classes))
    whole = math.prod(moduli)
    return sum(c * (whole // m) * pow(whole // m, -1, m) for c, m in zip(classes, moduli, strict=True)) % whole


def _rows(maps: list[MixedRadixDigit], ids: Tensor) -> Tensor:
    return torch.stack([m.rows(ids) for m in maps], -1)


# -- index maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 10007])
@pytest.mark.parametrize(("partition", "k"), SHAPES)
def test_no_two_ids_share_all_classes(partition: Any, k: int, n: int, affine: bool) -> None:
    size = next_prime(n) if affine else n
    coefficients = (1 + 5 % (size - 1), 3 % size, size) if affine else None
    for collisions in sorted({1, min(2, n), min(4, n), math.isqrt(n), n}):
        moduli = covering_moduli(size, collisions, k, partition == "chinese_remainder")
        rows = _rows(class_maps(partition, moduli, coefficients), torch.arange(n))
        assert rows.min() >= 0
        assert (rows < torch.tensor(moduli)).all(), "a class is a row of its table"
        assert len({tuple(r) for r in rows.tolist()}) == n
        assert rows[n // 2].tolist() == classes_by_definition(partition, moduli, n // 2, coefficients)


@given(data=st.data())
@settings(max_examples=100)
def test_classes_identify_the_id_for_any_number_of_partitions(data: st.DataObject) -> None:
    partition = data.draw(st.sampled_from(PARTITIONS))
    k = 2 if partition == "quotient_remainder" else data.draw(st.integers(2, 8))
    n = data.draw(st.one_of(st.integers(1, 5000), st.integers(1, 2**40 + 4)))
    moduli = covering_moduli(n, data.draw(st.integers(1, min(n, 10**6))), k, partition == "chinese_remainder")
    assert math.prod(moduli) >= n
    ids = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    rows = _rows(class_maps(partition, moduli), torch.tensor(ids)).tolist()
    assert rows == [classes_by_definition(partition, moduli, x) for x in ids]
    assert [_inverse(partition, moduli, r) for r in rows] == ids


@pytest.mark.parametrize("x", BIG)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_large_ids_are_exact(partition: Any, x: int) -> None:
    for collisions in (3, 1000, 2**20 + 7):
        moduli = covering_moduli(x + 1, collisions, 2, partition == "chinese_remainder")
        neighbours = torch.tensor([x - 1, x])
        rows = _rows(class_maps(partition, moduli), neighbours).tolist()
        assert [_inverse(partition, moduli, r) for r in rows] == [x - 1, x]


@pytest.mark.parametrize(("a", "b", "p"), [(2**31 - 2, 2**31 - 2, 2**31 - 1), (2**22 - 1, 2**40, 2**40 + 15)])
def test_affine_map_does_not_overflow(a: int, b: int, p: int) -> None:
    assert is_prime(p)
    assert a * (p - 1) + b < 2**63
    for x in (0, 1, 2**24 + 1, p // 2, p - 1):
        rows = _rows(class_maps("quotient_remainder", (-(-p // 4099), 4099), (a, b, p)), torch.tensor(x)).tolist()
        y = _inverse("quotient_remainder", (0, 4099), rows)
        assert y == (a * x + b) % p
        assert (y - b) * pow(a, -1, p) % p == x


def test_affine_map_of_the_largest_feature_fits_64_bits() -> None:
    config = CompositionalConfig(num_collisions=40_000, affine=True)
    for name in ("C1", "C2", "C3"):
        (digit, _) = config.classes_of(make_spec(rse.features.MAX_ROWS, name=name))
        assert digit.affine is not None
        a, b, p = digit.affine
        assert 0 < a < p
        assert 0 <= b < p
        assert p == 2**31 - 1
        assert a * (p - 1) + b < 2**63


def test_affine_map_depends_on_seed_and_feature_and_parts_neighbours() -> None:
    def first(seed: int, name: str) -> list[int]:
        config = CompositionalConfig(num_collisions=100, affine=True, seed=seed)
        return config.classes_of(make_spec(10_000, name=name))[0].rows(torch.arange(10_000)).tolist()

    drawn = [
        CompositionalConfig(num_collisions=100, affine=True, seed=seed)
        .classes_of(make_spec(10_000, name=name))[0]
        .affine
        for seed, name in ((0, "C1"), (0, "C2"), (1, "C1"))
    ]
    multipliers, offsets, primes = zip(*(d for d in drawn if d), strict=True)
    assert len(set(multipliers)) == len(set(offsets)) == 3
    assert set(primes) == {10_007}
    assert first(0, "C1") == first(0, "C1")
    assert first(0, "C1") != first(0, "C2")
    assert first(0, "C1") != first(1, "C1")
    plain = CompositionalConfig(num_collisions=100).classes_of(make_spec(10_000))[0].rows(torch.arange(10_000))
    same = sum(a == b for a, b in itertools.pairwise(first(0, "C1")))
    assert plain.diff().eq(0).sum() == 9900
    assert same < 5000, "neighbouring ids mostly part company"


# -- number theory --------------------------------------------------------------------------------------------------


def test_primes_are_those_of_the_sieve() -> None:
    limit = 20_000
    sieve = [False, False] + [True] * (limit - 2)
    for i in range(2, math.isqrt(limit) + 1):
        if sieve[i]:
            sieve[i * i :: i] = [False] * len(sieve[i * i :: i])
    assert [is_prime(i) for i in range(limit)] == sieve
    # Carmichael numbers and strong pseudoprimes to small bases, which weaker tests pass.
    assert not any(map(is_prime, (561, 1729, 2047, 3215031751, 3474749660383, 341550071728321)))
    assert all(map(is_prime, (2**31 - 1, 2**61 - 1, 10**9 + 7)))
    assert next_prime(2**31) == 2**31 + 11


@given(st.integers(1, 2000), st.integers(1, 8))
def test_runs_are_coprime_and_radices_balanced(start: int, length: int) -> None:
    run = coprime_run(start, length)
    assert len(run) == length
    assert min(run) == start
    assert all(math.gcd(a, b) == 1 for a, b in itertools.combinations(run, 2))
    radices = balanced(start + length, length)
    assert sum(radices) == start + length
    assert max(radices) - min(radices) <= 1


@given(st.integers(1, 10**9), st.data())
def test_first_table_holds_one_row_per_collision_group(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(1, n))
    assert covering_moduli(n, c, 2, coprime=False) == (-(-n // c), c)
    first, *others = covering_moduli(n, c, 4, coprime=False)
    assert first == -(-n // c)
    assert math.prod(others) >= c
    assert math.prod(m - (m == max(others)) for m in others) < c or max(others) == 1, "no radix is larger than needed"
