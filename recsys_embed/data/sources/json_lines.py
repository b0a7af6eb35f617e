"""JSON lines: one object per line, plain, gzip or zstandard."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys_embed.data.sources.base import BadRow
from recsys_embed.data.sources.csv import type_faults
from recsys_embed.data.sources.text import SHOWN, Ends, TextFiles, compressed, record, without
from recsys_embed.data.sources.values import TYPES, NumberCount
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.utils.settings import Settings
from recsys_embed.utils.types import JSON

_NESTED = r"^[\[{]"


@dataclass(frozen=True)
class JsonOptions(Settings):
    """How JSON lines are read.

    Args:
        types: of columns by name: ``"string"``, ``"integer"``, ``"unsigned"``, ``"float"`` or ``"boolean"``. A column
            that is in no object of the first ``SAMPLE_BYTES`` of any file has to be named here, else it is left out.
    """

    title = "the options of JSON lines"
    types: Mapping[str, Any] = field(default_factory=dict)

    def conflicts(self) -> list[str]:
        return type_faults(self.types)


class JsonLines(TextFiles):
    """Files of JSON objects, one per line; a key that an object lacks is null.

    Args:
        paths: the files in order.
        options: types of columns.
    """

    format = "json"
    endings = compressed(".jsonl", ".ndjson")
    options_type = JsonOptions

    def __init__(self, paths: Sequence[Path], options: JsonOptions | None = None) -> None:
        if _read(b'{"x": 1.5}\n', {"x": pl.Int64()}) is not None:
            raise ConfigError(
                f"polars {pl.__version__} reads 1.5 in a column of integers as 1, so that JSON lines would be read "
                "wrongly: update polars, or write Parquet"
            )
        super().__init__(paths, (options or JsonOptions()).types)

    def joint(self, a: pl.DataType, b: pl.DataType) -> pl.DataType | None:
        return _whole(super().joint(a, b))

    def unite(self, of_files: Sequence[Mapping[str, pl.DataType]]) -> list[Mapping[str, pl.DataType]]:
        names = dict.fromkeys(n for types in of_files for n in types)
        return [{n: types.get(n, pl.Null()) for n in names} for types in of_files]

    def finish_types(self, types: dict[str, pl.DataType]) -> dict[str, pl.DataType]:
        if not types:
            raise DataError(f"{self.files[0]}: none of the first lines is a JSON object with keys")
        return super().finish_types(types)

    def infer(self, file: int, data: bytes, ends: Ends) -> Mapping[str, pl.DataType]:
        objects = [r for r in (record(data, ends, i) for i in range(len(ends))) if _fault(r) is None]
        if not objects:
            return dict(self.declared)
        lines = b"\n".join(objects)
        try:
            try:
                found = pl.read_ndjson(
                    io.BytesIO(lines), infer_schema_length=None, schema_overrides=self.declared or None
                )
            except pl.exceptions.PolarsError:
                # A value that does not fit the type that the options name is a bad row.
                found = pl.read_ndjson(io.BytesIO(lines), infer_schema_length=None)
        except pl.exceptions.PolarsError as e:
            raise DataError(
                f"{self.files[file]}: a column holds values of several types ({str(e).splitlines()[0]}); name its "
                'type, e.g. `types = { price = "string" }` under [source]'
            ) from e
        types = {name: _whole(found[name].dtype, found[name]) or pl.String() for name in found.columns}
        return {**{n: t for n, t in self.declared.items() if n not in types}, **types}

    def count_numbers(self, file: int, data: bytes, ends: Ends, columns: Sequence[str]) -> Mapping[str, NumberCount]:
        objects = [o for o in (_object(record(data, ends, i)) for i in range(len(ends))) if o is not None]
        return {name: _numbers([o.get(name) for o in objects]) for name in columns}

    def parse(
        self, file: int, data: bytes, ends: Ends, first: int, columns: Sequence[str]
    ) -> tuple[pl.DataFrame, list[BadRow]]:
        schema = {c: self.types[c] for c in columns}
        made = _read(data, schema)
        wrong = np.zeros(len(ends), bool)
        if made is not None and len(made) == len(ends):
            # Polars writes a list or an object down as the text of a column of texts.
            for i in _nested_texts(made, data, ends):
                wrong[i] = True
            if not wrong.any():
                return made, []
        else:
            for i in _misfits(data, ends, schema, 0, len(ends)):
                wrong[i] = True
        bad = [self._explain(file, first + i, record(data, ends, i), schema) for i in np.flatnonzero(wrong).tolist()]
        data, ends = without(data, ends, wrong)
        made = _read(data, schema) if len(ends) else pl.DataFrame(schema=schema)
        if made is None or len(made) != len(ends):
            raise DataError(f"{self.files[file]}: lines near {first + 1} cannot be read as JSON objects")
        return made, bad

    def _explain(self, file: int, row: int, line: bytes, schema: Mapping[str, pl.DataType]) -> BadRow:
        shown = line[: 4 * SHOWN].decode(errors="backslashreplace")[:SHOWN]
        why = _fault(line)
        if why is not None:
            return BadRow(file, row, "", why, shown)
        value = json.loads(line)
        for name, dtype in schema.items():
            if _read(line + b"\n", {name: dtype}) is None or _nested(value.get(name), dtype):
                if name in self.declared:
                    return BadRow(file, row, name, f"not {dtype}, as `types` says", str(value.get(name))[:SHOWN])
                if name in self.assumed:
                    return BadRow(file, row, name, f"not {dtype}, as the schema has it", str(value.get(name))[:SHOWN])
                cure = f'say what it is: `types = {{ "{name}" = "string" }}` under [source]'
                return BadRow(
                    file, row, name, f"not {dtype}, as in the rows before it; {cure}", str(value.get(name))[:SHOWN]
                )
        return BadRow(file, row, "", "cannot be read", shown)


def _whole(dtype: pl.DataType | None, values: pl.Series | None = None) -> pl.DataType | None:
    """Types that a table may have in place of those of JSON's larger integers."""
    if dtype == pl.Int128:
        fits = values is not None and values.cast(pl.UInt64, strict=False).null_count() == values.null_count()
        return TYPES["unsigned"] if fits else TYPES["string"]
    if isinstance(dtype, pl.List) and dtype.inner == pl.Int128:
        inner = _whole(pl.Int128(), None if values is None else values.explode())
        return None if inner is None else pl.List(inner)
    return dtype


def _read(data: bytes, schema: Mapping[str, pl.DataType]) -> pl.DataFrame | None:
    try:
        return pl.read_ndjson(io.BytesIO(data), schema=dict(schema))
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return None


def _misfits(data: bytes, ends: Ends, schema: Mapping[str, pl.DataType], low: int, high: int) -> list[int]:
    """Lines that are not objects of the schema's types, by halves."""
    start = int(ends[low - 1]) if low else 0
    made = _read(data[start : int(ends[high - 1])], schema)
    if made is not None and len(made) == high - low:
        return []
    if high - low == 1:
        return [low]
    middle = (low + high) // 2
    return _misfits(data, ends, schema, low, middle) + _misfits(data, ends, schema, middle, high)


def _nested_texts(frame: pl.DataFrame, data: bytes, ends: Ends) -> list[int]:
    """Lines that have a list or an object where texts are wanted."""
    texts = [pl.col(n) for n, t in frame.schema.items() if t == pl.String]
    lists = [pl.col(n) for n, t in frame.schema.items() if t == pl.List(pl.String)]
    if not texts and not lists:
        return []
    # What may be one; a text may begin so as well.
    found = [c.str.contains(_NESTED).fill_null(False) for c in texts]
    found += [c.list.eval(pl.element().str.contains(_NESTED)).list.any().fill_null(False) for c in lists]
    rows = frame.select(pl.any_horizontal(found)).to_series().arg_true().to_list()
    values = ((i, json.loads(record(data, ends, i))) for i in rows)
    return [i for i, value in values if any(_nested(value.get(n), t) for n, t in frame.schema.items())]


def _nested(value: Any, dtype: pl.DataType) -> bool:
    """Whether a value is a list or an object where a type has texts."""
    if dtype == pl.List(pl.String) and isinstance(value, list):
        return any(isinstance(v, list | dict) for v in value)
    return dtype == pl.String and isinstance(value, list | dict)


def _object(line: bytes) -> JSON | None:
    """A line as an object, or None."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _numbers(values: Sequence[Any]) -> NumberCount:
    """How many values of JSON are numbers, which texts such as ``"2"`` are not."""
    known = [v for v in values if v is not None]
    numbers = [v for v in known if isinstance(v, int | float) and not isinstance(v, bool)]
    other = next((str(v) for v in known if isinstance(v, str | bool)), None)
    return NumberCount(len(known), sum(isinstance(v, int) for v in numbers), len(numbers), other)


def _fault(line: bytes) -> str | None:
    """Why a line is no JSON object, or None."""
    try:
        value = json.loads(line)
    except ValueError as e:
        return f"no JSON ({e})"
    return None if isinstance(value, dict) else f"expected a JSON object; got {type(value).__name__}"
