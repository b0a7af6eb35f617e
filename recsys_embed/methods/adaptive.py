"""adaptive: the most frequent ids own rows, all others share hashed rows (AdaptEmb, as in DeepRec)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, Self

from recsys_embed.core import hashing
from recsys_embed.core.id_sets import IdSet
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Hash, Initializer, LookupProgram, RankInSet, RowLookup, Table, Transform
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError
from recsys_embed.features import MAX_ROWS, FeatureSpec


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig(MethodConfig):
    """One table: ``num_frequent`` rows for as many ids, then ``num_buckets`` rows into which all other ids hash.

    ``order="ids"`` takes ids to be numbered by falling frequency, so that the frequent ones are ``[0, num_frequent)``
    and nothing more is stored. ``order="counts"`` stores the set of frequent ids (a bitmap or a sorted array, whichever
    is smaller, part of the footprint) and needs ``assign_(counts)`` before training; until then it behaves like
    ``"ids"``. Papers store a remap of 4 bytes per id and do not count it.

    Pitfall: with ``order="ids"`` and ids that are not numbered by frequency, arbitrary ids own the rows and frequent
    ones collide.

    When sizing by a budget, ``frequent_share`` of the rows (default: half) are for frequent ids.

    >>> AdaptiveConfig(num_frequent=100, num_buckets=400).footprint(FeatureSpec("C1", 10_000, 16)).serve
    32000
    >>> AdaptiveConfig(num_frequent=100, num_buckets=400, order="counts").footprint(FeatureSpec("C1", 10_000, 16)).index
    400
    """

    method: ClassVar[str] = "adaptive"
    order_option: ClassVar[str | None] = "order"
    renamed_options: ClassVar[Mapping[str, str]] = {"num_hot": "num_frequent", "hot_share": "frequent_share"}

    num_frequent: int = param(MISSING, "most frequent ids, which own rows", low=0, high=MAX_ROWS)
    num_buckets: int = param(MISSING, "rows that the other ids share", low=1, high=MAX_ROWS)
    order: Literal["ids", "counts"] = param(
        "ids", "'ids' fall in frequency, or `assign_(counts)` says which are frequent"
    )

    def check(self, spec: FeatureSpec) -> list[str]:
        faults = super().check(spec)
        n = spec.num_ids
        if self.num_frequent >= n:
            faults.append(
                f"`num_frequent` must be in [0, {n - 1}]; got {self.num_frequent}; with a budget use `frequent_share`"
            )
        elif self.num_buckets > n - self.num_frequent:
            most = n - self.num_frequent
            faults.append(
                f"`num_buckets` must be in [1, {most}], one per id that is not frequent; got {self.num_buckets}"
            )
        return faults

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        salt = hashing.salt(self.seed, spec.table_name, "row", 0)
        rows: Transform = Hash(salt, self.num_buckets)
        if self.num_frequent:
            index = IdSet("hot", spec.num_ids, 0, self.num_frequent)
            if self.order == "counts":
                index = IdSet.smallest("hot", spec.num_ids, 0, self.num_frequent)
            rows = RankInSet(index, rest=self.num_buckets, salt=salt)
        table = Table("weight", self.num_frequent + self.num_buckets, spec.embedding_dim, Initializer.plain(spec))
        return LookupProgram((table,), (RowLookup("weight", rows),))

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        frequent = cls.sized(spec, 1, **params).num_frequent if "num_frequent" in params else 0
        return max(1, spec.num_ids - frequent)

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, frequent_share: float | None = None, **params: Any) -> Self:
        """``size`` rows, ``frequent_share`` of them (in [0, 1)) for frequent ids; with ``num_frequent`` all shared."""
        options = cls.current_options(params)
        share = options.pop("frequent_share", frequent_share)
        if "num_frequent" in options and share is None:
            return cls.from_params({**options, "num_buckets": size})
        share = 0.5 if share is None else share
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not 0 <= share < 1 or "num_frequent" in options:
            raise ConfigError(
                f"`frequent_share` must be a number in [0, 1), and not beside `num_frequent`; got {share!r}"
            )
        frequent = int(share * size)
        return cls.from_params({**options, "num_frequent": frequent, "num_buckets": size - frequent})

    @classmethod
    def planning_variants(cls, spec: FeatureSpec, curve: Any) -> Sequence[Mapping[str, Any]]:
        """Shares of the rows for frequent ids that the planner tries."""
        return ({"frequent_share": 0.5}, {"frequent_share": 0.8})


class AdaptiveEmbedding(CompressedEmbedding):
    """Drop-in over one table in which frequent ids own rows and the others share hashed rows.

    >>> import torch
    >>> emb = AdaptiveEmbedding(1_000_000, 16, num_frequent=10_000, num_buckets=40_000, order="counts")
    >>> _ = emb.assign_(torch.arange(1_000_000))  # the larger the id, the more frequent
    >>> emb(torch.tensor([1, 999_999])).shape
    torch.Size([2, 16])
    """

    config_cls = AdaptiveConfig
