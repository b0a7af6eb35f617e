"""A bundle's features as fused kernels run them: one call whose outputs stand in schema order already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recsys_embed.collection.bags import Bags
from recsys_embed.errors import IdRangeError
from recsys_embed.kernels.native import ops as native_ops
from recsys_embed.kernels.native.autograd import NativeStep, look_up
from recsys_embed.kernels.native.lookup import Ids, NativeLookup
from recsys_embed.kernels.native.masks import Stage
from recsys_embed.kernels.native.output_pool import OutputPool
from recsys_embed.kernels.native.records import Slot, supported
from recsys_embed.kernels.triton.deferred import DeferredLookup
from recsys_embed.kernels.vectorised import Place, project

if TYPE_CHECKING:
    from recsys_embed.collection.lookup_bundle import LookupBundle


class FusedBundle:
    """On the CPU. Features without a projection share one output; those of one shape of projection share another.

    Args:
        bundle: the features, each with a program that the kernels know.
        places: per feature, where its tables lie.
        storages: shape of each storage by name.
    """

    def __init__(
        self,
        bundle: LookupBundle,
        places: list[dict[str, Place]],
        storages: Mapping[str, tuple[int, int]],
    ) -> None:
        self._unseen = bundle.unseen
        names = list(bundle.programs)
        position = {name: i for i, name in enumerate(bundle.schema.names)}
        projected = {i: shape for shape, members in bundle.projected.items() for i in members}
        direct = tuple(position[n] for n in names if position[n] not in projected)
        self.shapes: list[tuple[str | None, tuple[int, ...]]] = [(None, direct)] if direct else []
        self.shapes += [(shape, tuple(members)) for shape, members in bundle.projected.items()]
        slots: dict[int, Slot] = {}
        widths = []
        for output, (_, members) in enumerate(self.shapes):
            column = 0
            for i in members:
                slots[i] = Slot(output, column, bundle.schema.features[i].pooling == "mean")
                column += bundle.programs[bundle.schema.names[i]].combined_width
            widths.append(column)
        # Vectors that need nothing more stand as the whole output has them.
        dim = bundle.output_dim
        self._shapes = [
            (width,) if dim is None or shape is not None else (width // dim, dim)
            for (shape, _), width in zip(self.shapes, widths, strict=True)
        ]
        at = [position[name] for name in names]
        limits = self._unseen.integers_of("limits")
        self._build(
            names,
            list(bundle.programs.values()),
            places,
            bundle.kernel.index,
            storages,
            [slots[i] for i in at],
            widths,
            at,
            [limits[i] for i in at],
            [self._unseen.zeros[i] for i in at],
        )
        self.parts = [members for _, members in self.shapes]
        # Features that run themselves come last.
        self._own = [i for (i,) in (part for part in bundle.parts if part[0] not in slots)]
        self.parts += [(i,) for i in self._own]

    def _build(self, names: Sequence[str], *arguments: Any) -> None:
        self.lookup: Any = NativeLookup(*(*arguments, self._shapes))
        self._pool = OutputPool()

    @staticmethod
    def fits(bundle: LookupBundle) -> bool:
        """Whether there is something to run, and the kernels know how."""
        return bool(bundle.programs) and all(map(supported, bundle.programs.values()))

    def single(
        self,
        bundle: LookupBundle,
        ids: Tensor,
        tables: list[Tensor],
        step: NativeStep | None,
        sparse: bool,
        mask: Stage | None = None,
    ) -> list[Tensor]:
        """Vectors of ``ids [B, F]``: one tensor ``[B, columns]``, or as the whole output is, per entry of ``parts``.

        Args:
            mask: of all vectors, where it ``masks``.

        Raises:
            IdRangeError: names the first feature at fault.
        """
        ids = self._resolved(bundle, ids)
        out = self._projected(bundle, self._outputs(bundle, ids, tables, step, sparse, mask))
        for i in self._own:
            out.append(bundle.vectors_of(i, ids[:, i].long()))
        return out

    def masks(self, bundle: LookupBundle) -> bool:
        """Whether :meth:`single` takes a mask: the kernels write all vectors, of one width, where they stay."""
        whole = (None, tuple(range(len(bundle.schema))))
        one = self.shapes == [whole] and bundle.output_dim is not None and set(bundle.vectors) == {1}
        # A mask's parameters are for the ids as they are given.
        return one and not bundle.unseen.replaces

    def pools(self, bundle: LookupBundle, bags: Bags) -> bool:
        """Whether :meth:`pooled` takes the bags: sums and means, whose weights are constants."""
        if torch.compiler.is_compiling() or any(
            bundle.schema.features[i].pooling == "max" for _, members in self.shapes for i in members
        ):
            return False
        return bags.weights is None or (bags.weights.dtype == torch.float32 and not bags.weights.requires_grad)

    def pooled(
        self, bundle: LookupBundle, bags: Bags, tables: list[Tensor], step: NativeStep | None, sparse: bool
    ) -> list[Tensor]:
        """Pooled vectors of bags, as :meth:`single` has those of ids."""
        bags = bundle.resolved(bags) if self._unseen.replaces or self._unseen.counting else bags
        weights = None if bags.weights is None else bags.weights.contiguous()
        ids = Ids(bags.values.contiguous(), bags.offsets.contiguous(), weights, bags.batch)
        try:
            outputs = look_up(self.lookup, self._pool, ids, tables, step=step, sparse=sparse)
        except IdRangeError:
            bundle.resolved(bags)
            raise
        out = self._projected(bundle, outputs)
        for i in self._own:
            offsets = bags.offsets[i * bags.batch : (i + 1) * bags.batch + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            weights = None if bags.weights is None else bags.weights[first:last]
            out.append(bundle.pooled_own(i, bags.values[first:last], offsets - first, weights))
        return out

    def _projected(self, bundle: LookupBundle, outputs: Sequence[Tensor]) -> list[Tensor]:
        if not bundle.projected:
            return list(outputs)
        out = []
        for (shape, members), value in zip(self.shapes, outputs, strict=True):
            if shape is None:
                out.append(value)
                continue
            stacked = value.view(value.shape[0], len(members), value.shape[1] // len(members))
            out.append(project(stacked, bundle.projections[shape], "bfi,fio->bfo").flatten(1))
        return out

    def _resolved(self, bundle: LookupBundle, ids: Tensor) -> Tensor:
        """``ids`` after the policies for unseen ones."""
        return self._unseen(ids.long()) if self._unseen.replaces or self._unseen.counting else ids

    def _outputs(
        self,
        bundle: LookupBundle,
        ids: Tensor,
        tables: list[Tensor],
        step: NativeStep | None,
        sparse: bool,
        mask: Stage | None,
    ) -> Sequence[Tensor]:
        if torch.compiler.is_compiling():
            return native_ops.look_up(self.lookup, ids, tables, step)
        try:
            return look_up(self.lookup, self._pool, Ids.matrix(ids), tables, step=step, sparse=sparse, mask=mask)
        except IdRangeError:
            self._unseen.check(ids.long())
            raise


class TritonBundle(FusedBundle):
    """On GPUs."""

    def _build(self, names: Sequence[str], *arguments: Any) -> None:
        self._look_up = DeferredLookup(names, *arguments)

    def masks(self, bundle: LookupBundle) -> bool:
        return False

    def pools(self, bundle: LookupBundle, bags: Bags) -> bool:
        return False

    def _resolved(self, bundle: LookupBundle, ids: Tensor) -> Tensor:
        # The kernels check ranges themselves: the assertion that torch has for GPUs would end the process.
        if not (self._unseen.replaces or self._unseen.counting):
            return ids
        return self._unseen.resolve(ids.long(), count=self._unseen.counting, check=False)

    def _outputs(
        self,
        bundle: LookupBundle,
        ids: Tensor,
        tables: list[Tensor],
        step: NativeStep | None,
        sparse: bool,
        mask: Stage | None,
    ) -> tuple[Tensor, ...]:
        return self._look_up(ids, tables, step=step, sparse=sparse)


BUNDLES: Mapping[str, type[FusedBundle]] = {"native": FusedBundle, "triton": TritonBundle}
