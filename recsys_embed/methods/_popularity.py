"""Widths by popularity: Ginart's rule (arXiv 1909.11810) over the tables of a plan and the blocks of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from recsys_embed.errors import raise_faults
from recsys_embed.features import FeatureSpec

Rounding = Literal["integer", "power_of_two", "multiple_of_4"]


def block_faults(spec: FeatureSpec, blocks: Sequence[int]) -> list[str]:
    """What keeps ``blocks``, all but the last, from being counts of the ids of ``spec``."""
    n = spec.num_ids
    if all(type(count) is int and count >= 1 for count in blocks) and sum(blocks) < n:
        return []
    return [f"`blocks` must be integers >= 1 that leave some of the {n} ids to the last block; got {blocks!r:.80}"]


def alpha_fault(alpha: Any) -> list[str]:
    """A fault unless ``alpha`` is a number in [0, 1]."""
    if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 <= alpha <= 1:
        return []
    return [f"`alpha` must be a number in [0, 1]; got {alpha!r}"]


@dataclass(frozen=True)
class WidthRule:
    """``scale * (rows / queries) ** -alpha`` for every block of one table, rounded and kept within [1, most].

    Args:
        rows: ids of each block, most frequent first.
        queries: how many of a block's rows one sample asks for, on average.
        most: largest width.
        rounding: of the widths; ``"power_of_two"`` is ``2 ** round(log2(width))``, as in the authors' code.

    >>> WidthRule((100, 10_000, 1_000_000), (1.0, 1.0, 1.0), most=16).widths(alpha=0.5, scale=160)
    [16, 2, 1]
    """

    rows: tuple[int, ...]
    queries: tuple[float, ...]
    most: int
    rounding: Rounding = "integer"

    @classmethod
    def of(
        cls,
        spec: FeatureSpec,
        blocks: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
        queries: float = 1.0,
        rounding: Rounding = "integer",
        most: int | None = None,
    ) -> Self:
        """The rule of one feature, whose ``queries`` per sample the blocks serve by their ``shares``.

        Raises:
            ConfigError: an argument is wrong; all faults at once.
        """
        front = tuple(blocks or ())
        parts = tuple(1.0 for _ in range(len(front) + 1)) if shares is None else tuple(shares)
        faults = block_faults(spec, front)
        if not all(_positive(share) for share in parts) or len(parts) != len(front) + 1:
            faults.append(f"`shares` must be {len(front) + 1} numbers > 0, one per block; got {shares!r:.80}")
        if not _positive(queries):
            faults.append(f"`queries` must be a number > 0; got {queries!r}")
        if rounding not in get_args(Rounding):
            faults.append(f"`rounding` must be one of {', '.join(get_args(Rounding))}; got {rounding!r}")
        if most is not None and not (type(most) is int and most >= 1):
            faults.append(f"`d0` must be an integer >= 1; got {most!r}")
        raise_faults(faults, f"widths by popularity, feature {spec.name!r}")
        asked = tuple(queries * share / sum(parts) for share in parts)
        width = spec.embedding_dim
        return cls((*front, spec.num_ids - sum(front)), asked, min(width, most or width), rounding)

    def unit(self, alpha: float) -> float:
        """The scale at which the most popular block is 1 wide."""
        return min(n / k for n, k in zip(self.rows, self.queries, strict=True)) ** alpha

    def widest(self, alpha: float) -> float:
        """A scale at which every block is as wide as it may be."""
        return self.most * max(n / k for n, k in zip(self.rows, self.queries, strict=True)) ** alpha

    def widths(self, alpha: float, scale: float) -> list[int]:
        """Width of every block; no block is wider than those before it."""
        out: list[int] = []
        for n, k in zip(self.rows, self.queries, strict=True):
            width = max(1.0, scale * (n / k) ** -alpha)
            if self.rounding == "power_of_two":
                width = 2.0 ** math.floor(math.log2(width) + 0.5)
            elif self.rounding == "multiple_of_4":
                width = 4.0 * max(1, math.floor(width / 4 + 0.5))
            out.append(min(self.most, math.floor(width + 0.5), *out[-1:]))
        return out

    def blocks(self, alpha: float, scale: float) -> dict[str, Any]:
        """Options ``dims`` and ``blocks``; neighbours of one width are one block."""
        dims: list[int] = []
        rows: list[int] = []
        for n, width in zip(self.rows, self.widths(alpha, scale), strict=True):
            if dims and dims[-1] == width:
                rows[-1] += n
            else:
                dims.append(width)
                rows.append(n)
        return {"dims": tuple(dims), "blocks": tuple(rows[:-1]) or None}


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
