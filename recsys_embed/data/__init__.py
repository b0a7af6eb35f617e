"""Data folders: conversion of any table, synthesis, statistics and batches. Names load at first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys_embed.data.batch import Batch, Batches, InMemoryDataset
    from recsys_embed.data.conversion import ConvertReport
    from recsys_embed.data.criteo.convert import convert_criteo
    from recsys_embed.data.criteo.options import CriteoOptions
    from recsys_embed.data.criteo.synthetic import SyntheticReport, make_synthetic
    from recsys_embed.data.data_source import BatchSource, DataSource
    from recsys_embed.data.folder import StorageError
    from recsys_embed.data.loader import Dataset, open_dataset
    from recsys_embed.data.presets import convert_preset, preset_names, preset_table
    from recsys_embed.data.rows import Rows, RowSource
    from recsys_embed.data.serving.describe import describe_encoders
    from recsys_embed.data.serving.pack import encoders_of
    from recsys_embed.data.serving.read import read_row_encoder
    from recsys_embed.data.serving.recommend import UserEncoder as UserEncoder  # not public
    from recsys_embed.data.serving.recommend import recommend_rows, recommended
    from recsys_embed.data.serving.score import score_files, score_rows, write_rows
    from recsys_embed.data.splits import SplitRule
    from recsys_embed.data.table.convert import convert_table
    from recsys_embed.data.table.inspect import inspect_table
    from recsys_embed.data.table.schema import TableSchema
    from recsys_embed.data.table.split import TableSplit
    from recsys_embed.data.vocab import Vocabulary

_HOME = {
    "Batch": "batch",
    "Batches": "batch",
    "InMemoryDataset": "batch",
    "BatchSource": "data_source",
    "DataSource": "data_source",
    "RowSource": "rows",
    "Rows": "rows",
    "ConvertReport": "conversion",
    "convert_criteo": "criteo.convert",
    "StorageError": "folder",
    "Dataset": "loader",
    "open_dataset": "loader",
    "CriteoOptions": "criteo.options",
    "SplitRule": "splits",
    "SyntheticReport": "criteo.synthetic",
    "make_synthetic": "criteo.synthetic",
    "Portion": "portion",
    "TableSchema": "table.schema",
    "TableSplit": "table.split",
    "convert_table": "table.convert",
    "convert_preset": "presets",
    "preset_names": "presets",
    "preset_table": "presets",
    "inspect_table": "table.inspect",
    "Vocabulary": "vocab",
    "describe_encoders": "serving.describe",
    "encoders_of": "serving.pack",
    "read_row_encoder": "serving.read",
    "recommend_rows": "serving.recommend",
    "recommended": "serving.recommend",
    "UserEncoder": "serving.recommend",
    "score_files": "serving.score",
    "write_rows": "serving.score",
    "score_rows": "serving.score",
}
_NEEDS_POLARS = {
    "criteo.convert",
    "loader",
    "vocab",
    "criteo.synthetic",
    "table.schema",
    "table.split",
    "table.convert",
    "table.inspect",
    "presets",
    "serving.describe",
    "serving.pack",
    "serving.read",
    "serving.recommend",
    "serving.score",
}

__all__ = [
    "Batch",
    "BatchSource",
    "Batches",
    "ConvertReport",
    "CriteoOptions",
    "DataSource",
    "Dataset",
    "InMemoryDataset",
    "Portion",
    "RowSource",
    "Rows",
    "SplitRule",
    "StorageError",
    "SyntheticReport",
    "TableSchema",
    "TableSplit",
    "Vocabulary",
    "convert_criteo",
    "convert_preset",
    "convert_table",
    "describe_encoders",
    "encoders_of",
    "inspect_table",
    "make_synthetic",
    "open_dataset",
    "preset_names",
    "preset_table",
    "read_row_encoder",
    "recommend_rows",
    "recommended",
    "score_files",
    "score_rows",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    if home in _NEEDS_POLARS:
        from recsys_embed.utils.optional import require

        purpose = "scoring raw rows" if home.startswith("serving.") else "reading and writing data folders"
        require("polars", extra="data", purpose=purpose)
    return getattr(import_module(f"recsys_embed.data.{home}"), name)
