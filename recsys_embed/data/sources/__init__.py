"""Sources of tables: each file format, and frames in memory, in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recsys_embed.data.sources.base import BadRow, Chunk, Source, find_files
from recsys_embed.data.sources.frames import frame_source
from recsys_embed.data.sources.parquet import ParquetFiles
from recsys_embed.errors import ConfigError, raise_faults

READERS: tuple[Any, ...] = (ParquetFiles,)
"""Readers of files: each has ``endings`` and is called with the paths and, by name, with the options of the schema's
``[source]``."""

__all__ = ["READERS", "BadRow", "Chunk", "Source", "find_files", "open_source"]


def open_source(table: Any, options: Mapping[str, Any] | None = None) -> Source:
    """A source over what a user gave as a table.

    Args:
        table: a path, a glob, a folder, several of them, a polars (lazy) or pandas frame, an Arrow table, a mapping of
            columns, or a :class:`Source`.
        options: of the reader, e.g. the separator of CSV files.

    Raises:
        ConfigError: no such files, endings that no reader knows, or files of several formats.
    """
    if isinstance(table, Source):
        return table
    if not isinstance(table, str | Path):
        found = frame_source(table)
        if found is not None:
            return found
        if not isinstance(table, Sequence) or not all(isinstance(p, str | Path) for p in table):
            raise ConfigError(
                "the table must be paths, a polars or pandas frame, an Arrow table, or columns by name; got "
                f"{type(table).__name__}"
            )
    paths = find_files([table] if isinstance(table, str | Path) else table, _endings())
    readers = [_reader(p) for p in paths]
    unknown = [f"{p}: no reader knows this ending" for p, r in zip(paths, readers, strict=True) if r is None]
    raise_faults(unknown, f"known endings: {', '.join(_endings())}")
    if len(set(readers)) > 1:
        other = next(p for p, r in zip(paths, readers, strict=True) if r is not readers[0])
        raise ConfigError(f"files of one table must have one format; got {paths[0]} and {other}")
    made: Source = readers[0](paths, **(options or {}))
    return made


def _endings() -> list[str]:
    return [ending for reader in READERS for ending in reader.endings]


def _reader(path: Path) -> Any:
    matching = (r for r in READERS if path.name.lower().endswith(tuple(r.endings)))
    return next(matching, None)
