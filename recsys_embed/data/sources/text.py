"""Files of text, one record after the other: in blocks, from any compression, with rows that cannot be read named."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.compressed_file import Reader
from recsys_embed.data.sources.base import BadRow, Chunk, Source, file_record, joint_type, want_columns
from recsys_embed.data.sources.values import TYPES, NumberCount
from recsys_embed.errors import DataError, raise_faults
from recsys_embed.utils.types import JSON

BLOCK_BYTES = 4 << 20
"""Bytes of text that are parsed at once."""
SAMPLE_BYTES = 1 << 20
"""Bytes at the beginning of a file from which the types of its columns are told."""
MAX_RECORD_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"
_WIDE = (b"\xff\xfe", b"\xfe\xff")
_BINARY = (b"PAR1", b"ARROW1")
SHOWN = 200
"""Characters of a bad row that are kept."""

Ends = NDArray[np.int64]


def compressed(*endings: str) -> tuple[str, ...]:
    """Endings of files, plain and compressed.

    >>> compressed(".csv")
    ('.csv', '.csv.gz', '.csv.zst')
    """
    return tuple(e + more for e in endings for more in ("", ".gz", ".zst"))


class TextFiles(Source):
    """Files of text in one table; a subclass says what a record is.

    Types that the options do not give are told from the first ``SAMPLE_BYTES`` of every file: the narrowest of
    integer, float, boolean and string that holds all of them. A later value of another type is a bad row. Empty lines
    are skipped.

    Args:
        paths: the files in order; compression is recognised by content.
        types: types of columns by name, each of :data:`recsys_embed.data.sources.values.TYPES`.

    Attributes:
        may_lack: columns that options name and that need not be there: those of other files' options.
    """

    seekable: ClassVar[bool] = False

    def __init__(self, paths: Sequence[Path], types: Mapping[str, Any]) -> None:
        self.paths = tuple(paths)
        self.files = tuple(map(str, paths))
        self.declared = {name: TYPES[t] for name, t in types.items()}
        self.may_lack: frozenset[str] = frozenset()
        self._assumed: dict[str, pl.DataType] = {}
        self._inferred: dict[int, dict[str, pl.DataType]] = {}
        self.empty: set[str] = set()
        self.by_learned = False
        self._uneven: set[int] = set()

    @property
    def inputs(self) -> list[JSON]:
        return [file_record(p) for p in self.paths]

    # -- what a format says --------------------------------------------------------------------------------------------

    def ends(self, data: bytes, ended: bool) -> Ends:
        """Where the whole records of ``data`` end, each with its newline; all of ``data`` if the file ends with it."""
        return line_ends(data)

    def head(self, file: int) -> int:
        """Records before the first row."""
        return 0

    @abstractmethod
    def infer(self, file: int, data: bytes, ends: Ends) -> Mapping[str, pl.DataType]:
        """Columns and types of the first records of a file; those in ``declared`` may be anything."""

    @abstractmethod
    def parse(
        self, file: int, data: bytes, ends: Ends, first: int, columns: Sequence[str]
    ) -> tuple[pl.DataFrame, list[BadRow]]:
        """The rows that can be read, in the table's types, and the others in order; ``first`` is the first's number."""

    def count_numbers(self, file: int, data: bytes, ends: Ends, columns: Sequence[str]) -> Mapping[str, NumberCount]:
        """Of columns of the first records of a file, how many values are numbers."""
        return {}

    # -- what all have -------------------------------------------------------------------------------------------------

    def blocks(self, file: int, size: int = BLOCK_BYTES) -> Iterator[tuple[bytes, Ends]]:
        """Whole records, the head left out, and where each ends.

        Raises:
            DataError: the file cannot be read to its end.
        """
        path, head = self.paths[file], self.head(file)
        with Reader(path) as reader:
            data, ended, started = b"", False, False
            while not ended:
                got = reader.read(size)
                ended = len(got) < size
                if reader.fault:
                    raise DataError(f"{path}: {reader.fault}; get the file again")
                if not started:
                    got, started = beginning(path, got), True
                data += got
                if ended and data and not data.endswith(b"\n"):
                    data += b"\n"
                ends = self.ends(data, ended)
                if not len(ends):
                    if len(data) > MAX_RECORD_BYTES:
                        raise DataError(f"{path}: a record is longer than {MAX_RECORD_BYTES >> 20} MiB; is it text?")
                    continue
                rest = data[int(ends[-1]) :]
                data, ends = self._without_blank(file, data[: int(ends[-1])], ends)
                skipped = min(head, len(ends))
                if skipped:
                    cut = int(ends[skipped - 1])
                    data, ends, head = data[cut:], ends[skipped:] - cut, head - skipped
                if len(ends):
                    yield data, ends
                data = rest

    def _without_blank(self, file: int, data: bytes, ends: Ends) -> tuple[bytes, Ends]:
        blank = blank_records(data, ends)
        if not blank.any():
            return data, ends
        if blank[:-1].any():
            self._uneven.add(file)
        return without(data, ends, blank)

    def file_types(self, file: int) -> Mapping[str, pl.DataType]:
        if file not in self._inferred:
            data, ends = next(self.blocks(file, SAMPLE_BYTES), (b"", np.zeros(0, np.int64)))
            self._inferred[file] = dict(self.infer(file, data, ends))
        return {name: self.declared.get(name, dtype) for name, dtype in self._inferred[file].items()}

    def joint(self, a: pl.DataType, b: pl.DataType) -> pl.DataType | None:
        # Values that files spell in several ways are texts in all of them.
        return joint_type(a, b) or (pl.String() if a.is_nested() == b.is_nested() is False else None)

    def finish_types(self, types: dict[str, pl.DataType]) -> dict[str, pl.DataType]:
        absent = [f"`types` names {n!r}, which is no column" for n in self.declared if self._lacks(n, types)]
        raise_faults(absent, f"the columns of {self.files[0]} are {', '.join(types)}")
        self.empty = {n for n, t in types.items() if t == pl.Null}
        return {n: self._assumed.get(n) or _known(t) for n, t in types.items()}

    def _lacks(self, name: str, types: Mapping[str, pl.DataType]) -> bool:
        """Whether options name a column that is not there and should be."""
        return name not in types and name not in self.may_lack

    def number_counts(self, columns: Sequence[str]) -> dict[str, NumberCount]:
        """Of those of some columns that are strings, how many values of the first records of all files are numbers.

        Columns without a number, and those whose type the options name, are left out.
        """
        wanted = [c for c in columns if self.types.get(c) == pl.String and c not in self.declared]
        total = dict.fromkeys(wanted, NumberCount())
        for file in range(len(self.files)) if wanted else ():
            data, ends = next(self.blocks(file, SAMPLE_BYTES), (b"", np.zeros(0, np.int64)))
            for name, count in self.count_numbers(file, data, ends, wanted).items():
                total[name] += count
        return {name: count for name, count in total.items() if count.number}

    @property
    def assumed(self) -> Mapping[str, pl.DataType]:
        """Types of columns that are read as something else than their first rows look like."""
        return self._assumed

    def assume(self, types: Mapping[str, pl.DataType], *, learned: bool = False) -> None:
        """Read columns as these types, whatever the first rows look like, but for those that the options name.

        Args:
            types: by name.
            learned: they are those of the rows that a model was taught with, rather than of a schema.
        """
        self.by_learned = learned
        self._assumed = {n: t for n, t in types.items() if n not in self.declared}
        self.__dict__.pop("types", None)

    def chunks(self, file: int, start: int, rows: int, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
        wanted = want_columns(self, columns)
        held: Chunk | None = None
        at = 0
        for data, ends in self.blocks(file):
            first, at = at, at + len(ends)
            if at <= start:
                continue
            frame, bad = self.parse(file, data, ends, first, wanted)
            piece = Chunk(file, first, frame, tuple(bad))
            piece = cut(piece, start)[1] if first < start else piece
            held = piece if held is None else joined(held, piece)
            while held.stop - held.first >= rows:
                whole, held = cut(held, held.first + rows)
                yield whole
        if held is not None and held.stop > held.first:
            yield held

    def line(self, file: int, row: int) -> int | None:
        return None if file in self._uneven else row + 1 + self.head(file)

    def lines_differ(self, file: int) -> None:
        """Note that the records of a file are not its lines."""
        self._uneven.add(file)


def _known(dtype: pl.DataType) -> pl.DataType:
    if isinstance(dtype, pl.List):
        return pl.List(_known(dtype.inner() if isinstance(dtype.inner, type) else dtype.inner))
    return pl.String() if dtype == pl.Null else dtype


def beginning(path: Path, data: bytes) -> bytes:
    """The first bytes of a text without a byte-order mark.

    Raises:
        DataError: they are those of another kind of file.
    """
    if data.startswith(_WIDE):
        raise DataError(f"{path}: is UTF-16; write it as UTF-8, e.g. with iconv -f UTF-16 -t UTF-8")
    if data.startswith(_BINARY):
        raise DataError(f"{path}: is Parquet or Arrow, not text; give it the ending .parquet or .arrow")
    return data.removeprefix(_BOM)


def line_ends(data: bytes) -> Ends:
    """Where lines end, newlines included.

    >>> line_ends(b"a\\nbc\\nd").tolist()
    [2, 5]
    """
    return np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1


def record(data: bytes, ends: Ends, number: int) -> bytes:
    """One of the records, without its newline."""
    start = int(ends[number - 1]) if number else 0
    return data[start : int(ends[number])].rstrip(b"\r\n")


def blank_records(data: bytes, ends: Ends) -> NDArray[np.bool_]:
    """Which records hold nothing."""
    lengths = np.diff(ends, prepend=0)
    blank = lengths == 1
    for i in np.flatnonzero(lengths == 2).tolist():
        blank[i] = data[int(ends[i]) - 2] == ord("\r")
    return blank


def without(data: bytes, ends: Ends, gone: NDArray[np.bool_]) -> tuple[bytes, Ends]:
    """The records but some."""
    lengths = np.diff(ends, prepend=0)
    kept = np.frombuffer(data, np.uint8)[np.repeat(~gone, lengths)].tobytes()
    return kept, np.cumsum(lengths[~gone])


def cut(chunk: Chunk, row: int) -> tuple[Chunk, Chunk]:
    """A chunk before and from a row on."""
    before = tuple(b for b in chunk.bad if b.row < row)
    good = row - chunk.first - len(before)
    return (
        Chunk(chunk.file, chunk.first, chunk.frame.head(good), before),
        Chunk(chunk.file, row, chunk.frame.slice(good), chunk.bad[len(before) :]),
    )


def joined(a: Chunk, b: Chunk) -> Chunk:
    """Two chunks of which one follows the other."""
    return Chunk(a.file, a.first, pl.concat([a.frame, b.frame]), a.bad + b.bad)
