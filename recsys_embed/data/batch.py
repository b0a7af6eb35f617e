"""Batches of named tensors from rows in memory, prepared and moved to the device by a background thread."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from recsys_embed.data.list_ids import ListIds
from recsys_embed.data.random_bits import stream_key
from recsys_embed.errors import raise_faults
from recsys_embed.utils.types import BagIds

PREFETCH = 4
"""Batches made ahead of the consumer."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One batch of B rows.

    Args:
        dense: numeric columns, float32 ``[B, num_dense]``.
        ids: one id per feature, int64 ``[B, F]``; of the features that have one id per row, which come first.
        label: float32 ``[B]``, NaN where there are no labels.
        extra: further parts by name, ``[B, ...]`` each, such as weights or times.
        lists: ids of list and sequence features, which come last; None where there are none.
        vector_places: of each vector by name, its first column in ``dense`` and its width; see :attr:`vectors`.

    Raises:
        ConfigError: a part that is no tensor.

    Whatever is done to a batch is done to all its parts. It unpacks as ``dense, ids, label``.

    >>> batch = Batch(torch.zeros(2, 3), torch.tensor([[4], [7]]), torch.ones(2), {"weight": torch.tensor([1.0, 0.5])})
    >>> batch.map(lambda part: part[1:]).parts()["weight"], batch.num_rows
    (tensor([0.5000]), 2)
    """

    dense: Tensor
    ids: Tensor
    label: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    lists: ListIds | None = None
    vector_places: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.dense, Tensor) and isinstance(self.ids, Tensor) and isinstance(self.label, Tensor)):
            raise_faults(
                [
                    f"`{name}` must be a torch.Tensor; got {type(part).__name__}: torch.as_tensor makes one of an array"
                    for name, part in (("dense", self.dense), ("ids", self.ids), ("label", self.label))
                    if not isinstance(part, Tensor)
                ],
                "Batch",
            )
        if self.lists is not None and len(self.lists) != len(self.label):
            raise_faults([f"`lists` must have {len(self.label)} rows, as `label` has; got {len(self.lists)}"], "Batch")

    @classmethod
    def empty(cls, num_dense: int, num_features: int, num_lists: int = 0) -> Batch:
        """No rows, of features with one id and of ``num_lists`` with lists."""
        none = torch.zeros(0, dtype=torch.int64)
        lists = ListIds(none, torch.zeros(1, dtype=torch.int64), num_lists) if num_lists else None
        return cls(torch.zeros(0, num_dense), none.view(0, num_features), torch.zeros(0), lists=lists)

    @classmethod
    def cat(cls, batches: Sequence[Batch]) -> Batch:
        """The rows of several batches that have the same parts."""
        first = batches[0]
        for batch in batches:
            if batch.extra.keys() != first.extra.keys():
                raise_faults(
                    [f"batches must have the same further parts; got {[*first.extra]} and {[*batch.extra]}"],
                    "Batch.cat",
                )
            if (batch.lists is None) != (first.lists is None):
                raise_faults(["some batches have `lists` and others none"], "Batch.cat")
        return cls(
            torch.cat([b.dense for b in batches]),
            torch.cat([b.ids for b in batches]),
            torch.cat([b.label for b in batches]),
            {name: torch.cat([b.extra[name] for b in batches]) for name in first.extra},
            None if first.lists is None else ListIds.cat([b.lists for b in batches if b.lists is not None]),
            first.vector_places,
        )

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.label)

    @property
    def inputs(self) -> Tensor | BagIds:
        """The ids as models take them: ``ids``, or bags of all features in the schema's order where there are lists."""
        if self.lists is None:
            return self.ids
        values, offsets = self.lists.by_feature()
        single = self.ids.numel()
        if not single:
            return BagIds(values.long(), offsets)
        places = torch.arange(single, device=offsets.device)
        return BagIds(torch.cat([self.ids.T.reshape(-1), values.long()]), torch.cat([places, offsets + single]))

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Vectors computed before, such as content embeddings, by name: float32 ``[B, width]``, views of ``dense``.

        >>> none = torch.zeros(2, 0, dtype=torch.int64)
        >>> batch = Batch(torch.arange(6.0).view(2, 3), none, torch.zeros(2), vector_places={"title": (1, 2)})
        >>> batch.vectors["title"]
        tensor([[1., 2.],
                [4., 5.]])
        """
        return {name: self.dense[:, first : first + width] for name, (first, width) in self.vector_places.items()}

    def feature(self, number: int) -> Tensor:
        """All ids ``[n]`` of a feature, by its position in the schema."""
        if self.lists is None or number < self.ids.shape[1]:
            return self.ids[:, number]
        return self.lists.feature(number - self.ids.shape[1])[0]

    def parts(self) -> dict[str, Tensor]:
        """Every part that is a tensor, by name."""
        return {"dense": self.dense, "ids": self.ids, "label": self.label, **self.extra}

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every part changed: tensors, and :class:`ListIds`, which have a tensor's methods for rows."""
        extra = {name: change(part) for name, part in self.extra.items()}
        lists = None if self.lists is None else cast("Callable[[ListIds], ListIds]", change)(self.lists)
        return Batch(change(self.dense), change(self.ids), change(self.label), extra, lists, self.vector_places)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self.map(lambda part: part.to(device, non_blocking=non_blocking))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.dense, self.ids, self.label))

    def __getitem__(self, position: int) -> Tensor:
        warnings.warn(
            "parts of a batch by position go away; use batch.dense, batch.ids and batch.label",
            DeprecationWarning,
            stacklevel=2,
        )
        return (self.dense, self.ids, self.label)[position]


def as_batch(parts: Any) -> Batch:
    """The batch of a data set of one's own, which may be any object with ``dense``, ``ids`` and ``label``."""
    return parts if isinstance(parts, Batch) else Batch(parts.dense, parts.ids, parts.label)


class Batches:
    """Iterable over the batches of one epoch; ``len()`` is the number of batches it yields.

    Iterating twice gives the same batches twice. A consumer that stops early stops the background thread as well.
    """

    def __init__(self, make: Callable[[], Iterator[Batch]], count: int, device: torch.device | str | None) -> None:
        self._make = make
        self._count = count
        self._device = None if device is None else torch.device(device)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        return prefetch(self._make(), self._device)


def prefetch(batches: Iterator[Batch], device: torch.device | None = None, depth: int = PREFETCH) -> Iterator[Batch]:
    """Prefetch ``depth`` batches in a thread; on CUDA, copy asynchronously from pinned memory."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()
    cuda = device is not None and device.type == "cuda"

    def offer(item: Batch | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not offer(batch.map(lambda part: part.pin_memory()) if cuda else batch):
                    return
            offer(None)
        except BaseException as e:
            offer(e)

    thread = threading.Thread(target=work, name="recsys-embed-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item if device is None else item.to(device, non_blocking=cuda)
    finally:
        stop.set()
        thread.join()


def num_batches(rows: int, batch_size: int, drop_last: bool, start_batch: int = 0) -> int:
    """Batches left from ``start_batch`` on."""
    whole = rows // batch_size if drop_last else -(-rows // batch_size)
    return max(0, whole - start_batch)


def check_batching(batch_size: int, epoch: int, start_batch: int) -> None:
    """Refuse sizes out of range, all at once."""
    faults = [
        f"`{name}` must be an integer of at least {low}; got {value!r}"
        for name, value, low in (("batch_size", batch_size, 1), ("epoch", epoch, 0), ("start_batch", start_batch, 0))
        if not isinstance(value, int) or isinstance(value, bool) or value < low
    ]
    raise_faults(faults, "batches()")


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: int64 [count], a function of seed and epoch alone."""
    generator = torch.Generator().manual_seed(stream_key(seed, 0xBA7C, epoch) >> 1)
    return torch.randperm(count, generator=generator)


class InMemoryDataset:
    """Rows held as tensors, served in batches by row number: one split.

    Args:
        dense: float32 [N, num_dense].
        ids: int32 or int64 [N, F]; stored as given, int64 in every batch.
        label: [N], any real type; float32 in every batch.
        extra: further parts by name, [N, ...] each.
        lists: ids of list and sequence features.
        vector_places: of each vector by name, its first column in ``dense`` and its width.

    Raises:
        ConfigError: shapes or types disagree.

    >>> data = InMemoryDataset(torch.zeros(5, 2), torch.arange(10, dtype=torch.int32).view(5, 2), torch.ones(5))
    >>> [b.ids.shape[0] for b in data.batches(2, shuffle=False)]
    [2, 2, 1]
    """

    def __init__(
        self,
        dense: Tensor,
        ids: Tensor,
        label: Tensor,
        extra: Mapping[str, Tensor] | None = None,
        lists: ListIds | None = None,
        vector_places: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        extra = dict(extra or {})
        faults = []
        if dense.dim() != 2 or ids.dim() != 2 or label.dim() != 1:
            shapes = f"{tuple(dense.shape)}, {tuple(ids.shape)}, {tuple(label.shape)}"
            faults.append(f"dense, ids, label must have shapes [N, D], [N, F], [N]; got {shapes}")
        elif not len(dense) == len(ids) == len(label):
            faults.append(f"dense, ids, label must have equally many rows; got {len(dense)}, {len(ids)}, {len(label)}")
        else:
            wrong = {name: len(part) for name, part in extra.items() if len(part) != len(label)}
            faults += [f"part {name!r} must have {len(label)} rows; got {n}" for name, n in wrong.items()]
            if lists is not None and len(lists) != len(label):
                faults.append(f"`lists` must have {len(label)} rows; got {len(lists)}")
        if ids.dtype not in (torch.int32, torch.int64):
            faults.append(f"`ids` must be int32 or int64; got {ids.dtype}")
        if dense.dtype != torch.float32:
            faults.append(f"`dense` must be float32; got {dense.dtype}")
        raise_faults(faults, "InMemoryDataset")
        self.dense, self.ids, self.label = dense.contiguous(), ids.contiguous(), label.float()
        self._batch = Batch(self.dense, self.ids, self.label, extra, lists, dict(vector_places or {}))

    @classmethod
    def of(cls, batch: Batch) -> InMemoryDataset:
        """The rows of one batch, whose ids may be int32."""
        return cls(batch.dense, batch.ids, batch.label, batch.extra, batch.lists, batch.vector_places)

    def __len__(self) -> int:
        return len(self.label)

    def run(self, start: int, stop: int) -> InMemoryDataset:
        """Rows ``start`` to ``stop``, not copied."""
        return InMemoryDataset.of(self._batch.map(lambda part: part[start:stop]))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        start_batch: int = 0,
    ) -> Batches:
        """Batches of one epoch, the same for the same seed and epoch; see :meth:`RowSource.batches`."""
        check_batching(batch_size, epoch, start_batch)
        count = num_batches(len(self), batch_size, drop_last, start_batch)

        def make() -> Iterator[Batch]:
            order = permutation(len(self), seed, epoch) if shuffle else None
            for b in range(start_batch, start_batch + count):
                lo, hi = b * batch_size, min((b + 1) * batch_size, len(self))
                yield self.rows(slice(lo, hi) if order is None else order[lo:hi])

        return Batches(make, count, device)

    def rows(self, which: Tensor | slice) -> Batch:
        """A batch of the given rows, a copy: int64 row numbers or a slice."""
        extra, lists, vectors = self._batch.extra, self._batch.lists, self._batch.vector_places
        if isinstance(which, slice):
            # Each part is copied once: ids that are narrow by being widened.
            ids = self.ids[which].to(torch.int64, copy=True)
            rest = {name: part[which].clone() for name, part in extra.items()} if extra else {}
            some = None if lists is None else lists[which].clone().long()
            return Batch(self.dense[which].clone(), ids, self.label[which].clone(), rest, some, vectors)
        rest = {name: part.index_select(0, which) for name, part in extra.items()} if extra else {}
        ids = self.ids.index_select(0, which).long()
        some = None if lists is None else lists.index_select(0, which).long()
        return Batch(self.dense.index_select(0, which), ids, self.label.index_select(0, which), rest, some, vectors)
