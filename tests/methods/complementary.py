"""What the tests of complementary partitions share: the shapes they try and the paper's maps in Python's integers."""

from __future__ import annotations

import itertools
import math

import recsys_embed as rse

PARTITIONS = ("quotient_remainder", "generalized", "chinese_remainder")
SHAPES = [("quotient_remainder", 2), *itertools.product(("generalized", "chinese_remainder"), (2, 3, 5))]


def make_spec(n: int, d: int = 8, init: str = "sqrt_rows", name: str = "C1") -> rse.FeatureSpec:
    return rse.FeatureSpec(name, n, d, init=init)


def classes_by_definition(
    partition: str, moduli: tuple[int, ...], x: int, affine: tuple[int, int, int] | None = None
) -> list[int]:
    """The paper's definitions, in Python's integers."""
    if affine:
        a, b, p = affine
        x = (a * x + b) % p
    if partition == "quotient_remainder":
        return [x // moduli[1], x % moduli[1]]
    if partition == "generalized":
        return [x // math.prod(moduli[:j]) % m for j, m in enumerate(moduli)]
    return [x % m for m in moduli]
