"""Rows and columns of Python values as frames: every column has one type, whatever else is in the batch."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import chain, repeat
from numbers import Number
from typing import Any

import numpy as np
import polars as pl

from recsys_embed.data.columns.vocabulary import MAX_WHOLE, number_texts
from recsys_embed.errors import ConfigError, DataError, raise_faults

_LISTS = (list, tuple, np.ndarray, pl.Series)
_FLOATS = (float, np.floating)
_PLAIN_NUMBERS = (int, float, np.integer, np.floating)
WRAP = "give a list of rows, [row], or columns of equal length"


def frame_of_rows(rows: Iterable[Mapping[str, Any]], used: Collection[str] | None = None) -> pl.DataFrame:
    """A frame of rows by column; what a row lacks is null.

    Args:
        rows: by column.
        used: columns whose values matter; the others are null throughout.

    Raises:
        ConfigError: no rows by column.
        DataError: columns with values of several types, with the first row of each type.

    >>> frame_of_rows([{"user": "ann", "age": 3}, {"user": float("nan"), "age": 2.5}]).rows()
    [('ann', 3.0), (None, 2.5)]
    """
    try:
        given = [dict(row) for row in rows]
        names = list(dict.fromkeys(chain.from_iterable(given)))
        columns = {n: [row.get(n) for row in given] for n in names if used is None or n in used}
        known = _of_one_type(columns)
        # Rows, as of columns polars takes no integer beside a float.
        held = [dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True)]
        frame = pl.DataFrame(held or None, infer_schema_length=None)
        unused = [pl.Series(n, [None] * len(given)) for n in names if n not in known]
        return pl.DataFrame([*frame.get_columns(), *unused]).select(names)
    except (TypeError, ValueError, pl.exceptions.PolarsError) as e:
        if isinstance(e, DataError):
            raise
        raise ConfigError(f"the rows are no table ({str(e).splitlines()[0]}): give each column one type") from e


def frame_of_columns(columns: Mapping[str, Any]) -> pl.DataFrame:
    """A frame of columns by name.

    Raises:
        ConfigError: no table.
        DataError: as :func:`frame_of_rows`.
    """
    try:
        return pl.DataFrame({**columns, **_of_one_type({n: v for n, v in columns.items() if type(v) in (list, tuple)})})
    except (TypeError, ValueError, pl.exceptions.PolarsError) as e:
        if isinstance(e, DataError):
            raise
        raise ConfigError(f"the columns are no table ({e})") from e


def holds_numbers(values: Sequence[Any]) -> bool:
    """Whether some values, or values of lists, are numbers.

    >>> holds_numbers(["ann", None, 7]), holds_numbers([["a"], [1.5]]), holds_numbers(["ann", True])
    (True, True, False)
    """
    found = set(map(type, values))
    if any(issubclass(t, list | tuple) for t in found):
        found |= set(map(type, chain.from_iterable(v for v in values if isinstance(v, list | tuple))))
    return any(issubclass(t, _PLAIN_NUMBERS) and t is not bool for t in found)


def numbers_as_texts(values: Sequence[Any]) -> list[Any]:
    """Values with numbers as their decimals, in lists too.

    >>> numbers_as_texts(["ann", 7, 2.5, None]), numbers_as_texts([["a", 1], [2.0]])
    (['ann', '7', '2.5', None], [['a', '1'], ['2']])
    """
    return [[_as_text(x) for x in v] if isinstance(v, list | tuple) else _as_text(v) for v in values]


def _as_text(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, _PLAIN_NUMBERS):
        return value
    if isinstance(value, int | np.integer):
        return str(int(value))
    return number_texts(pl.Series([float(value)]))[0] if np.isfinite(value) else value


def refuse_one_row(columns: Mapping[str, Any], nested: Collection[str], used: Collection[str]) -> None:
    """Refuse one row where columns are wanted: a dictionary is columns, and nothing tells the two apart for sure.

    Args:
        columns: of lists of equal length.
        nested: columns whose every value is a list.
        used: columns that are read.

    Raises:
        ConfigError: it is, or could be, one row.
    """
    lengths = {name: _length(values) for name, values in columns.items()}
    odd = next((n for n, found in lengths.items() if found is None), None)
    if odd is not None:
        raise ConfigError(f"`rows` is a dict whose {odd!r} is {_told(columns[odd])}, no column: {WRAP}")
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"`rows` is a dict with lists of {lengths} values: {WRAP}")
    for name in nested:
        values = columns.get(name)
        if isinstance(values, list | tuple) and any(v is not None and not isinstance(v, _LISTS) for v in values):
            raise ConfigError(f"`rows` is a dict whose {name!r} has one list, where each row has its own: {WRAP}")
    read = [n for n in used if n in columns]
    if read and not any(lengths.values()) and all(n in nested for n in read):
        raise ConfigError(f"`rows` is a dict of empty lists, which may be one row or none: {WRAP}")


def _length(values: Any) -> int | None:
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        return None
    try:
        return len(values)
    except TypeError:  # an array of no dimension
        return None


def _of_one_type(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Columns whose values are of one type each; NaN is null where a column holds no floats."""
    faults: list[str] = []
    found = {}
    for name, values in columns.items():
        found[name], fault = _checked(values)
        if fault:
            faults.append(f"column {name!r}: {fault}")
    raise_faults(faults, "a column takes values of one type", DataError)
    return found


def _checked(values: Sequence[Any]) -> tuple[list[Any], str | None]:
    """Values, and which rows hold values of several types, if any do."""
    held = list(values)
    if any(issubclass(t, _FLOATS) for t in set(map(type, held))):
        known = {type(v) for v in held if not _is_nan(v)}
        if not any(issubclass(t, _FLOATS) for t in known):
            held = [None if _is_nan(v) else v for v in held]
        else:
            lost = next((r for r, v in enumerate(held) if _is_wide(v)), None)
            if lost is not None:
                return (
                    held,
                    f"row {lost + 1} has the integer {held[lost]}, which no float holds, and others have floats",
                )
    fault = _mixed(held, range(len(held)))
    if fault is None and any(isinstance(v, list | tuple) for v in held):
        lists = [v if isinstance(v, list | tuple) else () for v in held]
        owners = chain.from_iterable(repeat(row, len(v)) for row, v in enumerate(lists))
        fault = _mixed(list(chain.from_iterable(lists)), owners)
    return held, fault


def _mixed(values: Sequence[Any], rows: Iterable[int]) -> str | None:
    """The first rows of each kind of value, where there are several."""
    kinds = {_kind_of_type(t) for t in set(map(type, values))} - {None}
    if len(kinds) < 2 and kinds != {"time"}:
        return None
    first: dict[str, tuple[int, Any]] = {}
    for row, value in zip(rows, values, strict=True):
        # The missing time of pandas is a datetime of no zone that does not equal itself.
        if value is not None and not (isinstance(value, dt.datetime) and value != value):
            first.setdefault(_kind(value), (row, value))
    if len(first) < 2:
        return None
    return " and ".join(f"row {row + 1} has the {_told(value)}" for row, value in first.values())


def _is_nan(value: Any) -> bool:
    return isinstance(value, _FLOATS) and value != value


def _is_wide(value: Any) -> bool:
    """Whether a value is an integer that a float may not hold."""
    return isinstance(value, int | np.integer) and abs(int(value)) > MAX_WHOLE


def _kind(value: Any) -> str:
    kind = _kind_of_type(type(value)) or "nothing"
    return f"{kind} with a zone" if isinstance(value, dt.datetime) and value.tzinfo is not None else kind


def _kind_of_type(cls: type) -> str | None:
    if cls is type(None):
        return None
    for kind, classes in _KINDS.items():
        if issubclass(cls, classes):
            return kind
    return cls.__name__


_KINDS: dict[str, Any] = {
    "boolean": (bool, np.bool_),
    "number": (int, float, np.integer, np.floating, Decimal, Number),
    "text": str,
    "time": dt.datetime,
    "date": dt.date,
    "list": _LISTS,
}


def _told(value: Any) -> str:
    return "None" if value is None else f"{_kind(value)} {value!r:.60}"
