"""Which rows of a table train, validate and test: by Criteo's rules, by time, by a column, or the last per user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.splits import SPLITS, TEST, TRAIN, VALID, SplitName, SplitRule, fraction, rule_faults
from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.utils.settings import Settings, fault, param
from recsys_embed.utils.types import JSON, JSONMapping

TableSplitKind = Literal["order", "random", "file", "all", "time", "column", "last"]
OUT = -1
"""Code of a row that is in no split."""
_BINS = 1 << 16
_KINDS_OF: Mapping[str, tuple[TableSplitKind, ...]] = {
    "valid": ("order", "random", "time"),
    "test": ("order", "random", "time"),
    "seed": ("random",),
    "only": ("all",),
}


@dataclass(frozen=True)
class TableSplit(Settings):
    """How rows of a table are assigned to splits.

    Args:
        kind: ``"order"``, ``"random"``, ``"file"`` and ``"all"`` as :class:`recsys_embed.data.SplitRule` has them;
            ``"time"``: the latest rows test, those before them validate, and rows of one time are in one split;
            ``"column"``: a column says it; ``"last"``: of each user the last row tests and the one before it validates
            (leave-one-out), all others train, as do all rows of users that have fewer than three.
        valid, test: shares of rows, for order, random and time.
        seed: of the random split.
        valid_files, test_files: glob patterns on a file's name or path.
        only: the split of kind ``"all"``.
        column: of the table: the split's names (column), or the user (last).
        values: for column: by name of a split, the values that mean it; by default its own name.
        valid_from, test_from: for time, in place of shares: ISO 8601 dates or times in UTC at which these begin.

    >>> TableSplit("time", test=Fraction(1, 5)).to_dict()
    {'kind': 'time', 'test': '1/5'}
    """

    title = "split"
    kind: TableSplitKind = "order"
    valid: Fraction | float = param(Fraction(1, 10), low=0, below=1)
    test: Fraction | float = param(Fraction(1, 6), low=0, below=1)
    seed: int = 0
    valid_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    only: SplitName = "test"
    column: str | None = param(None)
    values: JSONMapping | None = None
    valid_from: str | None = param(None)
    test_from: str | None = param(None)

    def conflicts(self) -> list[str]:
        faults = []
        if self.kind in ("column", "last") and self.column is None:
            what = "the user" if self.kind == "last" else "the splits"
            faults.append(f"split {self.kind!r} needs `column`, the table's column of {what}")
        if self.column is not None and self.kind not in ("column", "last"):
            faults.append(f"`column` is of the splits 'column' and 'last'; got split {self.kind!r}")
        if self.values is not None and self.kind != "column":
            faults.append("`values` needs split 'column'")
        if self.values is not None:
            faults += [f"`values` must be by {', '.join(SPLITS)}; got {k!r}" for k in self.values if k not in SPLITS]
            faults += self._value_faults()
        for name in ("valid_from", "test_from"):
            text = getattr(self, name)
            if text is not None and self.kind != "time":
                faults.append(f"`{name}` needs split 'time'")
            elif text is not None and _seconds(text) is None:
                faults.append(f"`{name}` must be a date or time such as 2024-03-01; got {text!r}")
        if not faults and self.valid_from and self.test_from and _later(self.valid_from, self.test_from):
            faults.append(f"`valid_from` must not be after `test_from`; got {self.valid_from}, {self.test_from}")
        return faults + rule_faults(self, shares=self.kind in ("order", "random", "time"))

    def _value_faults(self) -> list[str]:
        """Values that are none of a column, and those that would mean two splits."""
        faults, seen = [], dict[str, str]()
        for name, given in (self.values or {}).items():
            for value in given if isinstance(given, list | tuple) else [given]:
                if not isinstance(value, str | int | float | date):
                    faults.append(f"`values` of {name} must be texts, numbers or dates; got {value!r:.80}")
                elif seen.setdefault(str(value), name) != name:
                    faults.append(f"`values` has {value!r:.80} in {seen[str(value)]} and {name}; it can mean one")
        return faults

    @classmethod
    def from_dict(cls, data: JSONMapping) -> Self:
        """Build from plain values; shares may be texts such as ``"1/6"``, dates those of TOML."""
        if not isinstance(data, Mapping):
            raise ConfigError(fault(cls.title, 'settings by name, such as `kind = "time"` under [split]', data))
        values, faults = dict(data), []
        for name in ("valid", "test"):
            if name in values and isinstance(values[name], str | float | int):
                try:
                    values[name] = fraction(values[name], name)
                except ConfigError as e:
                    faults.append(str(e))
                    del values[name]
        for name in ("valid_from", "test_from"):
            if hasattr(values.get(name), "isoformat"):
                values[name] = values[name].isoformat()
        kind = str(values.get("kind", cls.kind))
        faults += [
            f"`{name}` is of split {' and '.join(map(repr, kinds))}; got split {kind!r}"
            for name, kinds in _KINDS_OF.items()
            if name in values and kind in get_args(TableSplitKind) and kind not in kinds
        ]
        faults += [
            f"`{name}` is a share of rows, `valid_from` and `test_from` are dates in place of shares; give one of them"
            for name in ("valid", "test")
            if name in values and ("valid_from" in values or "test_from" in values)
        ]
        raise_faults(faults, cls.title)
        return super().from_dict(values)

    def to_dict(self) -> JSON:
        found: JSON = {"kind": self.kind}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "kind" and value != f.default:
                plain = str(value) if isinstance(value, Fraction | float) else value
                found[f.name] = list(plain) if isinstance(plain, tuple) else plain
        return found

    @property
    def columns(self) -> list[str]:
        """Columns of the table that it reads, besides the event time."""
        return [] if self.column is None else [self.column]

    @property
    def wanted(self) -> list[str]:
        """Splits that should have rows."""
        if self.kind == "last":
            return [*SPLITS]
        by_date = self.valid_from is not None or self.test_from is not None
        held = {"valid": self.valid_from if by_date else self.valid, "test": self.test_from if by_date else self.test}
        return [name for name, given in held.items() if given and self.kind in ("order", "random", "time")]

    @property
    def needs_time(self) -> bool:
        """Whether it goes by the event time."""
        return self.kind == "time"

    @property
    def rule(self) -> SplitRule | None:
        """The rule of rows' numbers that it is, or None."""
        if self.kind == "time" or self.kind == "column" or self.kind == "last":
            return None
        return SplitRule(
            self.kind, self.valid, self.test, self.seed, self.valid_files, self.test_files, self.only
        )  # fmt: skip

    def column_codes(self, values: pl.Series) -> NDArray[np.int8]:
        """Codes of the values of the split's column; ``OUT`` for those that mean no split."""
        meant = self.values or {name: name for name in SPLITS}
        number = values.dtype.is_numeric() and not values.dtype.is_integer()
        table = {
            _as_number(v) if number else str(v): SPLITS.index(name)
            for name, given in meant.items()
            for v in (given if isinstance(given, list | tuple) else [given])
        }
        # The text of a whole number in a column of floats is 1.0.
        text = (values.cast(pl.Float64) if number else values).cast(pl.String)
        if values.dtype == pl.Boolean:
            table = {k.lower(): v for k, v in table.items()}
        codes = text.replace_strict(table, default=OUT, return_dtype=pl.Int8).fill_null(OUT)
        found: NDArray[np.int8] = codes.to_numpy()
        return found


def _as_number(value: Any) -> str:
    try:
        return str(pl.Series([float(value)]).cast(pl.String)[0])
    except ValueError:
        return str(value)


def _later(a: str, b: str) -> bool:
    first, second = _seconds(a), _seconds(b)
    return first is not None and second is not None and first > second


def _seconds(text: str) -> int | None:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return int((when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp())  # noqa: UP017


@dataclass(frozen=True)
class TimeBounds:
    """First seconds of validation and test.

    >>> TimeBounds(10, 20).codes(np.array([5, 10, 25])).tolist()
    [0, 1, 2]
    """

    valid: int
    test: int

    def codes(self, seconds: NDArray[np.int64]) -> NDArray[np.int8]:
        """Codes of rows by their time."""
        return (seconds >= self.valid).astype(np.int8) + (seconds >= self.test)


def time_bounds(split: TableSplit, chunks: Sequence[Path], total: int) -> TimeBounds:
    """The bounds that give test and validation at least their shares of the rows.

    Args:
        split: of kind ``"time"``.
        chunks: files of int64 seconds, all rows together.
        total: rows.
    """
    end = 1 << 62
    if split.test_from is not None or split.valid_from is not None:
        test = end if split.test_from is None else (_seconds(split.test_from) or 0)
        valid = test if split.valid_from is None else (_seconds(split.valid_from) or 0)
        return TimeBounds(valid, test)

    def ranked(share: Fraction | float) -> int:
        rows = int(share * total + Fraction(1, 2))
        return end if rows == 0 else nth_smallest(lambda: (np.fromfile(p, np.int64) for p in chunks), total - rows)

    test = ranked(split.test)
    both = ranked(split.test + split.valid) if split.valid else test
    return TimeBounds(min(both, test), test)


def nth_smallest(chunks: Any, n: int) -> int:
    """The value at place ``n`` (from 0) of the sorted values of some arrays, in memory for one of them.

    >>> nth_smallest(lambda: [np.array([5, 1, 9]), np.array([7, -3])], 2)
    5
    """
    low = min(int(c.min()) for c in chunks() if len(c))
    high = max(int(c.max()) for c in chunks() if len(c))
    while low < high:
        width = (high - low) // _BINS + 1
        counts = np.zeros(_BINS + 1, np.int64)
        for c in chunks():
            inside = c[(c >= low) & (c <= high)]
            counts += np.bincount((inside - low) // width, minlength=_BINS + 1)
        upto = np.cumsum(counts)
        bin_ = int(np.searchsorted(upto, n, side="right"))
        n -= int(upto[bin_ - 1]) if bin_ else 0
        low, high = low + bin_ * width, min(high, low + (bin_ + 1) * width - 1)
    return low


def last_codes(
    parts: Iterable[tuple[pl.Series, NDArray[np.int64] | None, int]], max_users: int
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Rows that do not train under leave-one-out, and their codes.

    Args:
        parts: users, times (None: the order of the rows) and the number of the first row, part by part.
        max_users: users that memory has room for.

    Raises:
        ConfigError: there are more users.

    >>> rows, codes = last_codes([(pl.Series(["a", "a", "b", "a"]), None, 0)], 10)
    >>> sorted(zip(rows.tolist(), codes.tolist()))
    [(1, 1), (3, 2)]
    """
    held: pl.DataFrame | None = None
    for users, times, first in parts:
        rows = np.arange(first, first + len(users))
        frame = pl.DataFrame({"user": users, "time": rows if times is None else times, "row": rows}).drop_nulls("user")
        held = _last_three(frame if held is None else pl.concat([held, frame]))
        if len(held) > 3 * max_users:
            raise ConfigError(
                f"split 'last' met more than {max_users:,} users, all that --max-memory has room for; raise it"
            )
    if held is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int8)
    place = pl.int_range(pl.len(), dtype=pl.Int64).reverse().over("user")
    ordered = held.sort("time", "row").with_columns(place.alias("place"), pl.len().over("user").alias("rows"))
    kept = ordered.filter((pl.col("rows") >= 3) & (pl.col("place") < 2))
    return kept["row"].to_numpy(), np.where(kept["place"].to_numpy() == 0, np.int8(TEST), np.int8(VALID))


def _last_three(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.sort("time", "row").group_by("user", maintain_order=True).tail(3)


def check_codes(counts: Mapping[int, int], split: TableSplit, only_train: bool = True) -> None:
    """Refuse a split that leaves nothing to train on.

    Raises:
        DataError: says what the split gave.
    """
    if only_train and not counts.get(TRAIN):
        got = ", ".join(f"{SPLITS[c]} {n}" for c, n in sorted(counts.items()) if n)
        raise DataError(f"split {split.kind!r} leaves no rows to train on; it gave {got or 'no rows'}")
