"""Policies for unseen ids: applied to the ids of all features at once, before any lookup reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec
from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.id_checks import check_feature_ids, check_id_range

NO_ID = -1
"""Stands for an id that reads no row."""
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1


class UnseenCount(NamedTuple):
    """Ids a feature was asked for since counting began: those never seen, and all. Both are numbers of lookups."""

    unseen: int
    looked_up: int


def action(spec: FeatureSpec, hashes: bool) -> Literal["pass", "raise", "hash", "oov", "zero"]:
    """What is done to an unseen id of ``spec`` under a method that ``hashes`` any id, or does not.

    >>> action(FeatureSpec("C1", 10, 4), hashes=True), action(FeatureSpec("C1", 10, 4), hashes=False)
    ('pass', 'raise')
    """
    if hashes and spec.unseen in (None, "hash"):
        return "pass"
    return spec.unseen or "raise"


def with_unseen(spec: FeatureSpec, counts: Tensor) -> Tensor:
    """Counts per id ``[num_embeddings]`` as counts per stored id ``[num_ids]``: the id of unseen ones ranks last.

    Raises:
        ConfigError: of another shape.
    """
    counts = torch.as_tensor(counts)
    if counts.shape != (spec.num_embeddings,):
        raise ConfigError(
            f"`counts` must be [{spec.num_embeddings}], one per id; got shape {tuple(counts.shape)} "
            f"(feature {spec.name!r})"
        )
    return F.pad(counts, (0, spec.num_ids - spec.num_embeddings))


def with_unseen_row(spec: FeatureSpec, weight: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A trained table ``[num_embeddings, width]`` and its counts as ones of all stored ids, ``num_ids``.

    Nothing is known of unseen ids but that they are ids, so theirs gets the mean over all, weighted by ``counts``, and
    the mean count.
    """
    if spec.num_ids == len(weight):
        return weight, counts
    share = torch.ones(len(weight)) if counts is None else counts
    share = (share.double() / share.double().mean()).to(weight.device)
    mean = (weight.double() * share.unsqueeze(1)).mean(0, keepdim=True)
    return torch.cat([weight, mean.to(weight.dtype)]), torch.cat([share, share.new_ones(1)])


class UnseenIds(Constants):
    """The policies of many features as tensors over features, and device counters of unseen ids.

    Counting is on where some feature's policy is ``"hash"``, ``"oov"`` or ``"zero"``. Counters are no part of the
    state dict and of no exported program, and adding to them never waits for the device. Threads that look up at once
    get right vectors, but additions of two threads at the same moment may lose one.

    Args:
        specs: the features.
        hashes: per feature, whether its method takes any id.
    """

    counts: Tensor

    def __init__(self, specs: Sequence[FeatureSpec], hashes: Sequence[bool]) -> None:
        super().__init__()
        self.names = tuple(s.name for s in specs)
        actions = [action(s, h) for s, h in zip(specs, hashes, strict=True)]
        self.actions = tuple(actions)
        self.zeros = tuple(a == "zero" for a in actions)
        self.counting = any(s.unseen in ("hash", "oov", "zero") for s in specs)
        self.replaces = not {"hash", "oov", "zero"}.isdisjoint(actions)
        # The bounds of ids that are as they should be; -1 where any is, which the check of ranges reads so.
        sizes = [s.num_embeddings for s in specs]
        self.add_constant("limits", [n if a == "raise" else -1 for n, a in zip(sizes, actions, strict=True)])
        raw = [s.ids == "raw" for s in specs]
        self.add_constant("low", [_LOWEST if r else 0 for r in raw])
        self.add_constant("last", [_HIGHEST if r else n - 1 for n, r in zip(sizes, raw, strict=True)])
        self.add_constant("sizes", sizes)
        self.add_constant("salts", [hashing.salt(0, n, "unseen") for n in self.names])
        self.add_constant("fixed", [NO_ID if a == "zero" else n for n, a in zip(sizes, actions, strict=True)])
        self.add_constant("kinds", [{"hash": 1, "oov": 2, "zero": 2}.get(a, 0) for a in actions])
        self.register_buffer("counts", torch.zeros(len(self.names), 2, dtype=torch.int64), persistent=False)

    # -- resolving ------------------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, feature: Tensor | None = None, ignored: Tensor | None = None) -> Tensor:
        """Replace unseen ids as their features say, and count them.

        Args:
            ids: int64 ``[B, F]``, or ``[n]`` with ``feature [n]``, the feature of each id; of a single feature any
                shape.
            feature: int64 ``[n]``.
            ignored: bool of the shape of ``ids``: ids in range that are not counted.

        Returns:
            int64 of the shape of ``ids``: ids in ``[0, num_ids)``, -1 where an id reads no row, and what it will where
            the method takes any id.

        Raises:
            IdRangeError: names the first feature that refuses an unseen id, and its smallest and largest id.
        """
        counts = self.counting and not torch.compiler.is_exporting()
        return self.resolve(ids, feature, ignored, count=counts)

    def resolve(
        self,
        ids: Tensor,
        feature: Tensor | None = None,
        ignored: Tensor | None = None,
        *,
        count: bool = False,
        check: bool = True,
    ) -> Tensor:
        """As calling it, counting only if told to; without ``check`` ids that are refused come back as they are."""
        if not (self.replaces or count) or ids.device.type == "meta":
            if check:
                self.check(ids, feature)
            return ids
        if check and "raise" in self.actions:
            self.check(ids, feature)
        outside = (ids < self._of("low", feature)) | (ids > self._of("last", feature))
        if count:
            self._count(outside, feature, ignored)
        if not self.replaces:
            return ids
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(outside.any()):
            return ids
        kinds = self._of("kinds", feature)
        replaced = self._of("fixed", feature)
        if "hash" in self.actions:
            hashed = hashing.hash_rows(ids, self._of("salts", feature), self._of("sizes", feature))
            replaced = torch.where(kinds == 1, hashed, replaced)
        return torch.where(outside & (kinds != 0), replaced, ids)

    def _of(self, name: str, feature: Tensor | None) -> Tensor:
        """A constant, as it broadcasts with ids."""
        values = self.constant(name)
        if feature is not None:
            return values[feature]
        return values if len(self.names) > 1 else values.view(())  # ids of a single feature have any shape

    def check(self, ids: Tensor, feature: Tensor | None = None) -> None:
        """Raise for ids that their features refuse; see calling it."""
        if len(self.names) > 1 or feature is not None:
            check_feature_ids(ids, self.constant("limits"), self.names, feature)
        elif self.actions[0] == "raise":
            # One feature needs no bound per id.
            check_id_range(ids, self._integers["sizes"][0], self.names[0])  # type: ignore[arg-type]  # it is a flat list

    # -- counting -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _count(self, outside: Tensor, feature: Tensor | None, ignored: Tensor | None) -> None:
        if feature is not None:
            counted = torch.ones_like(outside) if ignored is None else ~ignored
            self.counts.index_add_(0, feature, torch.stack([outside, counted], -1).to(torch.int64))
            return
        number = len(self.names)
        looked_up = outside.numel() // number if ignored is None else (~ignored).reshape(-1, number).sum(0)
        self.counts[:, 0].add_(outside.reshape(-1, number).sum(0))
        self.counts[:, 1].add_(looked_up)

    def read(self) -> dict[str, UnseenCount]:
        """The counts by feature; waits for the device."""
        return {name: UnseenCount(*row) for name, row in zip(self.names, self.counts.tolist(), strict=True)}

    def reset(self) -> None:
        """Count from zero."""
        self.counts.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.counts.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.counts.is_meta:
            self.reset()
        return self
