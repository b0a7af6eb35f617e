"""Sizes of partitions: the array form gives what the definition gives, and takes no time for huge tables."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.method_parts.partition_sizes import moduli_by_cost


def defined(size: int, costs: tuple[int, int], below: int) -> list[tuple[int, int]]:
    """Pairs of moduli, one per second modulus, that cost less than all pairs with a smaller one."""
    found, least = [], below
    for second in range(1, size + 1):
        pair = (-(-size // second), second)
        cost = pair[0] * costs[0] + pair[1] * costs[1]
        if cost < least:
            found.append(pair)
            least = cost
    return found[::-1]


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(1, 400), st.integers(1, 60_000))
def test_pairs_are_those_of_the_definition(size: int, first: int, second: int, below: int) -> None:
    rungs = moduli_by_cost(size, (first, second), False, below)
    assert list(rungs) == defined(size, (first, second), below)
    assert len(rungs) == len(list(rungs))


def test_huge_tables_take_an_array() -> None:
    rungs = moduli_by_cost(2_000_000_011, (16, 16), False, 2_000_000_011 * 16)
    costs = [sum(pair) for pair in (rungs[0], rungs[len(rungs) // 2], rungs[len(rungs) - 1])]
    assert costs == sorted(costs)
    assert all(type(m) is int for m in rungs[0])
    assert rungs[0][0] * rungs[0][1] >= 2_000_000_011
    assert list(rungs[:2]) == [rungs[0], rungs[1]]
