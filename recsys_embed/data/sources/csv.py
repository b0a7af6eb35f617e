"""CSV and TSV files in any dialect, plain, gzip or zstandard."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recsys_embed.data.sources.base import BadRow
from recsys_embed.data.sources.csv_dialect import SEPARATORS, first_lines, is_value
from recsys_embed.data.sources.csv_records import Records
from recsys_embed.data.sources.text import (
    SHOWN,
    Ends,
    TextFiles,
    compressed,
    record,
    without,
)
from recsys_embed.data.sources.values import (
    TYPES,
    NumberCount,
    count_numbers,
    infer_type,
    list_type,
    read_lists,
    read_values,
    type_name,
)
from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.utils.settings import Settings, param

_ONE_BYTE = "\x1f"
"""Stands for a separator of several characters."""


@dataclass(frozen=True)
class CsvOptions(Settings):
    """The dialect of CSV files.

    Args:
        separator: between fields, any text; by default tab for ``.tsv``, else the one of ``SEPARATORS`` that splits the
            first lines into the most fields, all of them into as many.
        quote: around fields that hold separators or newlines, doubled inside of them; ``""``: quotes are plain
            characters.
        header: whether the first line names the columns; by default it does unless ``names`` are given, or one of its
            fields is a number or empty.
        names: of the columns in order; without them and without a header: ``c1``, ``c2``, ...
        encoding: of the text, as Python calls it; a byte-order mark is left out.
        decimal: ``","`` in numbers such as ``1,5``.
        nulls: texts that mean a missing value, besides the empty one.
        types: of columns by name: ``"string"``, ``"integer"``, ``"unsigned"``, ``"float"`` or ``"boolean"``;
            of a column of ``lists``, of its values.
        lists: columns that are lists written as text, and what separates the values, e.g. ``{"tags": "|"}``.
    """

    title = "the options of CSV files"
    separator: str | None = param(None)
    quote: str = '"'
    header: bool | None = param(None)
    names: tuple[str, ...] = ()
    encoding: str = "utf-8"
    decimal: Literal[".", ","] = "."
    nulls: tuple[str, ...] = ()
    types: Mapping[str, Any] = field(default_factory=dict)
    lists: Mapping[str, Any] = field(default_factory=dict)

    def conflicts(self) -> list[str]:
        faults = type_faults(self.types)
        faults += [
            f"`lists`: column {name!r} must have what separates its values, as text; got {given!r}"
            for name, given in self.lists.items()
            if not isinstance(given, str) or not given
        ]
        if self.separator is not None and (not self.separator or self.separator in ("\n", "\r", self.quote)):
            faults.append(f"`separator` must be text other than a newline or the quote; got {self.separator!r}")
        if len(self.quote.encode()) > 1 or self.quote in ("\n", "\r"):
            faults.append(f"`quote` must be one ASCII character or empty; got {self.quote!r}")
        repeated = sorted({n for n in self.names if self.names.count(n) > 1})
        if repeated:
            faults.append(f"`names` must differ; got {', '.join(repeated)} more than once")
        try:
            name = codecs.lookup(self.encoding).name
            if name.startswith(("utf-16", "utf-32", "utf-7")) or "a\n".encode(name) != b"a\n":
                faults.append(f"`encoding` must keep ASCII as it is; convert {self.encoding} files to UTF-8 first")
        except (LookupError, UnicodeError):
            faults.append(
                f"`encoding` {self.encoding!r} is unknown to Python; known are utf-8, latin-1, cp1252, gbk ..."
            )
        return faults


def type_faults(types: Mapping[str, Any]) -> list[str]:
    """What is wrong with the types that options name."""
    return [
        f"`types`: column {name!r} must be one of {', '.join(TYPES)}; got {given!r}"
        for name, given in types.items()
        if given not in TYPES
    ]


class CsvFiles(TextFiles):
    """CSV files of one table.

    Args:
        paths: the files in order; each has its own header, whose columns may be in any order.
        options: the dialect.
    """

    format = "csv"
    endings = compressed(".csv", ".tsv")
    options_type = CsvOptions

    def __init__(self, paths: Sequence[Path], options: CsvOptions | None = None) -> None:
        self.options = options or CsvOptions()
        super().__init__(paths, self.options.types)
        self.declared = {n: pl.List(t) if n in self.options.lists else t for n, t in self.declared.items()}
        self._names: dict[int, tuple[list[str], int]] = {}

    # -- dialect -------------------------------------------------------------------------------------------------------

    @cached_property
    def separator(self) -> str:
        """Between fields: as the options or the first file have it."""
        if self.options.separator is not None:
            return self.options.separator
        name = self.paths[0].name.lower()
        return "\t" if ".tsv" in name else self._recognised(self.paths[0])

    def _recognised(self, path: Path) -> str:
        even = self.even_fields(first_lines(path))
        if not even:
            return ","
        named = [s for s, fields in even.items() if fields == len(self.options.names)]
        best = named[0] if named else max(even, key=lambda s: even[s])
        rivals = [s for s in even if even[s] == even[best]] if len(named) != 1 else []
        if len(rivals) > 1:
            raise ConfigError(
                f"{path}: its first lines are {even[best]} fields each by {' and by '.join(map(repr, rivals))}; say "
                f"which it is, `separator = {json.dumps(best)}` under [source], or --source separator={best!r}"
            )
        return best

    def even_fields(self, lines: Sequence[str]) -> dict[str, int]:
        """Separators that split each of some lines into as many fields, more than one, and how many."""
        counts = {s: {len(self._split(line, s)) for line in lines} for s in SEPARATORS}
        even = {s: found.pop() for s, found in counts.items() if len(found) == 1}
        return {s: fields for s, fields in even.items() if fields > 1}

    def _split(self, line: str, separator: str) -> list[str]:
        one = separator if len(separator) == 1 else _ONE_BYTE
        text = line if one == separator else line.replace(separator, one)
        if not self.options.quote:
            return text.split(one)
        try:
            return next(csv.reader([text], delimiter=one, quotechar=self.options.quote), [])
        except csv.Error as e:
            raise DataError(
                f"{self.paths[0]}: the first lines are no CSV ({e}); is it text, whose lines end with a newline?"
            ) from e

    @cached_property
    def utf8(self) -> bool:
        """Whether the files' encoding is UTF-8."""
        return codecs.lookup(self.options.encoding).name == "utf-8"

    @cached_property
    def _replaced(self) -> bool:
        """Whether one byte stands for the separator."""
        return len(self.separator.encode()) > 1

    @cached_property
    def _raw_rule(self) -> Records:
        """Finds the ends of records in bytes as the file has them."""
        return Records(self.separator.encode(self.options.encoding), self.options.quote.encode())

    @cached_property
    def _rule(self) -> Records:
        one = _ONE_BYTE if self._replaced else self.separator
        return Records(one.encode(), self.options.quote.encode())

    def ends(self, data: bytes, ended: bool) -> Ends:
        if self._replaced:
            # Quotes have no meaning beside such separators, so that a record is a line.
            return super().ends(data, ended)
        return self._raw_rule.ends(data, ended)

    def head(self, file: int) -> int:
        return self._header(file)[1]

    def first_fields(self, file: int, separator: str | None = None) -> list[str]:
        """The fields of a file's first line."""
        line = next(iter(first_lines(self.paths[file], self.options.encoding)), "")
        return self._split(line, self.separator if separator is None else separator)

    def names(self, file: int) -> list[str]:
        """Columns of a file in order."""
        return self._header(file)[0]

    def _header(self, file: int) -> tuple[list[str], int]:
        if file not in self._names:
            self._names[file] = self._read_header(file)
        return self._names[file]

    def _read_header(self, file: int) -> tuple[list[str], int]:
        path, options = self.paths[file], self.options
        first = self.first_fields(file)
        if not first:
            raise DataError(f"{path}: the file is empty; leave it out")
        header = options.header
        if header is None:
            header = not options.names and not any(is_value(cell) for cell in first)
        names = list(options.names)
        if names and len(names) != len(first):
            others = [s for s, n in self.even_fields(first_lines(path, options.encoding)).items() if n == len(names)]
            way = f"; by {others[0]!r} it has as many: --source separator={others[0]!r}" if others else ""
            raise ConfigError(
                f"{path}: `names` has {len(names)} columns; the first line has {len(first)}, separated by "
                f"{self.separator!r}{way}"
            )
        if names and not header and [cell.strip() for cell in first] == names:
            raise ConfigError(f"{path}: the first line holds the names of the columns: --source header=true")
        if header and not names:
            names = [cell.strip() for cell in first]
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice or "" in names:
                what = f"names {', '.join(twice)} more than once" if twice else "leaves a column without a name"
                raise DataError(f"{path}: the header {what}; give `names` and `header = true` under [source]")
        return names or [f"c{i}" for i in range(1, len(first) + 1)], int(header)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def infer(self, file: int, data: bytes, ends: Ends) -> Mapping[str, pl.DataType]:
        names = self.names(file)
        if not len(ends):
            return {name: pl.Null() for name in names}
        frame, _, _ = self._texts(file, data, ends, 0, names)
        types = {name: infer_type(frame[name], self.options.decimal) for name in names}
        for name, separator in self.options.lists.items():
            if name in types:
                types[name] = pl.List(list_type(frame[name], separator))
        return types

    def joint(self, a: pl.DataType, b: pl.DataType) -> pl.DataType | None:
        found = super().joint(a, b)
        # Lists whose values files spell in several ways are lists of texts.
        return pl.List(pl.String()) if found is None and a.is_nested() and b.is_nested() else found

    def finish_types(self, types: dict[str, pl.DataType]) -> dict[str, pl.DataType]:
        absent = [f"`lists` names {n!r}, which is no column" for n in self.options.lists if self._lacks(n, types)]
        raise_faults(absent, f"the columns of {self.files[0]} are {', '.join(types)}")
        return super().finish_types(types)

    def count_numbers(self, file: int, data: bytes, ends: Ends, columns: Sequence[str]) -> Mapping[str, NumberCount]:
        if not len(ends):
            return {}
        frame, _, _ = self._texts(file, data, ends, 0, columns)
        return {name: count_numbers(frame[name], self.options.decimal) for name in columns}

    def parse(
        self, file: int, data: bytes, ends: Ends, first: int, columns: Sequence[str]
    ) -> tuple[pl.DataFrame, list[BadRow]]:
        frame, bad, good = self._texts(file, data, ends, first, columns)
        found, rejected = {}, np.zeros(len(frame), bool)
        for name in columns:
            dtype = self.types[name]
            told = name in self.declared
            if isinstance(dtype, pl.List):
                found[name], failed = read_lists(frame[name], self.options.lists[name], dtype)
            else:
                found[name], failed = read_values(frame[name], dtype, self.options.decimal, told=told)
            if failed is None:
                continue
            for at in np.flatnonzero(failed.to_numpy() & ~rejected).tolist():
                text = str(frame[name][at])
                bad.append(BadRow(file, first + good[at], name, _misfit(name, dtype, self, text), text[:SHOWN]))
                rejected[at] = True
        made = pl.DataFrame(found) if columns else frame
        if rejected.any():
            made = made.filter(pl.Series(~rejected))
        return made, sorted(bad, key=lambda b: b.row)

    def _texts(
        self, file: int, data: bytes, ends: Ends, first: int, columns: Sequence[str]
    ) -> tuple[pl.DataFrame, list[BadRow], list[int] | range]:
        """Fields as texts, the records that are none, and the number of every row of the frame among the records."""
        names = self.names(file)
        good: list[int] | range = range(len(ends))
        data, ends, bad = self._recode(file, data, ends, first)
        if bad:
            gone = {b.row - first for b in bad}
            good = [i for i in good if i not in gone]
        if self._rule.multiline(data, ends):
            self.lines_differ(file)
        wrong = np.zeros(len(ends), bool)
        for i in self._rule.stray(data, ends):
            why = (
                'a quote stands inside of a field, or none ends it; quotes that are plain characters need `quote = ""`'
            )
            bad.append(self._bad(file, first + good[i], why, record(data, ends, i)))
            wrong[i] = True
        if wrong.any():
            data, ends, good, wrong = _drop(data, ends, good, wrong)
        counts = self._rule.fields(data, ends)
        wrong = counts != len(names)
        for i in np.flatnonzero(wrong).tolist():
            why = f"expected {len(names)} fields separated by {self.separator!r}, not {counts[i]}"
            bad.append(self._bad(file, first + good[i], why, record(data, ends, i)))
        if wrong.any():
            data, ends, good, wrong = _drop(data, ends, good, wrong)
        schema = {name: pl.String() for name in names}
        if not len(ends):
            return pl.DataFrame(schema={c: pl.String() for c in columns}), bad, good
        frame = pl.read_csv(
            data, has_header=False, schema=schema, separator=self._rule.separator.decode(),
            quote_char=self.options.quote or None, columns=[i for i, n in enumerate(names) if n in columns] or [0],
            null_values=["", *self.options.nulls] if self.options.nulls else None, infer_schema=False,
        )  # fmt: skip
        if len(frame) != len(ends):
            raise DataError(
                f"{self.files[file]}: {len(ends)} records were read as {len(frame)} rows near row {first + 1}"
            )
        return frame.select(columns), bad, good

    def _recode(self, file: int, data: bytes, ends: Ends, first: int) -> tuple[bytes, Ends, list[BadRow]]:
        """Records as UTF-8 with a separator of one byte; those that are not in the encoding apart."""
        if data.isascii() and not self._replaced:
            return data, ends, []
        bad: list[BadRow] = []
        try:
            text = data.decode(self.options.encoding)
        except UnicodeDecodeError:
            wrong = np.zeros(len(ends), bool)
            for i in range(len(ends)):
                raw = record(data, ends, i)
                try:
                    raw.decode(self.options.encoding)
                except UnicodeDecodeError as e:
                    why = f"byte 0x{raw[e.start]:02x} is not {self.options.encoding}; name the `encoding`, e.g. latin-1"
                    bad.append(self._bad(file, first + i, why, raw))
                    wrong[i] = True
            data, ends = without(data, ends, wrong)
            text = data.decode(self.options.encoding)
        if self.utf8 and not self._replaced:
            return data, ends, bad
        if self._replaced:
            if _ONE_BYTE in text:
                raise DataError(f"{self.files[file]}: holds the character 0x1f, which stands for the separator")
            text = text.replace(self.separator, _ONE_BYTE)
        data = text.encode()
        return data, (super().ends(data, True) if self._replaced else self._rule.ends(data, True)), bad

    def _bad(self, file: int, row: int, why: str, raw: bytes) -> BadRow:
        text = raw[: 4 * SHOWN].decode(self.options.encoding, errors="backslashreplace")[:SHOWN]
        return BadRow(file, row, "", why, text.replace(_ONE_BYTE, self.separator))


def _drop(data: bytes, ends: Ends, good: Sequence[int], wrong: np.ndarray) -> tuple[bytes, Ends, list[int], np.ndarray]:
    data, ends = without(data, ends, wrong)
    return data, ends, [g for g, w in zip(good, wrong.tolist(), strict=True) if not w], np.zeros(len(ends), bool)


def _misfit(name: str, dtype: pl.DataType, source: TextFiles, text: str) -> str:
    article = "an" if type_name(dtype)[0] in "aeiou" else "a"
    if name in source.declared:
        return f"not {article} {type_name(dtype)}, as `types` says"
    if name in source.assumed and source.by_learned:
        return f"not {article} {type_name(dtype)}, as the column was when it was learned"
    if name in source.assumed:
        comma = ' or `decimal = ","`' if "," in text else ""
        return (
            f"not {article} {type_name(dtype)}, as the schema has it; if it stands for a missing value: "
            f"`nulls = [{json.dumps(text[:SHOWN], ensure_ascii=False)}]`{comma} under [source]"
        )
    other = "float" if dtype.is_integer() and infer_type(pl.Series([text])).is_float() else "string"
    return (
        f"not {article} {type_name(dtype)}, as the first rows of the table are; say what it is: "
        f'`types = {{ "{name}" = "{other}" }}` under [source]'
    )
