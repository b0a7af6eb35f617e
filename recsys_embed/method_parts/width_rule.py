"""Widths by popularity: the power law of Ginart et al. (arXiv 1909.11810), for tables of a plan and blocks of ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from recsys_embed.errors import raise_faults
from recsys_embed.features import FeatureSpec

Rounding = Literal["integer", "power_of_two", "multiple_of_4"]


def block_faults(spec: FeatureSpec, blocks: Sequence[int]) -> list[str]:
    """Faults of ``blocks``, the numbers of ids of ``spec`` in every block but the last."""
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
        queries: average number of lookups of each block per sample.
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
        """The rule of one feature with ``queries`` lookups per sample, split among blocks by ``shares``.

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

    @property
    def first_ratio(self) -> float:
        """``rows / queries`` of the first block, of width 1 at a scale of this ratio to the power of alpha."""
        return self.rows[0] / self.queries[0]

    @property
    def popularity(self) -> tuple[float, float]:
        """Least and largest ``rows / queries`` of the blocks: of the most and the least popular one."""
        ratios = [n / k for n, k in zip(self.rows, self.queries, strict=True)]
        return min(ratios), max(ratios)

    def widths(self, alpha: float, scale: float) -> list[int]:
        """Width of every block; no block is wider than those before it."""
        out: list[int] = []
        for n, k in zip(self.rows, self.queries, strict=True):
            width = max(1.0, scale * (n / k) ** -alpha)
            # The full width is always allowed, whatever the rounding; the tolerance absorbs rounding errors of powers.
            rounded = self.most if width >= self.most * (1 - 1e-9) else self._round(width)
            out.append(min(self.most, rounded, *out[-1:]))
        return out

    def _round(self, width: float) -> int:
        if self.rounding == "power_of_two":
            return 1 << math.floor(math.log2(width) + 0.5)
        if self.rounding == "multiple_of_4":
            return 4 * max(1, math.floor(width / 4 + 0.5))
        return math.floor(width + 0.5)

    def blocks(self, alpha: float, scale: float) -> dict[str, Any]:
        """Options ``dims`` and ``blocks``; neighbouring blocks of equal width are merged."""
        dims: list[int] = []
        rows: list[int] = []
        for n, width in zip(self.rows, self.widths(alpha, scale), strict=True):
            if dims and dims[-1] == width:
                rows[-1] += n
            else:
                dims.append(width)
                rows.append(n)
        return {"dims": tuple(dims), "blocks": tuple(rows[:-1]) or None}


class WidthGrowth:
    """A path of parameters of the rule from the fewest bytes (x = 0) to the most (x = 1), along which no width shrinks.

    Args:
        rules: of the tables.
        alpha: fixed, while the scale grows; None: alpha falls from 1 to 0 at the full width of the most popular block.
    """

    def __init__(self, rules: Sequence[WidthRule], alpha: float | None) -> None:
        self.alpha = alpha
        self.most = max((rule.most for rule in rules), default=1)
        self.first = min((rule.popularity[0] for rule in rules), default=1.0)
        self.last = max((rule.popularity[1] for rule in rules), default=1.0)

    def at(self, x: float) -> tuple[float, float]:
        """Alpha and scale at ``x``."""
        if self.alpha is None:
            return 1 - x, self.most * self.first ** (1 - x)
        return self.alpha, x * self.most * self.last**self.alpha

    def step(self, rule: WidthRule, x: float) -> float | None:
        """The next point at which a width of ``rule`` changes, or None."""
        now = rule.widths(*self.at(x))
        if rule.widths(*self.at(1.0)) == now:
            return None
        low, high = x, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if rule.widths(*self.at(middle)) == now else (low, middle)
        return high


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
