"""The click model of synthetic data: per-id effects, low-rank interactions, numeric effects, uninformative fields.

Every number is a function of (seed, field, id) or (seed, column, row), so any piece can be made on its own and a row
does not depend on how many others are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys_embed.data.criteo.layout import CAT_NAMES, INT_NAMES
from recsys_embed.data.random_bits import U64, random_bits, stream_key, uniform

Floats = NDArray[np.float64]
CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27,
    14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
"""Distinct values of C1..C26 in Criteo's Kaggle training file."""
MISSING_CATS = (
    0, 0, .035, .035, 0, .12, 0, 0, 0, 0, 0, .035, 0, 0, 0, .035, 0, 0, .44, .44, .035, .76, 0, .035, .44, .44,
)  # fmt: skip
"""Share of rows where C1..C26 is empty, as in that file."""
MISSING_INTS = (.45, 0, .21, .21, .03, .22, .04, 0, .04, .45, .04, .77, .21)  # fmt: skip
SMALL = 100
"""Fields shrink with the scale, but not below this many values (or their own, if fewer)."""
ZIPF = 1.05
RANK = 2
_EFFECT = {"C3": 0.5, "C4": 0.5, "C12": 0.5, "C16": 0.5, "C24": 0.3, "C26": 0.3, "C10": 0.3, "C7": 0.25,
           "C15": 0.25, "C1": 0.2, "C14": 0.2, "C17": 0.2, "C20": 0.15, "C6": 0.15}  # fmt: skip
"""Standard deviation of an id's own effect on the logit; fields not named have none."""
_PAIRS = {("C14", "C17"): 0.5, ("C6", "C23"): 0.5, ("C9", "C20"): 0.3, ("C4", "C9"): 0.2}
"""Standard deviation of the interaction of two fields: the scaled inner product of rank-2 vectors of their ids."""
_NUMERIC = {"I1": 0.2, "I5": -0.3, "I6": -0.2, "I7": 0.2, "I11": 0.3, "I13": -0.2}
"""Slope of the standardised logarithm of an integer field; I6 also has a bump, and I7 acts only where C17 is even."""
BASE_RATE = 0.25
DEFAULT_ROWS, DEFAULT_SCALE = 300_000, 0.0002


@dataclass
class PlantedModel:
    """The planted model of one seed.

    Args:
        seed: everything follows from it.
        scale: factor on the cardinalities.
        intercept: set by :meth:`calibrate` for a click rate of 25 %.

    >>> PlantedModel(seed=1, scale=0.001).cardinality("C3")
    10131
    """

    seed: int
    scale: float
    intercept: float = 0.0
    _tables: dict[str, tuple[Floats, Floats]] = field(default_factory=dict, repr=False)

    def cardinality(self, name: str) -> int:
        """Distinct values a category can take, the empty field aside."""
        full = CARDINALITIES[CAT_NAMES.index(name)]
        return min(full, max(SMALL, round(full * self.scale)))

    def ranks(self, name: str, start: int, count: int) -> NDArray[np.int64]:
        """Ids of rows as frequency ranks, 0 the commonest (bounded Zipf); the cardinality itself stands for empty."""
        j = CAT_NAMES.index(name)
        card = self.cardinality(name)
        u = uniform(random_bits(stream_key(self.seed, 1, j), start, count))
        power = 1.0 - ZIPF
        rank = np.floor((((card + 1.0) ** power - 1.0) * u + 1.0) ** (1.0 / power)).astype(np.int64) - 1
        np.clip(rank, 0, card - 1, out=rank)
        if MISSING_CATS[j]:
            gone = uniform(random_bits(stream_key(self.seed, 2, j), start, count)) < MISSING_CATS[j]
            rank[gone] = card
        return rank

    def hashes(self, name: str, ranks: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The 32-bit value written for an id: a bijection of the rank, different in every field and seed."""
        key = stream_key(self.seed, 3, CAT_NAMES.index(name))
        x = ranks.astype(np.uint32) + np.uint32(key & 0xFFFFFFFF)
        for factor, shift in ((0x7FEB352D, 16), (0x846CA68B, 15)):
            x ^= x >> np.uint32(shift)
            x *= np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    def integers(self, name: str, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], Floats]:
        """Values, where they are empty, and the standardised logarithm behind them."""
        i = INT_NAMES.index(name)
        g = _normal(random_bits(stream_key(self.seed, 4, i), start, count))
        value = np.floor(np.exp(1.0 + i % 4 + (1.0 + i % 3 * 0.4) * g)).astype(np.int64)
        if name == "I2":
            value -= 2
        gone = uniform(random_bits(stream_key(self.seed, 5, i), start, count)) < MISSING_INTS[i]
        return value, gone, np.where(gone, 0.0, g)

    def logits(self, ranks: dict[str, NDArray[np.int64]], logs: dict[str, Floats]) -> Floats:
        """The planted log-odds of rows, given their ids and standardised integers."""
        z = np.full(len(ranks["C1"]), self.intercept)
        for name, size in _EFFECT.items():
            if size:
                z += size * self._latent(name)[0][ranks[name]]
        for (a, b), size in _PAIRS.items():
            left, right = self._latent(a)[1][ranks[a]], self._latent(b)[1][ranks[b]]
            dot = left[:, 0] * right[:, 0]
            for r in range(1, RANK):
                dot += left[:, r] * right[:, r]
            z += size / np.sqrt(RANK) * dot
        for name, slope in _NUMERIC.items():
            g = logs[name]
            if name == "I6":
                z += np.where(np.abs(g - 0.5) < 0.5, 0.4, 0.0)
            z += slope * (g * (ranks["C17"] % 2 == 0) if name == "I7" else g)
        return z

    def _latent(self, name: str) -> tuple[Floats, Floats]:
        """Effect [n+1] and interaction vector [n+1, 4] of every id of a field, standard normal."""
        if name not in self._tables:
            n = self.cardinality(name) + 1
            j = CAT_NAMES.index(name)
            effect = _normal(random_bits(stream_key(self.seed, 6, j), 0, n))
            vectors = _normal(random_bits(stream_key(self.seed, 7, j), 0, n * RANK)).reshape(n, RANK)
            self._tables[name] = (effect, vectors)
        return self._tables[name]

    def calibrate(self, rows: int = 1 << 16) -> None:
        """Choose the intercept for a click rate of 25 % over rows of a stream of their own."""
        start = 1 << 48
        z = self.rows(start, rows).logits - self.intercept
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if np.mean(sigmoid(z + middle)) < BASE_RATE else (low, middle)
        self.intercept = round((low + high) / 2, 6)

    def rows(self, start: int, count: int) -> PlantedRows:
        """Rows ``start .. start+count`` with their labels."""
        ranks = {name: self.ranks(name, start, count) for name in CAT_NAMES}
        drawn = {name: self.integers(name, start, count) for name in INT_NAMES}
        z = self.logits(ranks, {name: d[2] for name, d in drawn.items()})
        u = uniform(random_bits(stream_key(self.seed, 8), start, count))
        return PlantedRows(
            labels=u < sigmoid(z),
            ints=np.stack([drawn[n][0] for n in INT_NAMES]),
            ints_missing=np.stack([drawn[n][1] for n in INT_NAMES]),
            cats=np.stack([self.hashes(n, ranks[n]) for n in CAT_NAMES]),
            cats_missing=np.stack([ranks[n] == self.cardinality(n) for n in CAT_NAMES]),
            logits=z,
        )

    def describe(self) -> dict[str, Any]:
        """The model in words and numbers, for ``truth.json``."""
        return {
            "seed": self.seed,
            "scale": self.scale,
            "intercept": self.intercept,
            "cardinalities": {n: self.cardinality(n) for n in CAT_NAMES},
            "zipf": ZIPF,
            "effects": _EFFECT,
            "pairs": {f"{a}x{b}": size for (a, b), size in _PAIRS.items()},
            "numeric": _NUMERIC,
            "useless": sorted(
                {*CAT_NAMES, *INT_NAMES}
                - {n for n, s in _EFFECT.items() if s}
                - {n for pair in _PAIRS for n in pair}
                - set(_NUMERIC)
            ),
        }


@dataclass(frozen=True)
class PlantedRows:
    """Rows made by the planted model: arrays [n], [13, n] and [26, n]; ``logits`` are the true log-odds."""

    labels: NDArray[np.bool_]
    ints: NDArray[np.int64]
    ints_missing: NDArray[np.bool_]
    cats: NDArray[np.uint32]
    cats_missing: NDArray[np.bool_]
    logits: Floats


def sigmoid(z: Floats) -> Floats:
    """``1 / (1 + exp(-z))``."""
    out: Floats = 1.0 / (1.0 + np.exp(-z))
    return out


def _normal(bits: NDArray[np.uint64]) -> Floats:
    """About standard normal: the scaled sum of the word's four 16-bit parts (exact arithmetic on every machine)."""
    mask = U64(0xFFFF)
    total = (bits & mask) + ((bits >> U64(16)) & mask) + ((bits >> U64(32)) & mask) + (bits >> U64(48))
    return (total.astype(np.float64) - 131070.0) * (np.sqrt(3.0) / 65536.0)
