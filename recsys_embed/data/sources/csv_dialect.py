"""What tells the dialect of CSV files: their first lines."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recsys_embed.data.compressed_file import Reader
from recsys_embed.data.sources.text import SAMPLE_BYTES, beginning
from recsys_embed.data.sources.values import infer_type

SEPARATORS = (",", "\t", ";", "|", "::")
"""Separators that are recognised."""


def first_lines(path: Path, encoding: str = "utf-8", most: int = 20) -> list[str]:
    """The first lines that hold something."""
    with Reader(path) as reader:
        data = reader.read(SAMPLE_BYTES)
        whole = len(data) < SAMPLE_BYTES
    text = beginning(path, data).decode(encoding, errors="replace")
    lines = text.split("\n")
    lines = lines if whole or len(lines) == 1 else lines[:-1]
    return [line.rstrip("\r") for line in lines if line.strip("\r")][:most]


def is_value(cell: str) -> bool:
    """Whether a field of a first line is no name."""
    return not cell.strip() or infer_type(pl.Series([cell])) in (pl.Int64, pl.UInt64, pl.Float64)
