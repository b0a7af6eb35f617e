"""freqcut: frequent ids own rows, all rarer ids share one row; a baseline that other methods should beat."""

from __future__ import annotations

from collections.abc import Mapping
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
from recsys_embed.features import MAX_ROWS, FeatureSpec


@dataclass(frozen=True, kw_only=True)
class FreqcutConfig(MethodConfig):
    """``num_frequent`` rows for as many of the most frequent ids, and one row for all others.

    This equals a smaller vocabulary with an out-of-vocabulary id: it loses only the distinction between rare ids.
    ``order`` determines the kept ids, as for ``adaptive``: with ``"ids"``, ids are numbered by falling frequency and
    nothing is stored; with ``"counts"``, ``assign_(counts)`` before training stores them (a bitmap or sorted array).

    >>> FreqcutConfig(num_frequent=499).footprint(FeatureSpec("C1", 10_000, 16)).serve
    32000
    """

    method: ClassVar[str] = "freqcut"
    order_option: ClassVar[str | None] = "order"
    renamed_options: ClassVar[Mapping[str, str]] = {"num_kept": "num_frequent"}

    num_frequent: int = param(MISSING, "most frequent ids, which own rows", low=0, high=MAX_ROWS - 1)
    order: Literal["ids", "counts"] = param("ids", "'ids' fall in frequency, or `assign_(counts)` says which are kept")

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        if self.num_frequent >= spec.num_ids:
            faults.append(f"`num_frequent` must be in [0, {spec.num_ids - 1}]; got {self.num_frequent}")
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        rows: Transform = MixedRadixDigit(mod=1)
        if self.num_frequent:
            index = IdSet("kept", spec.num_ids, 0, self.num_frequent)
            if self.order == "counts":
                index = IdSet.smallest("kept", spec.num_ids, 0, self.num_frequent)
            rows = RankInSet(index, rest=1)
        table = Table("weight", self.num_frequent + 1, spec.embedding_dim, Initializer.plain(spec))
        return LookupProgram((table,), (RowLookup("weight", rows),))

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({**params, "num_frequent": size - 1})


class FreqcutEmbedding(CompressedEmbedding):
    """Drop-in over a table of the most frequent ids and one row that all others share.

    >>> import torch
    >>> emb = FreqcutEmbedding(1_000_000, 16, num_frequent=50_000)
    >>> bool((emb(torch.tensor([50_000])) == emb(torch.tensor([999_999]))).all())
    True
    """

    config_cls = FreqcutConfig
