"""One kernel call for all features of a bundle that the kernels support, with its outputs in schema order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from recsys_embed.collection.bags import Bags
from recsys_embed.collection.head_tables import HeadTables
from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import IdRangeError
from recsys_embed.features import Schema
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.native import ops
from recsys_embed.kernels.native.autograd import NativeStep, look_up
from recsys_embed.kernels.native.lookup import Ids, NativeLookup
from recsys_embed.kernels.native.masks import MaskParameters
from recsys_embed.kernels.native.output_pool import OutputPool
from recsys_embed.kernels.native.records import Slot
from recsys_embed.kernels.places import Place
from recsys_embed.kernels.triton.lazy_lookup import LazyLookup
from recsys_embed.kernels.unseen_ids import UnseenIds


@dataclass(frozen=True)
class BatchedFeatures:
    """The features that one call runs, and what it needs from the bundle.

    Args:
        schema: all features of the bundle.
        numbers: of the features that are run, among the programs of ``index``.
        positions: in the schema, of each.
        columns: of the matrix of ids, of each.
        programs, places: of each; the kernels know the programs.
        index: of all programs of the bundle.
        storages: shape of each storage by name.
        unseen: the policies of all features.
        heads: of all features.
        vectors: per feature of the schema, how many it has.
        output_dim: width of every vector of the bundle, None where features differ.
    """

    schema: Schema
    numbers: Sequence[int]
    positions: Sequence[int]
    columns: Sequence[int]
    programs: Sequence[LookupProgram]
    places: Sequence[Mapping[str, Place]]
    index: IndexStore
    storages: Mapping[str, tuple[int, int]]
    unseen: UnseenIds
    heads: HeadTables
    vectors: Sequence[int]
    output_dim: int | None

    @property
    def names(self) -> list[str]:
        return [self.schema.names[i] for i in self.positions]

    def outputs(self) -> list[tuple[int, ...]]:
        """Positions of the features that share an output.

        Features without a head share one. Features whose heads have one form, and are applied to columns of one width,
        share another, since one call of the head runs them all.
        """
        found: dict[Hashable, list[int]] = {None: []}
        for i, program in zip(self.positions, self.programs, strict=True):
            found.setdefault(self._form(i, program), []).append(i)
        return [tuple(members) for members in found.values() if members]

    def _form(self, position: int, program: LookupProgram) -> Hashable:
        head = program.head
        if head is None:
            return None
        optional = not head.keeps_zero and self.unseen.zeros[position]
        return (program.head_form, program.combined_width, optional, None if head.stacks else position)


class _SomeIndexes:
    """A view of an index store that holds some of its programs, renumbered from 0."""

    def __init__(self, store: IndexStore, numbers: Sequence[int]) -> None:
        self._store, self._numbers = store, tuple(numbers)
        self.indexes = [store.indexes[n] for n in numbers]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._store, name)

    def at(self, program: int, name: str | None) -> int:
        return self._store.at(self._numbers[program], name)

    def slot(self, program: int, name: str | None) -> int:
        return self._store.slot(self._numbers[program], name)

    def places(self, program: int) -> Mapping[str, int]:
        return self._store.places(self._numbers[program])


class _Arguments(NamedTuple):
    """What batched lookups are made of, see :class:`NativeLookup`."""

    programs: list[LookupProgram]
    places: list[Mapping[str, Place]]
    index: IndexStore
    storages: Mapping[str, tuple[int, int]]
    slots: list[Slot]
    widths: list[int]
    columns: list[int]
    limits: list[int]
    optional: list[bool]


class BatchedLookup:
    """One call of the native kernels on the CPU.

    Args:
        features: what is run.
        rest: parts of the bundle that torch runs.
        name: of its constants among those of the bundle.

    Attributes:
        parts: positions of the features of each output.
        order: name of the constant that says where outputs, and then the rest, stand in the whole output.
        ordered: they stand there already.
        mixed: torch reads tables in the same forward, or another call the same rows, so that gradients are collected
            into one step.
        reads_generated: it reads the rows of features whose vectors are computed, of distinct ids; else torch does.
    """

    mixed = False
    reads_generated = True

    def __init__(self, features: BatchedFeatures, rest: Sequence[int], name: str) -> None:
        self.rest, self.order, self.ordered = list(rest), f"order_{name}", False
        self._unseen, self._heads = features.unseen, features.heads
        # The one feature that is run, if ids are its own alone.
        self._only = features.positions[0] if list(features.columns) == [0] and not rest else None
        self.parts = features.outputs()
        self._keys = [f"{name}{output}" for output in range(len(self.parts))]
        self._headed = [self._heads.add(k, p) for k, p in zip(self._keys, self.parts, strict=True)]
        self._any_headed = any(self._headed)
        column_of = dict(zip(features.positions, features.columns, strict=True))
        self._columns = [[column_of[i] for i in members] for members in self.parts]
        programs = dict(zip(features.positions, features.programs, strict=True))
        slots: dict[int, Slot] = {}
        widths = []
        for output, members in enumerate(self.parts):
            column = 0
            for i in members:
                slots[i] = Slot(output, column, features.schema.features[i].pooling == "mean")
                column += programs[i].combined_width
            widths.append(column)
        # Outputs without a head take the shape of the whole output, so that no copy follows.
        dim = features.output_dim
        self._shapes = [
            (width,) if dim is None or headed else (width // dim, dim)
            for headed, width in zip(self._headed, widths, strict=True)
        ]
        # A mask runs inside the call if it writes every vector in its final place, and no policy replaces ids.
        whole = self.parts == [tuple(range(len(features.schema)))] and not any(self._headed) and dim is not None
        self.masks = self._takes_masks and whole and set(features.vectors) == {1} and not self._unseen.replaces
        limits = cast("list[int]", self._unseen.integers_of("limits"))
        some = len(features.numbers) < len(features.index.indexes)
        arguments = _Arguments(
            list(features.programs),
            list(features.places),
            cast("IndexStore", _SomeIndexes(features.index, features.numbers)) if some else features.index,
            features.storages,
            [slots[i] for i in features.positions],
            widths,
            list(features.columns),
            [limits[i] for i in features.positions],
            [self._unseen.zeros[i] for i in features.positions],
        )
        if self.parts:
            self._build(features.names, arguments)

    _takes_masks = True
    _runs_heads = True

    def _build(self, names: Sequence[str], arguments: _Arguments) -> None:
        # Ids of features with padding have been checked when padding has become -1.
        limits = [-1 if none else n for none, n in zip(arguments.optional, arguments.limits, strict=True)]
        self.lookup = NativeLookup(*arguments._replace(limits=limits), self._shapes)
        self._pool = OutputPool()

    def single(
        self,
        ids: Tensor,
        tables: list[Tensor],
        step: NativeStep | None,
        sparse: bool,
        mask: MaskParameters | None = None,
        resolved: bool = False,
    ) -> list[Tensor]:
        """Vectors of ``ids [B, F]``: one tensor ``[B, columns]``, or as the whole output is, per entry of ``parts``.

        Args:
            mask: of all vectors, where it ``masks``.
            resolved: the policies for unseen ids have seen to ``ids``.

        Raises:
            IdRangeError: names the first feature at fault.
        """
        if not self.parts:
            return []
        ids = ids if resolved else self._resolved(ids)
        return self._apply_heads(self._outputs(ids, tables, step, sparse, mask), ids)

    def pools(self, bags: Bags) -> bool:
        """Whether :meth:`pooled` takes the bags: their weights are constants."""
        return bags.weights is None or (bags.weights.dtype == torch.float32 and not bags.weights.requires_grad)

    def pooled(
        self,
        bags: Bags,
        tables: list[Tensor],
        step: NativeStep | None,
        sparse: bool,
        check: Callable[[], object] = lambda: None,
    ) -> list[Tensor]:
        """Pooled vectors of resolved bags of all features, as :meth:`single` has those of ids.

        Args:
            check: called where an id is out of range, to name the feature.
        """
        if not self.parts:
            return []
        weights = None if bags.weights is None else bags.weights.contiguous()
        ids = Ids(bags.values.contiguous(), bags.offsets.contiguous(), weights, bags.batch)
        if torch.compiler.is_compiling():
            return self._apply_heads(ops.look_up(self.lookup, ids, tables, step), None)
        try:
            outputs = look_up(self.lookup, self._pool, ids, tables, step=step, sparse=sparse)
        except IdRangeError:
            check()
            raise
        return self._apply_heads(outputs, None)

    def _apply_heads(self, outputs: Sequence[Tensor], ids: Tensor | None) -> list[Tensor]:
        out = list(outputs)
        if not self._any_headed:
            return out
        for output, headed in enumerate(self._headed):
            if not headed:
                continue
            members, key, value = self.parts[output], self._keys[output], outputs[output]
            columns = value.view(value.shape[0], len(members), value.shape[1] // len(members))
            mine = ids[:, self._columns[output]].long() if ids is not None and self._heads.needs_ids(key) else None
            out[output] = self._heads.vectors(key, columns, mine, natively=self._runs_heads).flatten(1)
        return out

    def _resolved(self, ids: Tensor) -> Tensor:
        """``ids`` after the policies for unseen ones."""
        return self._unseen(ids.long(), self._only) if self._unseen.replaces or self._unseen.counting else ids

    def _outputs(
        self, ids: Tensor, tables: list[Tensor], step: NativeStep | None, sparse: bool, mask: MaskParameters | None
    ) -> Sequence[Tensor]:
        if torch.compiler.is_compiling():
            return ops.look_up(self.lookup, Ids.matrix(ids), tables, step)
        try:
            return look_up(self.lookup, self._pool, Ids.matrix(ids), tables, step=step, sparse=sparse, mask=mask)
        except IdRangeError:
            self._unseen.check(ids.long(), self._only)
            raise


class TritonBatchedLookup(BatchedLookup):
    """One call of the Triton kernels on a GPU.

    Rows of generators are so wide, thousands of columns, that kernels of them take minutes to compile. Torch's gathers
    read them as fast.
    """

    reads_generated = False
    _takes_masks = False
    _runs_heads = False

    def _build(self, names: Sequence[str], arguments: _Arguments) -> None:
        self._look_up = LazyLookup(names, *arguments)

    def pools(self, bags: Bags) -> bool:
        return False

    def _resolved(self, ids: Tensor) -> Tensor:
        # The kernels check ranges themselves: the assertion that torch has for GPUs would end the process.
        if not (self._unseen.replaces or self._unseen.counting):
            return ids
        return self._unseen.resolve(ids.long(), self._only, count=self._unseen.counting, check=False)

    def _outputs(
        self, ids: Tensor, tables: list[Tensor], step: NativeStep | None, sparse: bool, mask: MaskParameters | None
    ) -> tuple[Tensor, ...]:
        return self._look_up(ids, tables, step=step, sparse=sparse)


BATCHED_LOOKUPS: Mapping[str, type[BatchedLookup]] = {"native": BatchedLookup, "triton": TritonBatchedLookup}
