"""robe: ids read blocks of one flat array at hashed offsets, shared by all features (ROBE-Z, arXiv 2108.02191)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from typing import Any, ClassVar, Self

from recsys_embed.core import hashing
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.precision import Layout, rows_within
from recsys_embed.core.program import Hash, Initializer, LookupProgram, RowLookup, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.features import MAX_ROWS, FeatureSpec
from recsys_embed.method_parts.shared_plan import keep_small_tables


@dataclass(frozen=True, kw_only=True)
class RobeConfig(MethodConfig):
    """A flat array of ``num_elements`` for every feature that names it (Desai, Chou, Shrivastava, MLSys 2022).

    A vector is cut into blocks of Z = ``block_size`` elements, the last one shorter where Z does not divide the width.
    The offset of each block is a hash of the id, salted with the feature's name and the block's number, so a feature
    keeps its offsets when others are added or removed. Blocks overlap freely. Z = 1 is HashedNets (Chen et al.,
    ICML 2015); with Z = ``embedding_dim``, the default, a vector is one contiguous read. Elements of one block never
    collide with one another, so larger blocks collide less within a vector.

    Blocks wrap around the end of the array, as in the paper, so that all elements are used equally; with ``wrap=False``
    they start in [0, num_elements - Z], as in the authors' code. Hashes are splitmix64 where the paper's are linear
    modulo a prime, and independent per feature where the authors' differ by an offset.

    Pitfalls: in Hetu's implementation "Z" is the number of blocks, so its Z = 1 is this one's
    ``block_size=embedding_dim``. Features that are SUMMED before the first layer should not share an array. Elements of
    an array shared by features of unlike cardinality start with U(±0.001), the authors' example, unless the features'
    own initializer is explicit; with one that depends on nothing else, give the features one.

    >>> RobeConfig(num_elements=8000).footprint(FeatureSpec("C1", 100_000, 16)).serve
    32000
    """

    method: ClassVar[str] = "robe"
    accepts_raw: ClassVar[bool] = True

    num_elements: int = param(MISSING, "elements of the shared array", low=1, high=MAX_ROWS)
    block_size: int | None = param(None, "consecutive elements per block (Z); embedding_dim by default", low=1)
    wrap: bool = param(True, "blocks continue at the array's beginning; false: they start early enough to fit")
    sign: bool = param(False, "multiply every element by a hash of its own in {-1, +1}")
    table: str = param("robe", "name of the shared array; features that name another do not share")

    def _block(self, spec: FeatureSpec) -> int:
        """Elements of a block; one longer than the vector is cut to it."""
        return min(self.block_size or spec.embedding_dim, spec.embedding_dim)

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        block = self._block(spec)
        if self.num_elements < block:
            faults.append(f"`num_elements` must be at least {block}, the length of a block; got {self.num_elements}")
        if not self.table or "." in self.table or "#" in self.table:
            faults.append(f"`table` must be a name without '.' or '#'; got {self.table!r}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        block, width = self._block(spec), spec.embedding_dim
        initialised = spec if ":" in spec.init else replace(spec, init="uniform:0.001")
        starts = self.num_elements if self.wrap else self.num_elements - block + 1

        def salt(use: str, number: int) -> int:
            return hashing.salt(self.seed, spec.table_name, use, number)

        reads = tuple(
            RowLookup(
                self.table,
                Hash(salt("block", number), starts),
                column=column,
                sign=salt("sign", number) if self.sign else None,
                num_rows=min(block, width - column),
            )
            for number, column in enumerate(range(0, width, block))
        )
        table = Table(self.table, self.num_elements, 1, Initializer.plain(initialised), shared=True)
        return LookupProgram((table,), reads)

    @classmethod
    def _longest(cls, spec: FeatureSpec, params: dict[str, Any]) -> int:
        """Elements that the smallest array must have."""
        return cls.from_params({**params, "num_elements": 1})._block(spec)

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        return min(MAX_ROWS, spec.num_ids * spec.embedding_dim) - cls._longest(spec, params) + 1

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        """An array ``size - 1`` elements longer than a block."""
        return cls.from_params({**params, "num_elements": cls._longest(spec, params) + size - 1})

    @classmethod
    def plan(
        cls, specs: Sequence[FeatureSpec], budget: int, plain: MethodConfig, *, full_below: int = 200, **params: Any
    ) -> dict[str, MethodConfig]:
        """One array of the bytes that the budget leaves.

        Args:
            full_below: features with fewer ids keep a private full table, smallest first, while these tables take
                at most half the budget.
        """
        chosen, spent, shared = keep_small_tables(specs, budget, plain, full_below)
        if not shared:
            return chosen
        least = max(cls._longest(s, params) for s in shared)
        precision = params.get("precision", "fp32")
        room = rows_within(budget - spent, 1, precision)
        elements = min(room, sum(s.num_ids * s.embedding_dim for s in shared), MAX_ROWS)
        if elements < least:
            need = spent + Layout.of(1, precision).nbytes(least)
            raise cls.budget_error(need, len(specs), budget, "`block_size`", per_id=False)
        config = cls.from_params({**params, "num_elements": elements})
        return {s.name: chosen.get(s.name, config) for s in specs}


class RobeEmbedding(CompressedEmbedding):
    """Drop-in for one feature: blocks of a flat array at hashed offsets; takes any int64 id.

    >>> import torch
    >>> emb = RobeEmbedding(1_000_000, 16, num_elements=200_000, block_size=8)
    >>> emb(torch.tensor([1, 2**40])).shape, emb.footprint().serve
    (torch.Size([2, 16]), 800000)
    """

    config_cls = RobeConfig
