"""A data folder as a data set: its rows are read from Parquet, its counts from its vocabularies."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_embed.data.batch import Batch
from recsys_embed.data.folder import file_hash
from recsys_embed.data.frame_inputs import as_tensor, dense_sources, frame_inputs
from recsys_embed.data.manifest import Feature, Manifest, Shard, Split, read_manifest
from recsys_embed.data.polars_errors import POLARS_ERRORS
from recsys_embed.data.rows import IN_MEMORY_LIMIT, RowSource
from recsys_embed.data.stats import read_stats
from recsys_embed.data.vocab import OOV_ID, Vocabulary
from recsys_embed.errors import ConfigError, DataError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, IdKind, Pooling, Schema
from recsys_embed.utils.types import JSON

if TYPE_CHECKING:
    from recsys_embed.data.columns import Encoder
    from recsys_embed.data.columns.vocabulary import ValueVocabulary
    from recsys_embed.data.table.schema import TableSchema

_PART_BYTES = {"weight": 4, "group": 8, "time": 8}
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
class Dataset(RowSource):
    """A data folder; see :func:`open_dataset`. ``splits`` maps split names to row counts."""

    path: Path
    manifest: Manifest
    memory_limit: int = IN_MEMORY_LIMIT

    @property
    def splits(self) -> dict[str, int]:
        return {name: split.rows for name, split in self.manifest.splits.items()}

    @property
    def num_dense(self) -> int:
        return len(self.manifest.dense)

    @property
    def num_lists(self) -> int:
        return len(self._lists)

    @cached_property
    def _lists(self) -> tuple[str, ...]:
        """Features with any number of ids per row; they come last."""
        return tuple(f.name for f in self.manifest.features if f.form != "single")

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.manifest.features)

    @property
    def truth(self) -> JSON | None:
        """For synthetic data, what the planted model attains (``attainable`` holds AUC and logloss); else None."""
        return self.manifest.extra.get("truth")

    @property
    def digest(self) -> str:
        """Hash of the rows of all splits: equal digests hold the same rows in the same order."""
        rows = sorted((name, split.sha256) for name, split in self.manifest.splits.items())
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    @cached_property
    def stats(self) -> JSON:
        """Content of ``stats.json``."""
        return read_stats(self.path)

    def schema(self, embedding_dim: int) -> Schema:
        """The categorical features in the order of the columns of ``ids``.

        Raises:
            ConfigError: there are none.
        """
        if not self.manifest.features:
            raise ConfigError(
                f"data folder {self.path} has no categorical column, list or sequence, so that there is nothing to "
                "embed; convert it with one, e.g. --categorical user"
            )
        specs = []
        for f in self.manifest.features:
            kind: IdKind = "raw" if f.vocab is None else "index"
            pooling: Pooling = "sum" if f.form == "single" else "mean"
            specs.append(FeatureSpec(f.name, f.num_embeddings, embedding_dim, pooling, kind, table=f.table))
        return Schema(specs)

    @cached_property
    def table_schema(self) -> TableSchema | None:
        """The columns of the table that the folder was made of; None for Criteo's folders."""
        from recsys_embed.data.table.schema import TableSchema

        known = self.manifest.settings.get("schema")
        return None if known is None else TableSchema.from_dict(known)

    def encoder(self, name: str) -> Encoder:
        """What turns raw values of a column of a table into what the folder holds."""
        from recsys_embed.data.columns import read_encoder

        entries = {column["name"]: column for column in self.manifest.columns}
        if name not in entries:
            raise unknown_name("column", name, entries)
        return read_encoder(entries[name], self.path)

    def vocabulary(self, name: str) -> Vocabulary | ValueVocabulary:
        """The values of a feature and their ids (vocab mode); of a table, values of any type."""
        feature = self._feature(name)
        if feature.vocab is None:
            raise ConfigError(f"{self.path} holds raw ids: there is no vocabulary of {name}")
        if not self.manifest.columns:
            return Vocabulary.read(self.path / feature.vocab, name)
        from recsys_embed.data.columns.vocabulary import ValueVocabulary

        entries = (c["learned"] for c in self.manifest.columns)
        learned: Mapping[str, Any] = next((e for e in entries if e.get("vocab") == feature.vocab), {})
        counts = {key: int(learned.get(key, 0)) for key in ("missing_count", "unknown_count")}
        return ValueVocabulary.read(self.path / feature.vocab, name, **counts)

    def counts(self, feature: str) -> Tensor | None:
        """How often each id of a feature occurs in training: int64 ``[num_embeddings]``; None for raw ids.

        Of the rows that the vocabulary was learned from, or of those here where it is another folder's (``like``) and
        there are training rows here. Values too rare for a row of their own count for id 0. Features that share a
        vocabulary have the counts of all of them together.
        """
        known = self._feature(feature)
        if known.vocab is None:
            return None
        if self.manifest.settings.get("like") is not None and self.splits.get("train"):
            return super().counts(feature)
        vocabulary = self.vocabulary(feature)
        found = torch.zeros(known.num_embeddings, dtype=torch.int64)
        found[torch.from_numpy(vocabulary.ids.astype(np.int64))] = torch.from_numpy(vocabulary.counts.astype(np.int64))
        if vocabulary.missing_id != OOV_ID:
            found[vocabulary.missing_id] = vocabulary.missing_count
        if isinstance(vocabulary, Vocabulary):
            found[OOV_ID] += max(0, self.splits.get("train", 0) - int(found.sum()))
        else:
            rare = vocabulary.missing_count if vocabulary.missing_id == OOV_ID else 0
            found[OOV_ID] += vocabulary.unknown_count + rare
        return found

    def unknown_ids(self, feature: str) -> tuple[int, ...]:
        known = self._feature(feature)
        if known.vocab is None:
            return ()
        return tuple({OOV_ID, self.vocabulary(feature).missing_id})

    def row_bytes(self) -> int:
        """Bytes a row takes in memory."""
        wide = 4 if self.manifest.id_mode == "vocab" else 8
        parts = sum(_PART_BYTES[part] for part in self.manifest.parts)
        single = len(self.manifest.features) - self.num_lists
        return 4 * self.num_dense + wide * single + 4 + parts + 8 * self.num_lists + round(wide * self._list_values)

    @cached_property
    def _list_values(self) -> float:
        """Ids that a row's lists hold on average, by the first rows."""
        first = next((shard for split in self.manifest.splits.values() for shard in split.shards if shard.rows), None)
        if first is None or not self._lists:
            return 0.0
        lengths = pl.scan_parquet(self.path / first.file).head(CHUNK_ROWS).select(pl.col(self._lists).list.len().mean())
        return float(np.nansum(lengths.collect().to_numpy().astype(np.float64)))

    def chunks(self, split: str) -> list[tuple[int, int]]:
        """Row groups of a split, in file order."""
        found, at = [], 0
        for shard in self._split(split).shards:
            found += [(at + o, at + min(o + CHUNK_ROWS, shard.rows)) for o in range(0, shard.rows, CHUNK_ROWS)]
            at += shard.rows
        return found

    def read(self, split: str, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` of a split, with compact ids."""
        pieces, at = [], 0
        for shard in self._split(split).shards:
            low, high = max(start, at), min(stop, at + shard.rows)
            if low < high:
                pieces.append(self._read(shard, low - at, high - low))
            at += shard.rows
        if not pieces and (some := self._split(split).shards):
            return self._read(some[0], 0, 0)
        if not pieces:
            none = Batch.empty(self.num_dense, self._num_single, self.num_lists)
            return dataclasses.replace(none, vector_places=self._vectors)
        return pieces[0] if len(pieces) == 1 else Batch.cat(pieces)

    @cached_property
    def _vectors(self) -> dict[str, tuple[int, int]]:
        return self.manifest.vectors

    @property
    def _name(self) -> str:
        return str(self.path)

    def _feature(self, name: str) -> Feature:
        for feature in self.manifest.features:
            if feature.name == name:
                return feature
        raise unknown_name("feature", name, self.feature_names)

    def _split(self, name: str) -> Split:
        if name not in self.manifest.splits:
            raise unknown_name("split", name, self.manifest.splits)
        return self.manifest.splits[name]

    def _read(self, shard: Shard, offset: int, rows: int) -> Batch:
        """Rows of a shard with compact ids."""
        path = self.path / shard.file
        dense_columns = dense_sources(self.manifest.dense)
        parts = self.manifest.parts
        columns = ["label"] * self.manifest.labels + [*dense_columns, *self.feature_names, *parts]
        try:
            frame = pl.scan_parquet(path).slice(offset, rows).select(columns).collect()
        except (OSError, *POLARS_ERRORS) as e:
            raise DataError(f"{path}: cannot be read ({e}); convert the data again") from e
        if len(frame) != rows:
            raise DataError(f"{path}: expected {rows} rows from row {offset}; got {len(frame)}; convert the data again")
        if self.manifest.id_mode == "raw" and not self.manifest.columns:
            missing = {f.name: f.missing_id for f in self.manifest.features}
            ids = frame.select(pl.col(n).reinterpret(signed=True).fill_null(m) if frame[n].dtype == pl.UInt64
                               else pl.col(n).cast(pl.Int64).fill_null(m) for n, m in missing.items())  # fmt: skip
        else:
            ids = frame.select(self.feature_names[: len(self.feature_names) - self.num_lists])
        dense, ids_part, lists = frame_inputs(frame, dense_columns, ids, self._lists)
        label = frame["label"].to_numpy().astype(np.float32) if self.manifest.labels else np.full(rows, np.nan, "f4")
        extra = {part: as_tensor(frame[part].to_numpy()) for part in parts}
        return Batch(dense, ids_part, as_tensor(label), extra, lists, self._vectors)
