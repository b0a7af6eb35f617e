"""Policies for unseen ids, applied to the ids of all features before the lookup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec
from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.derivatives import outside_transforms
from recsys_embed.kernels.id_checks import check_feature_ids, check_id_range
from recsys_embed.kernels.recording import hidden, recording, refused_when_run, tracing, unmapped

NO_ID = -1
"""The id that reads no row."""
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1


class UnseenCount(NamedTuple):
    """Lookups of a feature since counting began: of unseen ids, and of all ids."""

    unseen: int
    looked_up: int


def action(spec: FeatureSpec, hashes: bool) -> Literal["pass", "raise", "hash", "oov", "zero"]:
    """The action for an unseen id of ``spec``, given whether its method ``hashes`` any id.

    >>> action(FeatureSpec("C1", 10, 4), hashes=True), action(FeatureSpec("C1", 10, 4), hashes=False)
    ('pass', 'raise')
    """
    if hashes and spec.unseen in (None, "hash"):
        return "pass"
    return spec.unseen or "raise"


def with_unseen(spec: FeatureSpec, counts: Tensor) -> Tensor:
    """Counts per id ``[num_embeddings]`` as counts per stored id ``[num_ids]``; the id for unseen ids ranks last.

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
    """A trained table ``[num_embeddings, width]`` and its counts, extended to all ``num_ids`` stored ids.

    The id for unseen ids gets the mean row, weighted by ``counts``, and the mean count.
    """
    if spec.num_ids == len(weight):
        return weight, counts
    share = torch.ones(len(weight)) if counts is None else counts
    share = (share.double() / share.double().mean()).to(weight.device)
    mean = (weight.double() * share.unsqueeze(1)).mean(0, keepdim=True)
    return torch.cat([weight, mean.to(weight.dtype)]), torch.cat([share, share.new_ones(1)])


class UnseenIds(Constants):
    """The policies for unseen ids and padding of many features as tensors over features, and device counters.

    Padding becomes -1, which reads no row. In features with padding a given -1 is an id like any other outside
    ``[0, num_embeddings)``; where a method hashes it, it takes the number that padding has left.

    Lookups are counted if the policy of any feature is ``"hash"``, ``"oov"`` or ``"zero"``. Counters are neither in the
    state dict nor in exported programs, and counting never waits for the device. Lookups are thread-safe, counts are
    not: concurrent additions may be lost.

    Args:
        specs: the features.
        hashes: per feature, whether its method accepts any id.
    """

    counts: Tensor

    def __init__(self, specs: Sequence[FeatureSpec], hashes: Sequence[bool]) -> None:
        super().__init__()
        self.names = tuple(s.name for s in specs)
        actions = [action(s, h) for s, h in zip(specs, hashes, strict=True)]
        self.actions = tuple(actions)
        self.refuses = "raise" in actions
        padding = [s.padding_idx for s in specs]
        self.pads = any(p is not None for p in padding)
        self.zeros = tuple(a == "zero" or p is not None for a, p in zip(actions, padding, strict=True))
        self.counting = any(s.unseen in ("hash", "oov", "zero") for s in specs)
        self.substitutes = not {"hash", "oov", "zero"}.isdisjoint(actions)
        self.replaces = self.pads or self.substitutes
        # Bounds of valid ids per feature; -1 allows any id, as in check_feature_ids.
        sizes = [s.num_embeddings for s in specs]
        self.add_constant("limits", [n if a == "raise" else -1 for n, a in zip(sizes, actions, strict=True)])
        raw = [s.ids == "raw" for s in specs]
        self.add_constant("low", [_LOWEST if r else 0 for r in raw])
        self.add_constant("last", [_HIGHEST if r else n - 1 for n, r in zip(sizes, raw, strict=True)])
        self.add_constant("sizes", sizes)
        self.add_constant("salts", [hashing.salt(0, s.table_name, "unseen") for s in specs])
        self.add_constant("fixed", [NO_ID if a == "zero" else n for n, a in zip(sizes, actions, strict=True)])
        self.add_constant("kinds", [{"hash": 1, "oov": 2, "zero": 2}.get(a, 0) for a in actions])
        # Features that hash any id and have padding: a given -1 is hashed as the number that padding has left.
        self.swaps = any(a == "pass" and p is not None for a, p in zip(actions, padding, strict=True))
        if self.pads:
            self.add_constant("pads", [int(p is not None) for p in padding])
            self.add_constant("padding", [0 if p is None else p for p in padding])
            # Lookups would take a given -1 for padding: it is hashed by another number, or is refused by another.
            kept = [int(a in ("pass", "raise") and p is not None) for a, p in zip(actions, padding, strict=True)]
            self.add_constant("moves", kept)
            self.add_constant("moved", [(p or 0) if a == "pass" else -2 for a, p in zip(actions, padding, strict=True)])
        # No buffer: averages of weights, checkpoints and other processes have no part in it.
        self.counts = torch.zeros(len(self.names), 2, dtype=torch.int64)

    # -- resolving ------------------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, feature: Tensor | int | None = None, ignored: Tensor | None = None) -> Tensor:
        """Replace unseen ids by the policies of their features, and padding by -1; count unseen ids.

        Args:
            ids: int64 ``[B, F]``, or ``[n]`` with ``feature [n]``, the feature of each id; of a single feature any
                shape.
            feature: int64 ``[n]``, or the position of the one feature whose ids these are, of any shape.
            ignored: bool of the shape of ``ids``: ids in range that are not counted.

        Returns:
            int64 of the shape of ``ids``: ids in ``[0, num_ids)``, or any id if the method accepts any; -1 if no row is
            read.

        Raises:
            IdRangeError: names the first feature that refuses an unseen id, and its smallest and largest id.
        """
        return self.resolve(ids, feature, ignored, count=self.counting and _is_first_pass())

    def resolve(
        self,
        ids: Tensor,
        feature: Tensor | int | None = None,
        ignored: Tensor | None = None,
        *,
        count: bool = False,
        check: bool = True,
    ) -> Tensor:
        """As :meth:`forward`; counting is optional, and without ``check`` refused ids are returned unchanged."""
        if self.refuses and tracing():
            check, ids = False, self._refused_when_run(ids, feature) if check else ids
        plain = isinstance(feature, int) and self.actions[feature] in ("pass", "raise") and not self.zeros[feature]
        if not ((self.replaces and not plain) or count) or ids.device.type == "meta":
            if check:
                self.check(ids, feature)
            return ids
        if check and self.refuses:
            self.check(ids, feature)
        padding = None
        if self._has_padding(feature):
            padding = ids == self._of("padding", ids, feature)
            if not isinstance(feature, int):
                padding = padding & (self._of("pads", ids, feature) != 0)
            ignored = padding if ignored is None else ignored | padding
        out = ids
        if count or self.substitutes:
            outside = (ids < self._of("low", ids, feature)) | (ids > self._of("last", ids, feature))
            if count:
                self._count(outside, feature, ignored)
            out = self._substituted(ids, outside, feature) if self.substitutes else ids
        if padding is None:
            return out
        if self.swaps or not check:  # a check that has passed leaves no other -1
            moves = (ids == NO_ID) & (self._of("moves", ids, feature) != 0)
            out = torch.where(moves, self._of("moved", ids, feature), out)
        return torch.where(padding, NO_ID, out)

    def _has_padding(self, feature: Tensor | int | None) -> bool:
        if not self.pads or not isinstance(feature, int):
            return self.pads
        return bool(self._integers["pads"][feature])

    def _substituted(self, ids: Tensor, outside: Tensor, feature: Tensor | int | None) -> Tensor:
        """``ids`` with those outside as the policies have them."""
        if ids.device.type == "cpu" and not hidden(ids) and not bool(outside.any()):
            return ids
        kinds = self._of("kinds", ids, feature)
        replaced = self._of("fixed", ids, feature)
        if "hash" in self.actions:
            hashed = hashing.hash_rows(ids, self._of("salts", ids, feature), self._of("sizes", ids, feature))
            replaced = torch.where(kinds == 1, hashed, replaced)
        return torch.where(outside & (kinds != 0), replaced, ids)

    def _of(self, name: str, near: Tensor, feature: Tensor | int | None) -> Tensor:
        """A constant in the shape that broadcasts with ids."""
        values = self.constant(name, near)
        if feature is not None:
            return values[feature]
        return values if len(self.names) > 1 else values.view(())  # ids of a single feature have any shape

    def _refused_when_run(self, ids: Tensor, feature: Tensor | int | None) -> Tensor:
        """As :meth:`check`, of the program that is being traced."""
        limits = self._of("limits", ids, feature)
        return refused_when_run(ids, ((ids < 0) | (ids >= limits)) & (limits >= 0))

    def check(self, ids: Tensor, feature: Tensor | int | None = None) -> None:
        """Raise if a feature refuses one of its ids; see :meth:`forward`."""
        if isinstance(feature, Tensor) or (feature is None and len(self.names) > 1):
            check_feature_ids(ids, self.constant("limits", ids), self.names, feature)
            return
        one = feature or 0
        if self.actions[one] == "raise":
            # One feature needs no bound per id.
            check_id_range(ids, self._integers["sizes"][one], self.names[one])  # type: ignore[arg-type]  # a flat list

    # -- counting -------------------------------------------------------------------------------------------------

    def _count(self, outside: Tensor, feature: Tensor | int | None, ignored: Tensor | None) -> None:
        if torch.compiler.is_compiling():
            self._add(outside, feature, ignored)
            return
        # Counters belong to no function that torch.func transforms.
        with outside_transforms():
            mapped = [unmapped(t) if isinstance(t, Tensor) else t for t in (feature, ignored)]
            self._add(unmapped(outside), mapped[0], cast("Tensor | None", mapped[1]))

    @torch.no_grad()
    def _add(self, outside: Tensor, feature: Tensor | int | None, ignored: Tensor | None) -> None:
        if self.counts.device != outside.device:
            self.counts = self._on(outside.device)
        if isinstance(feature, int):
            self.counts[feature, 0].add_(outside.sum())
            self.counts[feature, 1].add_(outside.numel() if ignored is None else (~ignored).sum())
            return
        if feature is not None:
            counted = torch.ones_like(outside) if ignored is None else ~ignored
            self.counts.index_add_(0, feature, torch.stack([outside, counted], -1).to(torch.int64))
            return
        number = len(self.names)
        looked_up = outside.numel() // number if ignored is None else (~ignored).reshape(-1, number).sum(0)
        self.counts[:, 0].add_(outside.reshape(-1, number).sum(0))
        self.counts[:, 1].add_(looked_up)

    def read(self) -> dict[str, UnseenCount]:
        """Counts by feature; waits for the device."""
        return {name: UnseenCount(*row) for name, row in zip(self.names, self.counts.tolist(), strict=True)}

    def reset(self) -> None:
        """Reset all counts to zero."""
        self.counts.zero_()

    def _on(self, device: torch.device) -> Tensor:
        """The counts on a device; zeros from one that holds no values."""
        counts = self.counts
        return torch.zeros(counts.shape, dtype=torch.int64, device=device) if counts.is_meta else counts.to(device)

    def recreate_derived_tensors(self, device: torch.device) -> None:
        super().recreate_derived_tensors(device)
        self.counts = self._on(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        moved = fn(self._on(torch.device("cpu")) if self.counts.is_meta else self.counts)
        # Memory without values (`to_empty`, the meta device) takes the counts along or starts from zero.
        self.counts = moved if moved is self.counts else self._on(moved.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.refuses = "raise" in self.actions
        # Earlier versions knew no padding.
        self.pads, self.swaps = self.__dict__.get("pads", False), self.__dict__.get("swaps", False)
        self.substitutes = self.__dict__.get("substitutes", self.replaces)
        counts = self._buffers.pop("counts", None)  # a buffer of earlier versions
        if counts is not None:
            self.counts = counts


def _is_first_pass() -> bool:
    """Whether a lookup counts: not within an exported program, nor where a backward computes activations anew."""
    if recording():
        return torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return torch._C._current_graph_task_id() == -1
