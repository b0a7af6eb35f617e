"""tensor_train: three cores in place of a table (TT-Rec, Yin et al., MLSys 2021), written as a user would write it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Self

from recsys_embed.extend import (
    CompressedEmbedding,
    Contraction,
    FeatureSpec,
    Initializer,
    LookupProgram,
    MethodConfig,
    MixedRadixDigit,
    RowLookup,
    Table,
    param,
)


def _split(n: int, parts: int) -> tuple[int, ...]:
    """Factors near the root whose product is at least ``n``."""
    out = []
    for left in range(parts, 0, -1):
        factor = max(1, ceil(round(n ** (1 / left), 9)))
        out.append(factor)
        n = ceil(n / factor)
    return tuple(out)


def _width(n: int) -> tuple[int, ...]:
    """Three factors of ``n``, near each other."""
    first = max(f for f in range(1, n + 1) if n % f == 0 and f**3 <= n)
    rest = n // first
    second = max(f for f in range(1, rest + 1) if rest % f == 0 and f * f <= rest)
    return first, second, rest // second


@dataclass(frozen=True, kw_only=True)
class TensorTrainConfig(MethodConfig):
    """Cores ``core0``, ``core1`` and ``core2``; an id's digits choose a slice of each, and the slices multiply.

    >>> TensorTrainConfig(rank=4).footprint(FeatureSpec("C1", 10_000, 16)).serve
    4864
    """

    method: ClassVar[str] = "tensor_train"

    rank: int = param(8, "of the train", low=1, high=256)

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        rows, (a, b, c), r = _split(spec.num_ids, 3), _width(spec.embedding_dim), self.rank
        shapes = ((a, r), (r, b, r), (r, c))
        widths = (a * r, r * b * r, r * c)
        digits = (
            MixedRadixDigit(div=rows[1] * rows[2]),
            MixedRadixDigit(div=rows[2], mod=rows[1]),
            MixedRadixDigit(mod=rows[2]),
        )
        distribution, scale = spec.initial_distribution()
        std = scale / 3**0.5 if distribution == "uniform" else scale
        # An element is a sum of r * r products of three: each core has the cube root of what its variance leaves.
        spread = Initializer("normal", (std / r) ** (1 / 3))
        tables = tuple(Table(f"core{i}", n, w, spread) for i, (n, w) in enumerate(zip(rows, widths, strict=True)))
        row_lookups = tuple(RowLookup(f"core{i}", d, column=sum(widths[:i])) for i, d in enumerate(digits))
        return LookupProgram(tables, row_lookups, head=Contraction(shapes, "ap,pbq,qc->abc"))

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        return 64

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({**params, "rank": size})


class TensorTrainEmbedding(CompressedEmbedding):
    """Drop-in over three cores.

    >>> import torch
    >>> TensorTrainEmbedding(1000, 16, rank=4)(torch.tensor([3, 999])).shape
    torch.Size([2, 16])
    """

    config_cls = TensorTrainConfig
