"""What a table of events is read from: files, or frames in memory, in chunks of rows that can be asked for again."""

from __future__ import annotations

import glob
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from recsys_embed.data.text_blocks import natural_key
from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.utils.types import JSON


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its file, its number there from 0, the column, why, and what it holds."""

    file: int
    row: int
    column: str
    reason: str
    raw: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    Args:
        file: index of the file in ``Source.files``.
        first: number of the first row in its file, from 0.
        frame: the rows that could be read.
        bad: those between them that could not, which are not in ``frame``.
    """

    file: int
    first: int
    frame: pl.DataFrame
    bad: tuple[BadRow, ...] = ()

    @property
    def stop(self) -> int:
        """Number of the row after the last one."""
        return self.first + len(self.frame) + len(self.bad)


class Source(ABC):
    """A table in one or more files (a frame in memory counts as one).

    A reader of a file format is a subclass with an entry in ``recsys_embed.data.sources.READERS``. The rows must be the
    same, in the same order, each time they are read, since a conversion reads them more than once and a killed one goes
    on at a row's number.

    Attributes:
        files: names of the files in order, for messages and the split by file.
    """

    seekable: ClassVar[bool] = True
    """Whether reading some columns from a row on costs no more than these. Where it does, as in text, a conversion
    reads the source once and keeps its rows in Arrow files meanwhile."""

    files: tuple[str, ...]

    @property
    @abstractmethod
    def inputs(self) -> list[JSON]:
        """Identity of every file, to recognise a repeated conversion."""

    @abstractmethod
    def file_types(self, file: int) -> Mapping[str, pl.DataType]:
        """Columns of a file and their types."""

    @abstractmethod
    def chunks(self, file: int, start: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        """Rows of a file from number ``start`` on, at most ``rows`` at once, in order.

        Args:
            file: index in ``files``.
            start: number of the first row wanted, bad rows counted.
            rows: rows a chunk may span, which bounds the memory.
            columns: those wanted; None: all. A chunk's frame has them with the types of ``types``.
        """

    def length(self, file: int) -> int:
        """Rows of a file, bad ones counted; by default all are read."""
        return max((chunk.stop for chunk in self.chunks(file, 0, 1 << 16)), default=0)

    def held_besides(self, columns: Collection[str]) -> tuple[int, str]:
        """Bytes that memory holds of some columns while any of their rows are read, and the file that needs most."""
        return 0, ""

    def place(self, file: int, row: int) -> str:
        """Where a row is, for people: ``events.csv, line 7``."""
        line = self.line(file, row)
        return f"{self.files[file]}, " + (f"row {row + 1}" if line is None else f"line {line}")

    def line(self, file: int, row: int) -> int | None:
        """The line of a row in its file, from 1; None where rows are no lines."""
        return None

    def stage(self, work: Path) -> Source:
        """This source, or what its rows were written to under ``work`` where they cannot be read twice."""
        return self

    @cached_property
    def types(self) -> dict[str, pl.DataType]:
        """Columns of the table and their types; files may hold narrower numbers.

        Raises:
            DataError: files have other columns, or types that are not one.
        """
        of_files = self.unite([self.file_types(i) for i in range(len(self.files))])
        first = dict(of_files[0])
        faults = []
        for i, theirs in enumerate(of_files[1:], 1):
            if theirs.keys() != first.keys():
                absent = ", ".join(first.keys() - theirs.keys()) or "nothing"
                more = ", ".join(theirs.keys() - first.keys()) or "nothing"
                faults.append(f"{self.files[i]}: lacks {absent} and has besides {more}, beside {self.files[0]}")
                continue
            for name, dtype in theirs.items():
                joint = self.joint(first[name], dtype)
                if joint is None:
                    faults.append(f"{self.files[i]}: column {name!r} is {dtype}; in files before it, {first[name]}")
                else:
                    first[name] = joint
        raise_faults(faults, "files of one table must have the same columns; write them alike", DataError)
        patterns = [n for n in first if n == "*" or (n.startswith("^") and n.endswith("$"))]
        if patterns:
            raise DataError(f"{self.files[0]}: column {patterns[0]!r} has the name of a pattern of names; rename it")
        return self.finish_types(first)

    def unite(self, of_files: Sequence[Mapping[str, pl.DataType]]) -> Sequence[Mapping[str, pl.DataType]]:
        """Types of the files, with columns that they may lack."""
        return of_files

    def joint(self, a: pl.DataType, b: pl.DataType) -> pl.DataType | None:
        """The type of a column that two files have with these, or None."""
        return joint_type(a, b)

    def finish_types(self, types: dict[str, pl.DataType]) -> dict[str, pl.DataType]:
        """Types of the table, by those of all files."""
        return types

    def sample(self, rows: int) -> pl.DataFrame:
        """The first rows of the first file that has some."""
        for file in range(len(self.files)):
            for chunk in self.chunks(file, 0, rows):
                if len(chunk.frame):
                    return chunk.frame
        return pl.DataFrame(schema=dict(self.types))


def joint_type(a: pl.DataType, b: pl.DataType) -> pl.DataType | None:
    """The type that holds all values of both, or None.

    >>> joint_type(pl.Int32(), pl.Int64()), joint_type(pl.Int64(), pl.UInt64())
    (Int64, None)
    """
    if a == b:
        return a
    if a == pl.Null or b == pl.Null:
        return b if a == pl.Null else a
    if isinstance(a, pl.List) and isinstance(b, pl.List):
        inner = joint_type(_made(a.inner), _made(b.inner))
        return None if inner is None else pl.List(inner)
    texts = (pl.String, pl.Categorical, pl.Enum)
    if a in texts and b in texts:
        return pl.String()
    if isinstance(a, pl.Datetime) and isinstance(b, pl.Datetime) and a.time_zone == b.time_zone:
        return pl.Datetime("us", a.time_zone)
    if not (a.is_numeric() and b.is_numeric()):
        return None
    joint = pl.concat([pl.Series(dtype=a).to_frame("x"), pl.Series(dtype=b).to_frame("x")], how="vertical_relaxed")
    found = joint["x"].dtype
    # Integers of 64 bits do not fit a float.
    whole = a.is_integer() and b.is_integer()
    return None if whole and (found.is_float() or found == pl.Int128) else found


def _made(dtype: Any) -> pl.DataType:
    return dtype() if isinstance(dtype, type) else dtype


def find_files(paths: Sequence[str | Path], endings: Sequence[str]) -> list[Path]:
    """Files, globs and folders (with all folders in them) as files: in the order given, natural order inside of one.

    Args:
        paths: what a user gave.
        endings: which files of a folder count, e.g. ``(".parquet",)``.

    Raises:
        ConfigError: names each that matches nothing, and each file given twice.
    """
    found: list[Path] = []
    faults = []
    for item in paths:
        path = Path(item)
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(tuple(endings)))
            hits = [p for p in inside if not any(s.startswith((".", "_")) for s in p.relative_to(path).parts)]
            why = f"the folder holds no files that end in {', '.join(endings)}"
        elif path.exists():
            hits = [path] if path.is_file() else []
            why = "not a regular file; write a pipe or device to a file first"
        else:
            hits = [Path(p) for p in glob.glob(str(item), recursive=True) if Path(p).is_file()]
            why = "no such file or folder, and no match as a glob"
        if not hits:
            faults.append(f"input {str(item)!r}: {why}")
        found += sorted(hits, key=natural_key)
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            faults.append(f"input {str(path)!r} is given more than once")
        seen.add(path.resolve())
    if not paths:
        faults.append("no input is given")
    raise_faults(faults, "the inputs of the table")
    return found


def file_record(path: Path) -> JSON:
    """Identity of a file between runs."""
    stat = path.stat()
    return {"file": str(path), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def unreadable(path: object, error: BaseException) -> DataError:
    """The error for a file that polars cannot read."""
    return DataError(f"{path}: cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})")


def want_columns(source: Source, columns: Sequence[str] | None) -> list[str]:
    """The columns asked for.

    Raises:
        ConfigError: names those that the table lacks.
    """
    known = source.types
    if columns is None:
        return list(known)
    absent = [c for c in columns if c not in known]
    if absent:
        raise ConfigError(f"the table has no column {', '.join(map(repr, absent))}; it has {', '.join(known)}")
    return list(columns)
