"""Sources of tables: each file format, and frames in memory, in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from recsys_embed.data.sources.arrow_ipc import ArrowFiles
from recsys_embed.data.sources.base import BadRow, Chunk, Source, find_files
from recsys_embed.data.sources.csv import CsvFiles
from recsys_embed.data.sources.frames import frame_source
from recsys_embed.data.sources.json_lines import JsonLines
from recsys_embed.data.sources.libsvm import LibsvmFiles
from recsys_embed.data.sources.parquet import ParquetFiles
from recsys_embed.data.sources.text import TextFiles
from recsys_embed.errors import ConfigError, raise_faults, unknown_name

READERS: tuple[Any, ...] = (ParquetFiles, CsvFiles, ArrowFiles, JsonLines, LibsvmFiles)
"""Readers of files: each has a ``format``, its ``endings``, and ``options_type``, the settings that the schema's
``[source]`` may hold, or None. It is called with the paths and, where there are some, these settings."""

__all__ = ["READERS", "BadRow", "Chunk", "Source", "find_files", "join_options", "open_like", "open_source"]


def open_like(table: Any, former: Mapping[str, Any], given: Mapping[str, Any]) -> Source:
    """A source over a table, read by the options of a former one but for those that are given.

    Columns that only the former options name may be absent: the former table had its label, for instance.

    Raises:
        ConfigError: see :func:`open_source`.
    """
    source = open_source(table, join_options(former, given), known_only=not given)
    if isinstance(source, TextFiles):
        by_column = [key for key, value in former.items() if isinstance(value, Mapping)]
        source.may_lack = frozenset(n for key in by_column for n in former[key] if n not in given.get(key, {}))
    return source


def open_source(table: Any, options: Mapping[str, Any] | None = None, *, known_only: bool = False) -> Source:
    """A source over what a user gave as a table.

    Args:
        table: a path, a glob, a folder, several of them, a polars (lazy) or pandas frame, an Arrow table, a mapping of
            columns, or a :class:`Source`.
        options: of the reader, e.g. the separator of CSV files; ``format`` names the reader of files of any ending.
        known_only: leave out options that are another reader's, as those of a former table are that was read from
            files of another format.

    Raises:
        ConfigError: no such files, endings that no reader knows, files of several formats, or options of another one.
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
    settings = dict(options or {})
    named = settings.pop("format", None)
    if known_only and any(_tells_format(Path(p)) for p in ([table] if isinstance(table, str | Path) else table)):
        named = None
    formats = {reader.format: reader for reader in READERS}
    if named is not None and named not in formats:
        raise unknown_name("format", str(named), formats)
    endings = _endings() if named is None else list(formats[named].endings)
    paths = find_files([table] if isinstance(table, str | Path) else table, endings)
    readers = [_reader(p) if named is None else formats[named] for p in paths]
    unknown = [f"{p}: no reader knows this ending" for p, r in zip(paths, readers, strict=True) if r is None]
    plain = ", ".join(e for e in _endings() if not e.endswith((".gz", ".zst")))
    known = (
        f"known endings: {plain}, of text also with .gz or .zst; for others name the format, {', '.join(formats)}: "
        '`format = "csv"` under [source], or --source format=csv'
    )
    raise_faults(unknown, known)
    if len(set(readers)) > 1:
        other = next(p for p, r in zip(paths, readers, strict=True) if r is not readers[0])
        raise ConfigError(
            f"files of one table must have one format; got {paths[0]} and {other}: give those of one format alone, or "
            "write all in one, e.g. polars.read_csv(file).write_parquet(other)"
        )
    if known_only:
        known_names = {f.name for f in fields(readers[0].options_type)} if readers[0].options_type else set()
        settings = {k: v for k, v in settings.items() if k in known_names}
    return _opened(readers[0], paths, settings)


def join_options(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a reader, of which the second win: whole ones, and column by column those that go by column.

    >>> join_options({"decimal": ",", "types": {"a": "string"}}, {"decimal": ".", "types": {"b": "float"}})
    {'decimal': '.', 'types': {'a': 'string', 'b': 'float'}}
    """
    both = {k for k, v in then.items() if isinstance(v, Mapping) and isinstance(first.get(k), Mapping)}
    return {**first, **then, **{k: {**first[k], **then[k]} for k in then if k in both}}


def _opened(reader: Any, paths: list[Path], settings: dict[str, Any]) -> Source:
    if reader.options_type is None:
        if settings:
            raise ConfigError(f"[source]: {reader.format} files have no option {', '.join(settings)}")
        made: Source = reader(paths)
        return made
    made = reader(paths, reader.options_type.from_dict(settings))
    return made


def _endings() -> list[str]:
    return [ending for reader in READERS for ending in reader.endings]


def _tells_format(path: Path) -> bool:
    """Whether the ending of a file, or of one in a folder, is that of a reader."""
    if not path.is_dir():
        return _reader(path) is not None
    return any(_reader(p) is not None for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "_")))


def _reader(path: Path) -> Any:
    matching = (r for r in READERS if path.name.lower().endswith(tuple(r.endings)))
    return next(matching, None)
