"""Number theory of partitions: primes, coprime integers, balanced radices, and moduli whose product covers n ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import count, pairwise
from math import gcd, isqrt, prod
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

# These bases decide primality for every n below 3.3e24 (Sorenson and Webster 2015).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n: int) -> bool:
    """Whether ``n`` is prime, by the Miller-Rabin test, deterministic below 3.3e24."""
    if n < 2 or any(n % p == 0 for p in _BASES):
        return n in _BASES
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    odd = (n - 1) >> twos
    for base in _BASES:
        powers = [pow(base, odd, n)]
        while len(powers) <= twos:
            powers.append(powers[-1] ** 2 % n)
        # Modulo a prime the only roots of 1 are 1 and -1.
        if powers[-1] != 1 or any(b == 1 and a not in (1, n - 1) for a, b in pairwise(powers)):
            return False
    return True


@lru_cache(maxsize=4096)
def next_prime(n: int) -> int:
    """The smallest prime ``>= n``.

    >>> next_prime(1), next_prime(8), next_prime(2**31 - 1) == 2**31 - 1
    (2, 11, True)
    """
    return next(p for p in count(max(2, n)) if is_prime(p))


def next_coprime(start: int, others: tuple[int, ...]) -> int:
    """The smallest integer ``>= start`` that shares no factor with ``prod(others)``."""
    product = prod(others)
    return next(m for m in count(start) if gcd(m, product) == 1)


def coprime_run(start: int, length: int) -> tuple[int, ...]:
    """``length`` pairwise coprime integers from ``start`` upwards, greedily; largest first.

    >>> coprime_run(4, 3)
    (7, 5, 4)
    """
    run: tuple[int, ...] = ()
    while len(run) < length:
        run = (next_coprime(run[0] + 1 if run else start, run), *run)
    return run


def balanced(total: int, length: int) -> tuple[int, ...]:
    """``length`` integers of sum ``total`` with the largest product; largest first.

    >>> balanced(11, 3)
    (4, 4, 3)
    """
    low, extra = divmod(total, length)
    return (low + 1,) * extra + (low,) * (length - extra)


def _root(value: int, degree: int) -> int:
    """``floor(value ** (1 / degree))``, exactly."""
    guess = round(value ** (1 / degree))
    return next(r for r in range(guess + 1, -1, -1) if r**degree <= value)


def covering_moduli(size: int, collisions: int, tables: int, coprime: bool) -> tuple[int, ...]:
    """Moduli with a product of at least ``size``: the first about ``size / collisions``, the others about equal.

    >>> covering_moduli(1000, 4, 2, coprime=False), covering_moduli(1000, 4, 2, coprime=True)
    ((250, 4), (251, 4))
    >>> covering_moduli(1000, 100, 3, coprime=False)
    (10, 10, 10)
    """
    degree, first = tables - 1, -(-size // collisions)
    root = _root(collisions, degree)
    if coprime:
        # Coprime integers are not consecutive, so a run that starts a little below the root may be large enough.
        runs = (coprime_run(start, degree) for start in count(max(1, root - 4 * degree)))
    else:
        runs = (balanced(total, degree) for total in count(degree * root))
    others = next(r for r in runs if prod(r) >= collisions)
    return (next_coprime(first, others) if coprime else first, *others)


class ModuliPairs(Sequence[tuple[int, int]]):
    """``(ceil(size / m), m)`` for each m of ``second``, stored as one array, since there are about sqrt(size) pairs."""

    def __init__(self, size: int, second: NDArray[np.integer[Any]]) -> None:
        self._size, self._second = size, second.astype(np.int32)

    def __len__(self) -> int:
        return len(self._second)

    @overload
    def __getitem__(self, at: int) -> tuple[int, int]: ...

    @overload
    def __getitem__(self, at: slice) -> ModuliPairs: ...

    def __getitem__(self, at: int | slice) -> tuple[int, int] | ModuliPairs:
        if isinstance(at, slice):
            return ModuliPairs(self._size, self._second[at])
        m = int(self._second[at])
        return -(-self._size // m), m


def _pairs(size: int, costs: tuple[int, ...], below: int) -> ModuliPairs:
    """:func:`moduli_by_cost` for two moduli that need not be coprime, vectorised."""
    # Beyond this the second table alone costs more than the cheapest pair, which balances both tables (AM-GM:
    # n / m * a + m * b >= 2 sqrt(n a b)).
    most = 2 * isqrt(size * costs[0] // costs[1] + 1) + costs[0] // costs[1] + 3
    second = np.arange(1, min(most, below // costs[1] + 1) + 1, dtype=np.int64)
    total = -(-size // second) * costs[0] + second * costs[1]
    least = np.minimum.accumulate(np.concatenate([[below], total]))
    return ModuliPairs(size, second[total < least[:-1]][::-1])


@lru_cache(maxsize=512)
def moduli_by_cost(size: int, costs: tuple[int, ...], coprime: bool, below: int) -> Sequence[tuple[int, ...]]:
    """Moduli that cover ``size`` at strictly rising cost, cheapest first; all cost less than ``below``.

    Args:
        size: the product of the moduli is at least this.
        costs: per table, what a row costs.
        coprime: whether the moduli must be pairwise coprime.
    """
    degree, least = len(costs) - 1, below
    if degree == 1 and not coprime:
        return _pairs(size, costs, below)
    found: list[tuple[int, ...]] = []
    for level in count(1 if coprime else degree):
        others = coprime_run(level, degree) if coprime else balanced(level, degree)
        if min(others) * sum(costs[1:]) >= least:
            return tuple(reversed(found))
        first = -(-size // prod(others))
        moduli = (next_coprime(first, others) if coprime else first, *others)
        cost = sum(m * c for m, c in zip(moduli, costs, strict=True))
        if cost < least:
            found.append(moduli)
            least = cost
    return ()
