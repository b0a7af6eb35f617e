"""optembed: the rows and the width that an OptEmbed search keeps, as a narrow table and an id set."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, Self

from recsys_embed.core.id_sets import IdSet
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import (
    Initializer,
    LookupProgram,
    MixedRadixDigit,
    RankInSet,
    RowLookup,
    Table,
    Transform,
)
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.features import MAX_DIM, MAX_ROWS, FeatureSpec
from recsys_embed.method_parts.pruned_columns import ColumnBuilder


@dataclass(frozen=True, kw_only=True)
class OptembedConfig(MethodConfig):
    """A feature pruned by OptEmbed (Lyu et al., CIKM 2022, arXiv 2208.04482): ``num_kept`` rows of width ``dim``.

    The search (:mod:`recsys_embed.search`, ``recsys-embed search optembed``) finds which rows; the plan that it writes
    names them (``order="counts"``). A configuration alone keeps the most frequent ids, see ``freqcut``. Columns
    from ``dim`` on are zeros, and cost nothing. Pruned ids share one row (``pruned="oov"``) or are zeros.

    The paper counts the kept elements alone; here the set of kept ids is counted too: 12 bytes per 64 ids, or 4 per
    kept id, whichever is less.

    >>> spec = FeatureSpec("C1", 10_000, 16)
    >>> OptembedConfig(num_kept=500, dim=8, pruned="zero", order="counts").footprint(spec).serve
    17884
    """

    method: ClassVar[str] = "optembed"
    order_option: ClassVar[str | None] = "order"
    width_option: ClassVar[str | None] = "dim"
    plannable: ClassVar[bool] = False

    num_kept: int = param(MISSING, "ids that own rows", low=0, high=MAX_ROWS)
    dim: int | None = param(None, "width of the rows; that of the feature by default", low=1, high=MAX_DIM)
    pruned: Literal["zero", "oov"] = param("oov", "vector of the other ids: 'zero', or one row ('oov') that they share")
    order: Literal["ids", "counts"] = param("ids", "kept ids: the first ('ids'), or those of a plan or `assign_`")

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        if self.num_kept > spec.num_ids:
            faults.append(f"`num_kept` must be in [0, {spec.num_ids}]; got {self.num_kept}")
        if self.dim is not None and self.dim > spec.embedding_dim:
            faults.append(f"`dim` must be in [1, {spec.embedding_dim}], the feature's width; got {self.dim}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        columns, dim = ColumnBuilder(spec.embedding_dim), self.dim or spec.embedding_dim
        rest = int(self.pruned == "oov" and self.num_kept < spec.num_ids)
        if not self.num_kept + rest:
            columns.skip(0, spec.embedding_dim)
            return columns.program()
        rows: Transform = MixedRadixDigit(mod=0 if self.num_kept else 1)
        if 0 < self.num_kept < spec.num_ids:
            form = IdSet if self.order == "ids" else IdSet.smallest
            rows = RankInSet(form("kept", spec.num_ids, 0, self.num_kept), rest=rest)
        columns.add(Table("weight", self.num_kept + rest, dim, Initializer.plain(spec)), RowLookup("weight", rows))
        return columns.program()

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        rest = int(params.get("pruned", "oov") == "oov" and size < spec.num_ids)
        return cls.from_params({**params, "num_kept": size - rest})


class OptembedEmbedding(CompressedEmbedding):
    """Drop-in over the rows and columns that OptEmbed kept.

    >>> import torch
    >>> emb = OptembedEmbedding(1000, 16, num_kept=2, dim=4, pruned="zero", order="counts")
    >>> _ = emb.assign_({"kept": torch.tensor([7, 30])})
    >>> emb(torch.tensor([7, 8])).count_nonzero(1)
    tensor([4, 0])
    """

    config_cls = OptembedConfig
