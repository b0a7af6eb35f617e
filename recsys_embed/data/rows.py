"""Data sets of numbered rows: batches from memory or streamed, and views of consecutive rows."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from recsys_embed.data.batch import Batch, Batches, InMemoryDataset, check_batching, num_batches
from recsys_embed.data.checks import shape_faults, split_faults, value_faults
from recsys_embed.data.data_source import HELD_OUT
from recsys_embed.data.list_ids import ListIds
from recsys_embed.data.stream import moments_of, stream, windows
from recsys_embed.errors import ConfigError, DataError, raise_faults, unknown_name
from recsys_embed.features import Schema
from recsys_embed.utils.types import JSONMapping

IN_MEMORY_LIMIT = 4 << 30
BUFFER_ROWS = 1 << 20
CHUNK_ROWS = 1 << 16
"""Rows read at once when streaming."""
TOLERANCE = 0.01
"""A portion's size may differ from an equal share by this fraction, so that it can end at a chunk's end."""


class RowSource(ABC):
    """A :class:`~recsys_embed.data.DataSource` whose rows are read by number; it derives the other members from them.

    A subclass says ``splits``, ``num_dense``, ``digest``, ``schema`` and ``read``.

    Attributes:
        memory_limit: bytes; a split that needs less is loaded whole when first used, a larger one is streamed.

    >>> from recsys_embed.features import FeatureSpec
    >>> class Parity(RowSource):
    ...     splits, num_dense, digest = {"train": 6, "test": 2}, 0, "parity"
    ...
    ...     def schema(self, embedding_dim: int) -> Schema:
    ...         return Schema([FeatureSpec("last_digit", 10, embedding_dim)])
    ...
    ...     def read(self, split: str, start: int, stop: int) -> Batch:
    ...         numbers = torch.arange(start, stop)
    ...         return Batch(torch.zeros(len(numbers), 0), (numbers % 10).unsqueeze(1), (numbers % 2).float())
    >>> data = Parity()
    >>> [b.label.tolist() for b in data.held_out(0.5).batches("held_out", 2, shuffle=False)], data.counts("last_digit")
    ([[1.0, 0.0], [1.0]], tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0]))
    """

    memory_limit: int = IN_MEMORY_LIMIT

    # -- what a subclass says -------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def splits(self) -> Mapping[str, int]:
        """Rows of every split."""

    @property
    @abstractmethod
    def num_dense(self) -> int:
        """Numeric columns."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hash of the rows of all splits: equal digests hold the same rows in the same order."""

    @abstractmethod
    def schema(self, embedding_dim: int) -> Schema:
        """The categorical features in the order of the columns of ``ids``."""

    @abstractmethod
    def read(self, split: str, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` of a split in file order; its ids may be int32."""

    # -- what it may say ------------------------------------------------------------------------------------------

    @property
    def num_lists(self) -> int:
        """How many of the features, the schema's last ones, have any number of ids per row: ``Batch.lists``."""
        return 0

    @property
    def stats(self) -> JSONMapping | None:
        """Statistics of the features, in the form of a data folder's ``stats.json``."""
        return None

    def unknown_ids(self, feature: str) -> tuple[int, ...]:
        """Ids of a feature that stand for values which are missing, or too rare or new for an id of their own."""
        return ()

    def chunks(self, split: str) -> list[tuple[int, int]]:
        """Ranges of rows ``(first, stop)`` that are read most efficiently in one call, in file order."""
        total = self.rows(split)
        return [(at, min(at + CHUNK_ROWS, total)) for at in range(0, total, CHUNK_ROWS)]

    def row_bytes(self) -> int:
        """Bytes a row takes in memory."""
        features = self.schema(1).features
        return 4 * self.num_dense + (8 if any(f.ids == "raw" for f in features) else 4) * len(features) + 4

    def counts(self, feature: str) -> Tensor | None:
        """How often each id of a feature occurs in training: int64 ``[num_embeddings]``; None for raw ids.

        Raises:
            UnknownNameError: no such feature.
        """
        if feature not in self.feature_names:
            raise unknown_name("feature", feature, self.feature_names)
        return self._counted.get(feature)

    @cached_property
    def _counted(self) -> dict[str, Tensor]:
        """Counts of all features, by one pass over the training rows."""
        specs = list(enumerate(self.schema(1)))
        found = {f.name: torch.zeros(f.num_embeddings, dtype=torch.int64) for _, f in specs if f.ids != "raw"}
        for batch in self.batches("train", CHUNK_ROWS, shuffle=False) if "train" in self.splits and found else ():
            for column, spec in specs:
                if spec.name in found:
                    found[spec.name] += torch.bincount(batch.feature(column), minlength=spec.num_embeddings)
        return found

    # -- what follows ---------------------------------------------------------------------------------------------

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the categorical features."""
        return tuple(self.schema(1).names)

    def rows(self, split: str) -> int:
        """Rows that :meth:`batches` gives.

        Raises:
            UnknownNameError: no such split.
        """
        if split not in self.splits:
            raise unknown_name("split", split, self.splits)
        return self.splits[split]

    def fits(self, split: str) -> bool:
        """Whether a split is held in memory."""
        return self.rows(split) * self.row_bytes() <= self.memory_limit

    @cached_property
    def _num_single(self) -> int:
        return len(self.feature_names) - self.num_lists

    def _read_checked(self, split: str, start: int, stop: int) -> Batch:
        """What :meth:`read` gives, refused where its parts are not those of this data set."""
        batch = self.read(split, start, stop)
        faults = shape_faults(batch, self.num_dense, self._num_single, stop - start, self.num_lists)
        if faults:
            raise_faults(faults, f"{self._name}.read({split!r}, {start}, {stop})")
        return batch

    @property
    def _name(self) -> str:
        return type(self).__name__

    def check_values(self, *, real_labels: bool = False, needs_labels: bool = True) -> None:
        """Refuse rows that cannot be trained on; a run calls it before its first step.

        Looks at every row of the splits that are held in memory, and at the first chunk of those that are streamed;
        once for each split.

        Args:
            real_labels: labels are any finite numbers, rather than 0 and 1.
            needs_labels: rows must have labels; else all or none of a split have.

        Raises:
            ConfigError: parts that :meth:`read` returns have other shapes or types than this data set says.
            DataError: labels other than 0 and 1, or numeric values that are NaN or infinite; names split and row.
        """
        faults = []
        for split in ("train", "valid", "test", HELD_OUT):
            key = (split, real_labels, needs_labels)
            if split in self.splits and key not in self._values_checked and self.rows(split):
                found = self._value_faults(split, real_labels, needs_labels)
                faults += [f"split {split!r}: {fault}" for fault in found]
                if not found:
                    self._values_checked.add(key)
        raise_faults(faults, f"data set {self._name}", DataError)

    def _value_faults(self, split: str, real_labels: bool, needs_labels: bool) -> list[str]:
        kind = {"real_labels": real_labels, "needs_labels": needs_labels}
        if self.fits(split):
            rows = self.load(split)
            return split_faults(rows.dense, rows.label, **kind)
        batch = self._read_checked(split, *self.chunks(split)[0])
        return value_faults(batch.dense, batch.label.float(), **kind)

    @cached_property
    def _values_checked(self) -> set[tuple[str, bool, bool]]:
        return set()

    @cached_property
    def _loaded(self) -> dict[str, InMemoryDataset]:
        return {}

    def load(self, split: str) -> InMemoryDataset:
        """A whole split in memory, in file order; kept for later calls."""
        if split not in self._loaded:
            # Filled chunk by chunk, so that no second copy of the rows is ever held.
            total, whole, lists = self.rows(split), None, []
            for start, stop in self.chunks(split):
                piece = self._read_checked(split, start, stop)
                if piece.lists is not None:
                    lists.append(piece.lists)
                    piece = replace(piece, lists=None)
                if whole is None:
                    whole = piece.map(lambda part: part.new_empty(total, *part.shape[1:]))
                parts = whole.parts()
                for name, part in piece.parts().items():
                    parts[name][start:stop] = part
            rows = Batch.empty(self.num_dense, self._num_single, self.num_lists) if whole is None else whole
            self._loaded[split] = InMemoryDataset.of(replace(rows, lists=ListIds.cat(lists)) if lists else rows)
        return self._loaded[split]

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        start_batch: int = 0,
        buffer_rows: int = BUFFER_ROWS,
    ) -> Batches:
        """Batches of one epoch, made by a background thread.

        Args:
            split: ``train``, ``valid`` or ``test``.
            batch_size: rows per batch; the last one may be smaller unless ``drop_last``.
            shuffle: a new order for every ``(seed, epoch)``; the same pair gives the same batches.
            device: where batches go; None leaves them on the CPU.
            start_batch: first batch to yield, to resume an interrupted epoch exactly.
            buffer_rows: rows shuffled together when the split is streamed because it exceeds the memory limit.

        Returns:
            An iterable of :class:`Batch` with ``len()``.
        """
        rows = self.rows(split)
        if self.fits(split):
            return self.load(split).batches(
                batch_size, shuffle=shuffle, seed=seed, epoch=epoch, drop_last=drop_last, device=device,
                start_batch=start_batch,
            )  # fmt: skip
        check_batching(batch_size, epoch, start_batch)
        count = num_batches(rows, batch_size, drop_last, start_batch)

        def make() -> Iterator[Batch]:
            order = (seed, epoch) if shuffle else None
            parts = windows(self.chunks(split), buffer_rows, order)
            return stream(partial(self._read_checked, split), parts, batch_size, start_batch, count, order)

        return Batches(make, count, device)

    def numeric_moments(self, split: str = "train") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[num_dense]`` of the numeric columns, summed in float64 in one bounded pass."""
        return moments_of(self.numeric_sums(split))

    def numeric_sums(self, split: str = "train") -> Tensor:
        """Sums for :func:`moments_of`, additive over portions of a split: float64 ``[1 + 2 * num_dense]``."""
        sums = torch.zeros(1 + 2 * self.num_dense).double()
        for batch in self.batches(split, CHUNK_ROWS, shuffle=False):
            dense = batch.dense.double()
            sums += torch.cat([torch.tensor([len(dense)]), dense.sum(0), dense.square().sum(0)])
        return sums

    # -- views ----------------------------------------------------------------------------------------------------

    def held_out(self, share: float) -> Rows:
        """This data set with the last ``share`` of its training rows as the split ``held_out``, removed from ``train``.

        Raises:
            ConfigError: a share outside (0, 1), or rows held out of what holds some out already.
        """
        if not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ConfigError(f"`share` must lie between 0 and 1; got {share!r}")
        if HELD_OUT in self.splits:
            raise ConfigError(f"rows are held out once; this data set has a split {HELD_OUT!r} already")
        total = self.rows("train")
        cut = total - round(share * total)
        runs = {split: (split, 0, rows) for split, rows in self.splits.items()}
        return Rows(self, {**runs, "train": ("train", 0, cut), HELD_OUT: ("train", cut, total)})

    def portion(self, rank: int, world: int) -> Rows:
        """The rows of one of ``world`` processes: every row of every split is in exactly one portion.

        A portion is a run of consecutive rows. It ends with a chunk where that is fair, so that no chunk is read by two
        processes but where a split has too few of them.

        Raises:
            ConfigError: no such portion.
        """
        if not 0 <= rank < world:
            raise ConfigError(f"`rank` must be in [0, {world}); got {rank}")
        ends = {split: portion_ends(self, split, world) for split in self.splits}
        return Rows(self, {split: (split, at[rank], at[rank + 1]) for split, at in ends.items()})


def portion_ends(data: RowSource, split: str, world: int) -> list[int]:
    """Boundaries of the portions, as row numbers ``[world + 1]``; the same in every process."""
    total = data.rows(split)
    chunks = [0, *accumulate(stop - start for start, stop in data.chunks(split))]
    slack = TOLERANCE * total / world
    ends = []
    for r in range(world + 1):
        fair = total * r // world
        place = bisect(chunks, fair)
        near = min(chunks[max(place - 1, 0) : place + 1], key=lambda end: abs(end - fair))
        ends.append(near if abs(near - fair) <= slack else fair)
    return ends


class Rows(RowSource):
    """A view of another data set whose splits are ranges of its rows; views of views are possible.

    What describes features (``schema``, ``stats``, ``counts``, vocabularies) is that of the whole.

    Args:
        whole: the data set.
        runs: by name of a split, the split of the whole it is part of, its first row there, and the one after its last.

    Raises:
        ConfigError: a run of rows that are not there.
    """

    def __init__(self, whole: RowSource, runs: Mapping[str, tuple[str, int, int]]) -> None:
        for split, (source, start, stop) in runs.items():
            if not 0 <= start <= stop <= whole.rows(source):
                there = whole.rows(source)
                raise ConfigError(
                    f"split {split!r} must be rows of {source!r}, which has {there}; got {start} to {stop}"
                )
        self.whole, self.runs, self.memory_limit = whole, dict(runs), whole.memory_limit

    def __getattr__(self, name: str) -> Any:
        # The folder, its manifest and its vocabularies.
        if name.startswith("_") or "whole" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.whole, name)

    @property
    def splits(self) -> Mapping[str, int]:
        return {split: stop - start for split, (_, start, stop) in self.runs.items()}

    @property
    def num_dense(self) -> int:
        return self.whole.num_dense

    @property
    def num_lists(self) -> int:
        return self.whole.num_lists

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.whole.digest} {sorted(self.runs.items())}".encode()).hexdigest()

    @property
    def stats(self) -> JSONMapping | None:
        return self.whole.stats

    def schema(self, embedding_dim: int) -> Schema:
        return self.whole.schema(embedding_dim)

    def counts(self, feature: str) -> Tensor | None:
        return self.whole.counts(feature)

    def unknown_ids(self, feature: str) -> tuple[int, ...]:
        return self.whole.unknown_ids(feature)

    def row_bytes(self) -> int:
        return self.whole.row_bytes()

    def chunks(self, split: str) -> list[tuple[int, int]]:
        source, low, high = self._run(split)
        cut = [(max(start, low) - low, min(stop, high) - low) for start, stop in self.whole.chunks(source)]
        return [(start, stop) for start, stop in cut if start < stop]

    def read(self, split: str, start: int, stop: int) -> Batch:
        source, low, _ = self._run(split)
        return self.whole.read(source, low + start, low + stop)

    def _read_checked(self, split: str, start: int, stop: int) -> Batch:
        source, low, _ = self._run(split)
        return self.whole._read_checked(source, low + start, low + stop)

    @property
    def _name(self) -> str:
        return self.whole._name

    def load(self, split: str) -> InMemoryDataset:
        """A full split in memory; shared with the underlying data set if that holds it or the view covers all of it."""
        source, start, stop = self._run(split)
        used = sum(last - first for name, first, last in self.runs.values() if name == source)
        shared = source in self.whole._loaded or (used >= self.whole.rows(source) and self.whole.fits(source))
        if shared and split not in self._loaded:
            self._loaded[split] = self.whole.load(source).run(start, stop)
        return super().load(split)

    def _run(self, split: str) -> tuple[str, int, int]:
        if split not in self.runs:
            raise unknown_name("split", split, self.runs)
        return self.runs[split]
