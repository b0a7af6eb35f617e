"""Parquet files with named columns as a data set: all that a contributor writes to train, plan and search on them.

Ids may be integers, floats or strings. A feature's values are numbered by falling frequency in training, from 1; what
is missing or was never seen there is 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from recsys_embed import FeatureSpec, Schema
from recsys_embed.data import Batch, RowSource


class ParquetSource(RowSource):
    """A data set of one Parquet file per split.

    Args:
        files: by name of a split; ``train`` among them.
        label: column of 0 and 1.
        numeric: columns of numbers; what is missing is 0.
        categorical: columns of ids.
        memory_limit: bytes; a larger split is streamed.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        *,
        label: str,
        numeric: Sequence[str],
        categorical: Sequence[str],
        memory_limit: int = RowSource.memory_limit,
    ) -> None:
        self.files, self.label, self.memory_limit = dict(files), label, memory_limit
        self.numeric, self.categorical = tuple(numeric), tuple(categorical)

    @property
    def num_dense(self) -> int:
        return len(self.numeric)

    @cached_property
    def splits(self) -> dict[str, int]:
        return {split: pl.scan_parquet(file).select(pl.len()).collect().item() for split, file in self.files.items()}

    @cached_property
    def digest(self) -> str:
        columns = (self.label, self.numeric, self.categorical)
        files = {split: hashlib.sha256(file.read_bytes()).hexdigest() for split, file in self.files.items()}
        return hashlib.sha256(repr((columns, sorted(files.items()))).encode()).hexdigest()

    @cached_property
    def values(self) -> dict[str, pl.Series]:
        """Values of every feature, the most frequent first and equally frequent ones in order."""
        train = pl.scan_parquet(self.files["train"])
        found = {}
        for name in self.categorical:
            counted = train.select(_id(train, name)).drop_nulls().group_by(name).len()
            found[name] = counted.sort(["len", name], descending=[True, False]).collect()[name]
        return found

    def schema(self, embedding_dim: int) -> Schema:
        return Schema([FeatureSpec(name, 1 + len(values), embedding_dim) for name, values in self.values.items()])

    def read(self, split: str, start: int, stop: int) -> Batch:
        file = pl.scan_parquet(self.files[split])
        rows = file.slice(start, stop - start).select(
            pl.col(self.label).cast(pl.Float32),
            *(pl.col(name).cast(pl.Float32).fill_null(0) for name in self.numeric),
            *(self._number(file, name) for name in self.categorical),
        )
        table = rows.collect()
        dense = _tensor(table.select(self.numeric), torch.float32)
        return Batch(dense, _tensor(table.select(self.categorical), torch.int32), table[self.label].to_torch())

    def _number(self, file: pl.LazyFrame, name: str) -> pl.Expr:
        values = self.values[name]
        numbers = pl.Series(range(1, len(values) + 1), dtype=pl.Int32)
        return _id(file, name).replace_strict(values, numbers, default=0, return_dtype=pl.Int32)


def _id(file: pl.LazyFrame, name: str) -> pl.Expr:
    """A column of ids: no number is no id."""
    column = pl.col(name)
    return column.fill_nan(None) if file.collect_schema()[name].is_float() else column


def _tensor(columns: pl.DataFrame, dtype: torch.dtype) -> Tensor:
    return columns.to_torch(dtype=None).to(dtype) if columns.width else torch.zeros(len(columns), 0, dtype=dtype)
