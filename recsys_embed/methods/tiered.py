"""tiered: rows of frequent ids in more bits, in tiers of falling precision (F-quantisation, arXiv 2308.09395)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from recsys_embed.core.heads import Projection
from recsys_embed.core.id_sets import IdSet
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.precision import Layout, Precision
from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RankInSet, RowLookup, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.fit import importance_of, principal_axes
from recsys_embed.errors import ConfigError, unknown_name
from recsys_embed.features import FeatureSpec

TIERS = ("int8", "int4", "int2")
DROPPED = "dropped"
"""Precision of a last tier whose ids have no row."""


@dataclass(frozen=True, kw_only=True)
class TieredConfig(MethodConfig):
    """Tiers of ids in order of frequency, each of which has rows of its own in a table of its own precision.

    Rows train in float32, and exported files hold each tier in its precision. ``blocks`` holds the number of ids of
    every tier but the last, which takes the rest. Where the last of ``precisions`` is ``"dropped"``, the rest has no
    rows: their vector is zero. ``order="ids"`` takes ids to be numbered by falling frequency; ``"counts"`` stores the
    sets of ids (part of the footprint) and needs ``assign_(counts)`` before training, see ``adaptive``.

    With ``dim`` rows are narrow and multiplied by one matrix, as those of ``lowdim``.

    When sizing by a budget, as many ids as fit are in tiers before the last, and ``upper_share`` of these (default: a
    fifth), of each tier and those before it, are in the tiers before that one.

    >>> TieredConfig(blocks=(10, 200)).footprint(FeatureSpec("C1", 1000, 16)).serve  # 10 * 20 + 200 * 12 + 790 * 8
    8920
    >>> config = TieredConfig(precisions=("int8", "dropped"), blocks=(10,))
    >>> config.footprint(FeatureSpec("C1", 1000, 16)).serve, config.footprint(FeatureSpec("C1", 1000, 16)).train
    (200, 640)
    """

    method: ClassVar[str] = "tiered"
    order_option: ClassVar[str | None] = "order"
    width_option: ClassVar[str | None] = "dim"
    has_own_precisions: ClassVar[bool] = True

    blocks: tuple[int, ...] = param((), "ids of each tier but the last, most frequent first; the last takes the rest")
    precisions: tuple[str, ...] = param(TIERS, "of the rows of each tier in exported files; the last may be 'dropped'")
    dim: int | None = param(None, "width of the stored rows; None: the feature's, without a matrix", low=1)
    order: Literal["ids", "counts"] = param("ids", "'ids' fall in frequency, or `assign_(counts)` orders them")

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        known, n, tiers = get_args(Precision), spec.num_ids, len(self.precisions)
        named = self.precisions[:-1] if self.precisions[-1:] == (DROPPED,) else self.precisions
        faults += [
            f"{DROPPED!r} in `precisions` is for the last tier; give the {tiers} tiers in another order"
            if p == DROPPED
            else str(unknown_name("precision in `precisions`", p, (*known, DROPPED)))
            for p in named
            if p not in known
        ]
        if not named:
            faults.append(f"`precisions` must name that of at least one tier with rows; got {self.precisions!r}")
        if len(self.blocks) != tiers - 1:
            faults.append(
                f"`blocks` must hold a number of ids for all but the last of the {tiers} tiers; got {self.blocks!r:.80}"
            )
        if min(self.blocks, default=1) < 1 or sum(self.blocks) >= n:
            faults.append(f"`blocks` must be at least 1 and leave ids of {n} to the last tier; got {self.blocks!r:.80}")
        if self.dim is not None and self.dim > spec.embedding_dim:
            faults.append(f"`dim` must be in [1, {spec.embedding_dim}], the feature's width; got {self.dim}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        n, dim = spec.num_ids, self.dim or spec.embedding_dim
        form = IdSet if self.order == "ids" else IdSet.smallest
        plain, tables, row_lookups, start = Initializer.plain(spec), [], [], 0
        for tier, (count, precision) in enumerate(
            zip((*self.blocks, n - sum(self.blocks)), self.precisions, strict=True)
        ):
            if precision == DROPPED:
                break
            name = f"tier_{tier}"
            tables.append(Table(name, count, dim, plain, precision=precision))
            row_lookups.append(
                RowLookup(name, MixedRadixDigit() if count == n else RankInSet(form(name, n, start, count)))
            )
            start += count
        if dim == spec.embedding_dim:
            return LookupProgram(tuple(tables), tuple(row_lookups))
        half = "fp32" if {t.precision for t in tables} == {"fp32"} else "fp16"
        matrix = Table(
            "projection", dim, spec.embedding_dim, Initializer("uniform", (3 / dim) ** 0.5), dense=True, precision=half
        )
        return LookupProgram((*tables, matrix), tuple(row_lookups), head=Projection("projection"))

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        return max(1, spec.num_ids - 1)

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, *, upper_share: float = 0.2, **params: Any) -> Self:
        """``size`` ids in the tiers before the last, at least one in each.

        Args:
            upper_share: of the ids of a tier and those before it, which are in those before it.
        """
        if isinstance(upper_share, bool) or not isinstance(upper_share, int | float) or not 0 < upper_share < 1:
            raise ConfigError(f"`upper_share` must be a number in (0, 1); got {upper_share!r}")
        if "blocks" in params:
            raise ConfigError("give `blocks`, or a byte budget that finds them; got both")
        precisions = tuple(params.pop("precisions", TIERS))
        # Tiers end where rows that share a scale do: bytes grow with the size then.
        width = params.get("dim") or spec.embedding_dim
        unit = max((Layout.of(width, p).block for p in precisions if p in get_args(Precision)), default=1)
        # A feature of few ids has the first tiers only.
        units = -(-spec.num_ids // unit)
        precisions = precisions[:units]
        lower = len(precisions) - 1
        edges = [max(at + 1, round(size * upper_share ** (lower - 1 - at) / unit)) for at in range(lower)]
        for at in range(1, lower):
            edges[at] = max(edges[at], edges[at - 1] + 1)
        edges = [unit * min(edge, units - lower + at) for at, edge in enumerate(edges)]
        blocks = tuple(b - a for a, b in zip([0, *edges], edges, strict=False))
        return cls.from_params({**params, "precisions": precisions, "blocks": blocks})

    @classmethod
    def planning_variants(cls, spec: FeatureSpec, curve: Any) -> Sequence[Mapping[str, Any]]:
        """Tiers that the planner tries."""
        return tuple({"precisions": tiers} for tiers in (TIERS, ("int8", DROPPED)))


class TieredEmbedding(CompressedEmbedding):
    """Drop-in over one table per frequency tier, each served at a precision of its own.

    >>> emb = TieredEmbedding(1_000_000, 16, blocks=(10_000, 200_000))
    >>> emb(torch.tensor([[1, 999_999]])).shape, emb.footprint().serve
    (torch.Size([1, 2, 16]), 8920000)
    """

    config_cls = TieredConfig

    @torch.no_grad()
    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Set rows and matrix to the best approximation of ``weight [spec.num_ids, embedding_dim]``.

        Narrow rows are the coordinates along the leading right singular vectors of all rows, scaled by the square roots
        of ``counts`` (Eckart and Young 1936).
        """
        axes = None
        if self.program.head is not None:
            width = self.table("projection").shape[0]
            axes = principal_axes(weight, importance_of(self, weight, counts), width, self._chunks(len(weight)))
            self.table("projection").copy_(axes.T)
        for row_lookup in self.program.row_lookups:
            owners = self.kernel.index.owners(0, row_lookup.transform, self.spec.num_ids)
            if owners is None:
                raise RuntimeError(f"tiers of {type(self).__name__} are rows of single ids; got {row_lookup.transform}")
            table = self.table(row_lookup.table)
            for chunk in self._chunks(len(table)):
                rows = weight[owners.to(weight.device)[chunk]].double()
                table[chunk] = (rows if axes is None else rows @ axes).to(table.dtype)
