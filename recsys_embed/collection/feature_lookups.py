"""Lookups of single features of a bundle: ids that are not pooled, and rows that are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from recsys_embed.collection.batched_lookup import BATCHED_LOOKUPS, BatchedFeatures, BatchedLookup
from recsys_embed.collection.generated_rows import GeneratedLookup
from recsys_embed.collection.head_tables import HeadTables
from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.distinct_ids import distinct_ids
from recsys_embed.kernels.native.autograd import NativeStep
from recsys_embed.kernels.places import Gather
from recsys_embed.kernels.reference import ReferenceLookup
from recsys_embed.kernels.row_cache import RowCaches
from recsys_embed.kernels.unseen_ids import UnseenIds
from recsys_embed.kernels.vectorised import VectorisedLookup


class FeatureLookups(Constants, ABC):
    """What a bundle looks up feature by feature.

    Attributes:
        caches: of rows that are computed, where a loaded file is served with them.
    """

    caches: RowCaches | None
    unseen: UnseenIds
    heads: HeadTables
    kernel: VectorisedLookup | ReferenceLookup
    parts: list[tuple[int, ...]]
    _places: Mapping[int, int]
    _generated: frozenset[int]
    _unpooled: list[dict[str, BatchedLookup | None]]
    _makers: dict[str, BatchedFeatures]

    @abstractmethod
    def vectors_of(self, feature: int, ids: Tensor) -> Tensor:
        """Vectors of resolved ``ids [n]`` of a feature that runs itself: ``[n, width]``."""

    def unpooled(self, feature: int, ids: Tensor, gather: Gather) -> Tensor:
        """Vectors ``[n, width]`` of int64 ``ids [n]`` of one feature."""
        ids = self.unseen(ids, feature)
        group = self._places.get(feature)
        if group is None:
            return self.vectors_of(feature, ids).flatten(1)
        if group not in self._generated:
            return self._by_torch(feature, ids, gather)
        vectors = self._generated_rows(feature, ids, gather)
        if vectors is not None:
            return vectors
        found = distinct_ids(ids)
        return found.scatter(self._by_torch(feature, found.ids, gather))

    def _by_torch(self, feature: int, ids: Tensor, gather: Gather) -> Tensor:
        """Vectors ``[n, width]`` of resolved ``ids [n]`` of a feature whose rows are gathered."""
        group, key = self._places[feature], f"unpooled{feature}_0"
        local = torch.full_like(ids, self.parts[group].index(feature))
        (columns,) = self.kernel([ids], [local], gather, [group])
        if self.heads.head(key) is None:
            return columns
        return self.heads.vectors(key, columns.unsqueeze(1), ids.unsqueeze(1)).flatten(1)

    def _generated_rows(
        self, feature: int, ids: Tensor, gather: Gather, by_kernels: GeneratedLookup | None = None
    ) -> Tensor | None:
        """Vectors ``[n, width]`` of resolved ``ids [n]`` of a feature whose rows are computed: by kernels, or of its
        cache; None: by torch, with the other groups.
        """
        vectors = None if by_kernels is None else by_kernels(feature, ids)
        if vectors is not None or self.caches is None:
            return vectors
        return self.caches.rows(feature, ids, lambda distinct: self._by_torch(feature, distinct, gather))

    def _by_kernels(self, kernels: str, tables: list[Tensor], step: NativeStep | None, sparse: bool) -> GeneratedLookup:
        return GeneratedLookup(partial(self.batched_lookup_of, kernels), tables, step, sparse, self.caches)

    @property
    def generated(self) -> list[int]:
        """Positions of the features whose rows are computed."""
        return [self.parts[p][0] for p in sorted(self._generated)]

    def unpooled_batched(
        self,
        feature: int,
        batched: BatchedLookup,
        ids: Tensor,
        tables: list[Tensor],
        step: NativeStep | None,
        sparse: bool,
    ) -> Tensor:
        """As :meth:`unpooled`, by :meth:`batched_lookup_of` the feature."""
        if self._places[feature] in self._generated:
            look_up = GeneratedLookup(lambda _: batched, tables, step, sparse, self.caches)
            return cast("Tensor", look_up(feature, self.unseen(ids.long(), feature)))
        return batched.single(ids.unsqueeze(1), tables, step, sparse)[0].flatten(1)

    def batched_lookup_of(self, kernels: str, feature: int) -> BatchedLookup | None:
        """The lookup of one feature by kernels; None where these leave it to torch."""
        # Dynamo reads a dictionary once, so that each feature has its own, which is complete when it is read.
        if torch.compiler.is_compiling() or kernels not in self._unpooled[feature]:
            self._make_lookup_of(kernels, feature)
        return self._unpooled[feature][kernels]

    def _make_lookup_of(self, kernels: str, feature: int) -> bool:
        every, found = self._makers[kernels], self._unpooled[feature]
        if kernels in found or feature not in every.positions:
            found.setdefault(kernels, None)
            return True
        at = list(every.positions).index(feature)
        one = replace(
            every, numbers=[every.numbers[at]], positions=[feature], columns=[0], programs=[every.programs[at]],
            places=[every.places[at]],
        )  # fmt: skip
        found[kernels] = BATCHED_LOOKUPS[kernels](one, [], f"unpooled{feature}_")
        return True

    # Encodings of programs are made by numpy, which Dynamo does not follow. What torch.compiler.assume_constant_result
    # sets, without the seconds that it takes to import Dynamo.
    _make_lookup_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
