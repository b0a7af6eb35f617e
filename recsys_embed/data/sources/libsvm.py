"""libSVM, libFM and libFFM files: a label, then indices with values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.sources.base import BadRow
from recsys_embed.data.sources.text import SAMPLE_BYTES, SHOWN, Ends, TextFiles, compressed, record
from recsys_embed.errors import DataError
from recsys_embed.utils.settings import Settings, param

MOST_NUMERIC = 1000
"""Indices that may have a column of numbers."""


@dataclass(frozen=True)
class LibsvmOptions(Settings):
    """What the indices of libSVM and libFFM files mean, where the first rows do not show it.

    Args:
        layout: of indices of value 1: ``"fields"``: every row has equally many, and the first, second, ... are the
            categories ``f1``, ``f2``, ...; ``"list"``: each row has any number, the list ``indices``. By default
            ``"fields"`` where the first rows have equally many, at most 1,000.
        kinds: ``"numeric"`` by index of a libSVM file; ``"category"``, ``"list"`` or ``"numeric"`` by field of a libFFM
            file.
    """

    title = "the options of libSVM files"
    layout: Literal["fields", "list"] | None = param(None)
    kinds: Mapping[str, Any] = field(default_factory=dict)

    def conflicts(self) -> list[str]:
        known = ("category", "list", "numeric")
        faults = [f"`kinds` of {k!r} must be one of {', '.join(known)}; got {v!r}" for k, v in self.kinds.items()
                  if v not in known]  # fmt: skip
        return faults + [f"`kinds` go by number; got {k!r}" for k in self.kinds if not k.isascii() or not k.isdigit()]


@dataclass(frozen=True)
class _Layout:
    """What the columns are: ``fields`` by number for libFFM, else None."""

    numeric: tuple[int, ...]
    width: int | None = None
    fields: Mapping[int, str] | None = None
    grouped: bool = False

    @property
    def types(self) -> dict[str, pl.DataType]:
        found: dict[str, pl.DataType] = {"label": pl.Float64()}
        if self.grouped:
            found["qid"] = pl.Int64()
        if self.fields is not None:
            of = {"category": pl.Int64(), "list": pl.List(pl.Int64()), "numeric": pl.Float64()}
            return {**found, **{f"field_{k}": of[kind] for k, kind in sorted(self.fields.items())}}
        if self.width is None:
            found["indices"] = pl.List(pl.Int64())
        found |= {f"f{i}": pl.Int64() for i in range(1, (self.width or 0) + 1)}
        return {**found, **{f"x{i}": pl.Float64() for i in self.numeric}}


class LibsvmFiles(TextFiles):
    """Rows of ``label index:value ...`` (libSVM, libFM), or of ``label field:index:value ...`` (libFFM).

    Columns are ``label`` (a float: ``-1`` and ``1`` need ``threshold = 1``), ``qid`` where rows have one, and:

    * libSVM: indices of value 1 are categories ``f1``, ``f2``, ... or the list ``indices`` (see ``layout``); an index
      that has other values in the first rows is a column of numbers ``x7``, 0 where a row lacks it. Value 0 is as if
      the index were absent.
    * libFFM: field 3 is the category ``field_3`` (null where a row lacks it), a list where a row has several, or a
      number, its value, where that is not always 1.

    What the first MiB of the first file does not show is a bad row, whose message says how to name it. ``#`` begins a
    comment.
    """

    format = "libsvm"
    endings = compressed(".libsvm", ".svm", ".svmlight", ".libfm", ".libffm", ".ffm")
    options_type = LibsvmOptions

    def __init__(self, paths: Sequence[Path], options: LibsvmOptions | None = None) -> None:
        super().__init__(paths, {})
        self.options = options or LibsvmOptions()

    def infer(self, file: int, data: bytes, ends: Ends) -> Mapping[str, pl.DataType]:
        return self._layout.types

    @cached_property
    def _layout(self) -> _Layout:
        data, ends = next(self.blocks(0, SAMPLE_BYTES), (b"", np.zeros(0, np.int64)))
        if not len(ends):
            raise DataError(f"{self.files[0]}: the file is empty; leave it out")
        rows = _Tokens(data, len(ends))
        grouped = bool(rows.query.is_not_null().any())
        tokens = rows.tokens.filter(~rows.wrong)
        if not len(tokens):
            raise DataError(f"{self.files[0]}: the first rows hold no `index:value`; is it a libSVM file?")
        kinds = {int(k): v for k, v in self.options.kinds.items()}
        if rows.of_fields:
            found = {}
            counts = tokens.group_by("field", "row").agg(n=pl.len(), odd=(pl.col("value") != 1).any())
            for number, most, odd in counts.group_by("field").agg(pl.max("n"), pl.any("odd")).sort("field").iter_rows():
                found[number] = "numeric" if odd else "list" if most > 1 else "category"
            return _Layout((), fields={**found, **kinds}, grouped=grouped)
        odd = set(tokens.filter(~pl.col("value").is_in([0.0, 1.0]))["index"].to_list())
        numeric = tuple(sorted(odd | {k for k, v in kinds.items() if v == "numeric"}))
        if len(numeric) > MOST_NUMERIC:
            raise DataError(
                f"{self.files[0]}: {len(numeric):,} indices have values other than 1, which would be as many columns "
                "of numbers; write 1 for what occurs, or make a table of what the values mean"
            )
        marks = tokens.filter((pl.col("value") == 1) & ~pl.col("index").is_in(numeric))
        per_row = np.bincount(marks["row"].to_numpy(), minlength=rows.count)[~rows.bad_rows]
        even = len(per_row) > 0 and per_row.min() == per_row.max() and per_row[0] <= 1000
        fields = self.options.layout == "fields" or (self.options.layout is None and even)
        return _Layout(numeric, int(np.median(per_row)) if fields else None, grouped=grouped)

    def parse(
        self, file: int, data: bytes, ends: Ends, first: int, columns: Sequence[str]
    ) -> tuple[pl.DataFrame, list[BadRow]]:
        layout, rows = self._layout, _Tokens(data, len(ends))
        faults: list[tuple[NDArray[np.bool_], str]] = [
            (rows.label.is_null().to_numpy(), "the label is no number"),
            (rows.bad_rows, "expected `index:value` or `field:index:value`, an integer index and a finite value"),
        ]
        tokens = rows.tokens.filter(~rows.wrong)
        if not rows.of_fields:
            tokens = tokens.filter(pl.col("value") != 0)
        if rows.of_fields != (layout.fields is not None) and len(tokens):
            faults.append(
                (np.ones(rows.count, bool), "the first rows are of libFFM and this is of libSVM, or the reverse")
            )
            built: dict[str, pl.Series] = {}
        elif layout.fields is not None:
            built = _by_field(tokens, rows.count, layout.fields, faults)
        else:
            built = _by_index(tokens, rows.count, layout, faults)
        built |= {"label": rows.label, "qid": rows.query}
        bad, rejected = [], np.zeros(rows.count, bool)
        for mask, why in faults:
            for i in np.flatnonzero(mask & ~rejected).tolist():
                raw = record(data, ends, i)[: 4 * SHOWN].decode(errors="backslashreplace")
                bad.append(BadRow(file, first + i, "", why, raw[:SHOWN]))
            rejected |= mask
        if rejected.all():
            return pl.DataFrame(schema={c: self.types[c] for c in columns}), bad
        frame = pl.DataFrame({c: built[c].cast(self.types[c]) for c in columns}).filter(pl.Series(~rejected))
        return frame, sorted(bad, key=lambda b: b.row)


class _Tokens:
    """Rows taken apart: ``label``, ``query`` and ``tokens`` (row, field, index, value), some of them ``wrong``."""

    def __init__(self, data: bytes, count: int) -> None:
        text = pl.Series(data.decode(errors="replace").split("\n")[:count])
        if b"#" in data:
            text = text.str.replace(r"#.*$", "")
        parts = text.str.replace_all(r"\s+", " ").str.strip_chars().str.split(" ")
        self.count = count
        self.label = parts.list.first().cast(pl.Float64, strict=False).fill_nan(None).rename("label")
        frame = pl.DataFrame({"row": np.arange(count), "token": parts.list.slice(1)}).explode("token")
        frame = frame.filter(pl.col("token").is_not_null() & (pl.col("token") != ""))
        queries = frame.filter(pl.col("token").str.starts_with("qid:"))
        self.query = pl.Series("qid", [None] * count, dtype=pl.Int64)
        if len(queries):
            frame = frame.filter(~pl.col("token").str.starts_with("qid:"))
            numbers = queries["token"].str.strip_prefix("qid:").cast(pl.Int64, strict=False)
            self.query = self.query.scatter(queries["row"].to_numpy(), numbers)
        colons = frame["token"].str.count_matches(":", literal=True)
        self.of_fields = len(frame) > 0 and bool((colons == 2).any())
        pieces = frame["token"].str.split_exact(":", 2).struct.unnest()
        names = ["field", "index", "value"] if self.of_fields else ["index", "value", "more"]
        pieces.columns = names
        number = pl.col("field").cast(pl.Int64, strict=False) if self.of_fields else pl.lit(0, pl.Int64)
        self.tokens = pieces.select(
            number.alias("field"),
            pl.col("index").cast(pl.Int64, strict=False),
            pl.col("value").cast(pl.Float64, strict=False),
        ).with_columns(frame["row"])
        whole = self.tokens.select(
            pl.col("field").is_null() | pl.col("index").is_null() | pl.col("value").is_finite().not_().fill_null(True)
        ).to_series()
        self.wrong = whole | (colons != (2 if self.of_fields else 1))
        self.bad_rows = np.zeros(count, bool)
        self.bad_rows[self.tokens.filter(self.wrong)["row"].to_numpy()] = True


def _mark(count: int, rows: pl.Series) -> NDArray[np.bool_]:
    found = np.zeros(count, bool)
    found[rows.to_numpy()] = True
    return found


def _lists(tokens: pl.DataFrame, count: int) -> pl.Series:
    """The indices of every row."""
    made = tokens.group_by("row", maintain_order=True).agg("index")
    joined = pl.DataFrame({"row": np.arange(count)}).join(made, on="row", how="left", maintain_order="left")
    return joined["index"].fill_null(pl.Series([[]], dtype=pl.List(pl.Int64)))


def _by_index(
    tokens: pl.DataFrame, count: int, layout: _Layout, faults: list[tuple[NDArray[np.bool_], str]]
) -> dict[str, pl.Series]:
    built: dict[str, pl.Series] = {}
    numbers = tokens.filter(pl.col("index").is_in(layout.numeric))
    marks = tokens.filter(~pl.col("index").is_in(layout.numeric))
    odd = marks.filter(pl.col("value") != 1)["row"]
    cure = 'name it: `kinds = { "7" = "numeric" }` under [source] for index 7'
    faults.append((_mark(count, odd), f"an index whose value is 1 in the first rows has another here; {cure}"))
    for index in layout.numeric:
        own = numbers.filter(pl.col("index") == index)
        values = np.zeros(count)
        values[own["row"].to_numpy()] = own["value"].to_numpy()
        built[f"x{index}"] = pl.Series(values)
    if layout.width is None:
        return {**built, "indices": _lists(marks, count)}
    lengths = np.bincount(marks["row"].to_numpy(), minlength=count)
    uneven = lengths != layout.width
    why = f'expected {layout.width} indices of value 1, as the first rows have; else `layout = "list"` under [source]'
    faults.append((uneven, why))
    table = np.zeros((count, layout.width), np.int64)
    table[~uneven] = marks.filter(pl.Series(~uneven)[marks["row"]])["index"].to_numpy().reshape(-1, layout.width)
    return {**built, **{f"f{i + 1}": pl.Series(table[:, i]) for i in range(layout.width)}}


def _by_field(
    tokens: pl.DataFrame, count: int, fields: Mapping[int, str], faults: list[tuple[NDArray[np.bool_], str]]
) -> dict[str, pl.Series]:
    built: dict[str, pl.Series] = {}
    new = tokens.filter(~pl.col("field").is_in(list(fields)))["row"]
    cure = 'name it: `kinds = { "9" = "list" }` under [source] for field 9'
    faults.append((_mark(count, new), f"a field that the first rows lack; {cure}"))
    for number, kind in fields.items():
        own = tokens.filter(pl.col("field") == number)
        if kind != "numeric":
            odd = own.filter(pl.col("value") != 1)["row"]
            faults.append(
                (_mark(count, odd), f'field {number} has a value other than 1; it is then "numeric" in `kinds`')
            )
        if kind == "list":
            built[f"field_{number}"] = _lists(own, count)
            continue
        rows = own["row"].to_numpy()
        many = np.bincount(rows, minlength=count) > 1
        faults.append((many, f'field {number} has several indices; it is then "list" in `kinds`'))
        dtype, of = (pl.Float64(), "value") if kind == "numeric" else (pl.Int64(), "index")
        once, places = np.unique(rows, return_index=True)
        empty = pl.Series([None] * count, dtype=dtype) if kind == "category" else pl.Series(np.zeros(count))
        built[f"field_{number}"] = empty.scatter(once, own[of].gather(places))
    return built
