"""A data folder as batches: from memory where it fits, else streamed from Parquet through a shuffle buffer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_embed.data.batch import Batch, Batches, InMemoryDataset, check_batching, num_batches, permutation
from recsys_embed.data.folder import file_hash
from recsys_embed.data.manifest import Manifest, Shard, read_manifest
from recsys_embed.data.stats import read_stats
from recsys_embed.data.vocab import Vocabulary
from recsys_embed.errors import ConfigError, DataError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, IdKind, Schema

IN_MEMORY_LIMIT = 4 << 30
BUFFER_ROWS = 1 << 20
CHUNK_ROWS = 1 << 16
"""Rows read from Parquet at once when streaming: one row group."""


def open_dataset(path: str | Path, *, memory_limit: int = IN_MEMORY_LIMIT, verify: bool = False) -> Dataset:
    """Open a data folder made by ``recsys-embed data``.

    Args:
        path: the folder.
        memory_limit: bytes; a split that needs less is loaded whole when first used, a larger one is streamed.
        verify: also compare every file's SHA-256 with the one on record (reads everything).

    Raises:
        DataError: no ``schema.json``, another version, or files missing, cut off or altered: all of them are named.
    """
    manifest = read_manifest(path)
    folder = Path(path)
    faults = []
    known = [(s.file, s.bytes, s.sha256) for split in manifest.splits.values() for s in split.shards]
    for file, size, digest in known:
        at = folder / file
        if not at.exists():
            faults.append(f"{file} is missing")
        elif at.stat().st_size != size:
            faults.append(f"{file} is damaged: expected {size} bytes; got {at.stat().st_size}")
        elif verify and file_hash(at) != digest:
            faults.append(f"{file} is damaged: its SHA-256 is not the one on record")
    for feature in manifest.features:
        if feature.vocab and not (folder / feature.vocab).exists():
            faults.append(f"{feature.vocab} is missing")
        elif feature.vocab and verify and file_hash(folder / feature.vocab) != feature.vocab_sha256:
            faults.append(f"{feature.vocab} is damaged: its SHA-256 is not the one on record")
    raise_faults(faults, f"data folder {path}: convert the data again", DataError)
    return Dataset(folder, manifest, memory_limit)


@dataclass
class Dataset:
    """A data folder; see :func:`open_dataset`. ``splits`` maps split names to row counts."""

    path: Path
    manifest: Manifest
    memory_limit: int = IN_MEMORY_LIMIT

    def __post_init__(self) -> None:
        self._loaded: dict[str, InMemoryDataset] = {}

    @property
    def splits(self) -> dict[str, int]:
        return {name: split.rows for name, split in self.manifest.splits.items()}

    @property
    def num_dense(self) -> int:
        return len(self.manifest.dense)

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.manifest.features)

    @property
    def truth(self) -> dict[str, Any] | None:
        """For synthetic data, what the planted model attains (``attainable`` holds AUC and logloss); else None."""
        return self.manifest.extra.get("truth")

    @property
    def digest(self) -> str:
        """Hash of the rows of all splits: equal digests hold the same rows in the same order."""
        rows = sorted((name, split.sha256) for name, split in self.manifest.splits.items())
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    @cached_property
    def stats(self) -> dict[str, Any]:
        """Content of ``stats.json``."""
        return read_stats(self.path)

    def schema(self, embedding_dim: int) -> Schema:
        """The categorical features in the order of the columns of ``ids``."""
        kind: IdKind = "raw" if self.manifest.id_mode == "raw" else "index"
        return Schema([FeatureSpec(f.name, f.num_embeddings, embedding_dim, ids=kind) for f in self.manifest.features])

    def vocabulary(self, name: str) -> Vocabulary:
        """The values of a feature and their ids (vocab mode)."""
        for feature in self.manifest.features:
            if feature.name == name:
                if feature.vocab is None:
                    raise ConfigError(f"{self.path} holds raw ids: there is no vocabulary of {name}")
                return Vocabulary.read(self.path / feature.vocab, name)
        raise unknown_name("feature", name, self.feature_names)

    def held_out(self, share: float) -> Dataset:
        """This data set, ``share`` of whose training rows, the last, are the split ``held_out`` and not ``train``.

        Raises:
            ConfigError: a share outside (0, 1).
        """
        from recsys_embed.data.held_out import HeldOut

        return HeldOut(self, share)

    def row_bytes(self) -> int:
        """Bytes a row takes in memory."""
        wide = 8 if self.manifest.id_mode == "raw" else 4
        return 4 * self.num_dense + wide * len(self.manifest.features) + 4

    def fits(self, split: str) -> bool:
        """Whether a split is held in memory."""
        return self.rows(split) * self.row_bytes() <= self.memory_limit

    def load(self, split: str) -> InMemoryDataset:
        """A whole split in memory, in file order; kept for later calls."""
        if split not in self._loaded:
            n = self.rows(split)
            wide = torch.int64 if self.manifest.id_mode == "raw" else torch.int32
            dense = torch.empty(n, self.num_dense)
            ids = torch.empty(n, len(self.manifest.features), dtype=wide)
            label = torch.empty(n)
            at = 0
            for chunk in self._chunks(split):
                piece = self._read(*chunk)
                stop = at + len(piece.label)
                dense[at:stop], ids[at:stop], label[at:stop] = piece
                at = stop
            self._loaded[split] = InMemoryDataset(dense, ids, label)
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
            windows = self._windows(split, shuffle, seed, epoch, buffer_rows)
            return _cut(self, windows, batch_size, start_batch, count, shuffle, seed, epoch)

        return Batches(make, count, device)

    def numeric_moments(self, split: str = "train") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[num_dense]`` of the numeric columns, summed in float64 in one bounded pass."""
        return moments_of(self.numeric_sums(split))

    def numeric_sums(self, split: str = "train") -> Tensor:
        """What :func:`moments_of` needs; sums of parts of a split add up: float64 ``[1 + 2 * num_dense]``."""
        sums = torch.zeros(1 + 2 * self.num_dense).double()
        for batch in self.batches(split, CHUNK_ROWS, shuffle=False):
            dense = batch.dense.double()
            sums += torch.cat([torch.tensor([len(dense)]), dense.sum(0), dense.square().sum(0)])
        return sums

    def rows(self, split: str) -> int:
        """Rows that :meth:`batches` gives."""
        rows: int = self._split(split).rows
        return rows

    def _chunks(self, split: str) -> list[tuple[Shard, int, int]]:
        """Shard, first row and rows of every row group of a split, in file order."""
        return [
            (shard, offset, min(CHUNK_ROWS, shard.rows - offset))
            for shard in self._split(split).shards
            for offset in range(0, shard.rows, CHUNK_ROWS)
        ]

    def _split(self, name: str) -> Any:
        if name not in self.manifest.splits:
            raise unknown_name("split", name, self.manifest.splits)
        return self.manifest.splits[name]

    def _windows(
        self, split: str, shuffle: bool, seed: int, epoch: int, buffer_rows: int
    ) -> list[list[tuple[Shard, int, int]]]:
        """Chunks (shard, first row, rows) grouped into windows that are shuffled together."""
        chunks = self._chunks(split)
        if shuffle:
            chunks = [chunks[i] for i in permutation(len(chunks), seed, epoch).tolist()]
        windows: list[list[tuple[Shard, int, int]]] = []
        size = 0
        for chunk in chunks:
            if not windows or size + chunk[2] > buffer_rows:
                windows.append([])
                size = 0
            windows[-1].append(chunk)
            size += chunk[2]
        return windows

    def _read(self, shard: Shard, offset: int, rows: int) -> Batch:
        """Rows of a shard with compact ids."""
        path = self.path / shard.file
        columns = ["label"] * self.manifest.labels + [*self.manifest.dense, *self.feature_names]
        try:
            frame = pl.scan_parquet(path).slice(offset, rows).select(columns).collect()
        except (OSError, pl.exceptions.PolarsError) as e:
            raise DataError(f"{path}: cannot be read ({e}); convert the data again") from e
        if len(frame) != rows:
            raise DataError(f"{path}: expected {rows} rows from row {offset}; got {len(frame)}; convert the data again")
        if self.manifest.id_mode == "raw":
            missing = {f.name: f.missing_id for f in self.manifest.features}
            ids = frame.select(pl.col(n).reinterpret(signed=True).fill_null(m) if frame[n].dtype == pl.UInt64
                               else pl.col(n).cast(pl.Int64).fill_null(m) for n, m in missing.items())  # fmt: skip
        else:
            ids = frame.select(self.feature_names)
        dense = frame.select(self.manifest.dense).to_numpy(order="c") if self.num_dense else np.zeros((rows, 0), "f4")
        label = frame["label"].to_numpy().astype(np.float32) if self.manifest.labels else np.full(rows, np.nan, "f4")
        arrays = (dense, ids.to_numpy(order="c"), label)
        return Batch(*(torch.from_numpy(np.require(a, requirements="W")) for a in arrays))


def moments_of(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation from rows, sums and sums of squares: float32 ``[columns]`` each."""
    rows, (total, squares) = sums[0].clamp_min(1), sums[1:].chunk(2)
    mean = total / rows
    return mean.float(), (squares / rows - mean.square()).clamp_min(0).sqrt().float()


def _cut(
    data: Dataset,
    windows: list[list[tuple[Shard, int, int]]],
    batch_size: int,
    start_batch: int,
    count: int,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> Iterator[Batch]:
    """Cut the stream of windows into batches; windows before the first batch wanted are not read."""
    skip = start_batch * batch_size
    left: Batch | None = None
    made = 0
    for number, window in enumerate(windows):
        rows = sum(chunk[2] for chunk in window)
        if skip >= rows:
            skip -= rows
            continue
        pieces = [data._read(*chunk) for chunk in window]
        held = InMemoryDataset(*(torch.cat(column) for column in zip(*pieces, strict=True)))
        del pieces
        order = permutation(rows, seed, epoch * len(windows) + number + (1 << 40)) if shuffle else torch.arange(rows)
        order = order[skip:]
        skip = 0
        at = 0
        while at < len(order):
            take = batch_size - (len(left.label) if left else 0)
            piece = held.rows(order[at : at + take])
            at += take
            left = Batch(*(torch.cat(pair) for pair in zip(left, piece, strict=True))) if left else piece
            if len(left.label) == batch_size:
                yield left
                made += 1
                left = None
    if left is not None and made < count:
        yield left
