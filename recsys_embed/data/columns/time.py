"""Times: numeric parts such as the hour, and the seconds that splits go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, Self

import polars as pl

from recsys_embed.data.columns.base import (
    Encoded,
    Encoder,
    Fault,
    LearnedColumn,
    Limits,
    Vocabularies,
    cast_faults,
    read_saved,
)
from recsys_embed.data.columns.numeric import Moments
from recsys_embed.utils.settings import FilePart, fault, param
from recsys_embed.utils.types import JSON

Part = Literal["hour", "weekday", "day", "month", "age"]
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_DAY = 86_400
_FIRST, _LAST = -62_135_596_800, 253_402_300_799
"""Seconds of the years 1 to 9999; a number beyond them is of another unit."""


@dataclass(frozen=True)
class Time(LearnedColumn):
    """A point in time per row.

    Null gets the training rows' mean in every part. In the table's event time, which splits and metrics go by and which
    stands in the folder as ``time`` (seconds since 1970, UTC), null is a fault; so is text that is no time.

    Args:
        name: of the parts: ``NAME_hour`` and so on.
        column: of the table; by default ``name``.
        parts: ``"hour"`` (0 to 24, with its fraction), ``"weekday"`` (1 is Monday), ``"day"`` (of the month),
            ``"month"``, and ``"age"`` (days before the latest time of training; negative after it).
        unit: of numbers: seconds, milli-, micro- or nanoseconds since 1970.
        format: of text, as ``strftime`` has it; None: ISO 8601.
        time_zone: in which the parts are read, e.g. ``"Europe/Berlin"``.
        event: whether it is the table's event time; by default the first time column is.

    >>> Time("ts", parts=("hour",)).entry()
    {'name': 'ts', 'kind': 'time', 'parts': ['hour']}
    """

    kind: ClassVar[str] = "time"
    parts: tuple[Part, ...] = param(("hour", "weekday"), empty=True)
    unit: Literal["s", "ms", "us", "ns"] = "s"
    format: str | None = param(None)
    time_zone: str = "UTC"
    event: bool | None = param(None)

    def conflicts(self) -> list[str]:
        try:
            pl.Series([0]).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(self.time_zone)
        except (pl.exceptions.PolarsError, ValueError) as e:
            why = str(e).split("\n", 1)[0]
            return [f"`time_zone` must be an IANA name, e.g. Europe/Berlin; got {self.time_zone!r} ({why})"]
        twice = [p for p in dict.fromkeys(self.parts) if self.parts.count(p) > 1]
        return [f"`parts` names {', '.join(twice)} more than once"] if twice else []

    @property
    def learns(self) -> str:
        return f"time:{self.name}"

    @property
    def part(self) -> str | None:
        return "time" if self.event else None

    def refuse(self, dtype: pl.DataType) -> str | None:
        texts = (pl.String, pl.Categorical, pl.Enum)
        if dtype.is_numeric() or dtype in (pl.Date, pl.Null, *texts) or isinstance(dtype, pl.Datetime):
            return None
        return f"times are dates, datetimes, numbers since 1970 or text; got {dtype}"

    def checks(self, dtype: pl.DataType) -> bool:
        return bool(self.event) or not (isinstance(dtype, pl.Datetime) or dtype in (pl.Date, pl.Null))

    def faults(self, values: pl.Series) -> list[Fault]:
        found = cast_faults(values, values.is_null(), "the event time is missing") if self.event else []
        wrong = self.seconds(values).is_null() & values.is_not_null()
        if values.dtype.is_numeric():
            why = f" in {self.unit} since 1970, in the years 1 to 9999; name its `unit`"
        else:
            why = (
                f" of format {self.format}"
                if self.format
                else " as ISO 8601 has it, such as 2026-01-31 23:59:00; a schema's `format` names another way"
            )
        return found + cast_faults(values, wrong, f"no time{why}")

    def seconds(self, values: pl.Series) -> pl.Series:
        """Seconds since 1970, Int64; null where there is no time."""
        if values.dtype in (pl.String, pl.Categorical, pl.Enum):
            text = values.cast(pl.String).str.strip_chars()
            values = _parsed(text, self.format)
        if isinstance(values.dtype, pl.Datetime) or values.dtype == pl.Date:
            return values.dt.epoch("s").cast(pl.Int64)
        if values.dtype == pl.Null:
            return values.cast(pl.Int64)
        per = _PER_SECOND[self.unit]
        if values.dtype.is_integer():
            whole = values.cast(pl.Int64, strict=False)
            whole = whole if per == 1 else whole // per
        else:
            whole = (values.cast(pl.Float64).fill_nan(None) / per).floor().cast(pl.Int64, strict=False)
        beyond = (whole < _FIRST) | (whole > _LAST)
        return whole.set(beyond.fill_null(False), None) if beyond.any() else whole

    def learner(self, dtypes: Sequence[pl.DataType], limits: Limits) -> TimeLearner:
        return TimeLearner(self)

    def part_values(self, seconds: pl.Series, latest: int) -> dict[str, pl.Series]:
        """Float64 of each part, null where there is no time."""
        when = (seconds * 1_000_000).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(self.time_zone)
        found: dict[str, pl.Series] = {}
        for part in self.parts:
            if part == "hour":
                x = when.dt.hour().cast(pl.Float64) + when.dt.minute() / 60.0 + when.dt.second() / 3600.0
            elif part == "age":
                x = (latest - seconds).cast(pl.Float64) / _DAY
            else:
                x = getattr(when.dt, part)().cast(pl.Float64)
            found[part] = x
        return found


def _parsed(text: pl.Series, form: str | None) -> pl.Series:
    if form is None:
        # One format per way of writing ISO 8601; a row takes the first that reads it.
        forms = ("%+", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f%:z")
        found = pl.Series([None] * len(text), dtype=pl.Datetime("us"))
        for each in forms:
            if found.null_count() == text.null_count():
                return found
            found = found.zip_with(
                found.is_not_null(), _in_utc(text.str.to_datetime(each, time_unit="us", strict=False))
            )
        days = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
        return found.zip_with(found.is_not_null(), days)
    if "%H" in form and "%M" not in form:
        # Polars reads no hour without a minute.
        text, form = text + " 00", form + " %M"
    try:
        return _in_utc(text.str.to_datetime(form, time_unit="us", strict=False))
    except pl.exceptions.PolarsError:
        return text.str.to_date(form, strict=False).cast(pl.Datetime("us"))


def _in_utc(when: pl.Series) -> pl.Series:
    if isinstance(when.dtype, pl.Datetime) and when.dtype.time_zone is not None:
        return when.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return when


class TimeLearner:
    """The latest time of training, and the means of the parts."""

    def __init__(self, column: Time) -> None:
        self.latest: int | None = None
        self.missing = 0
        self.moments = {str(part): Moments() for part in column.parts}

    def add(self, column: LearnedColumn, values: pl.Series) -> None:
        if not isinstance(column, Time):
            raise TypeError(f"{column.name} is no time")
        seconds = column.seconds(values).drop_nulls()
        self.missing += len(values) - len(seconds)
        if not len(seconds):
            return
        newest: Any = seconds.max()
        self.latest = newest if self.latest is None else max(self.latest, newest)
        for part, x in column.part_values(seconds, 0).items():
            self.moments[part].add(x.to_numpy())

    def result(self, column: LearnedColumn) -> TimeEncoder:
        latest = self.latest or 0
        means = {part: moments.finish()[0] for part, moments in self.moments.items()}
        if "age" in means:
            means["age"] += latest / _DAY
        return TimeEncoder(column, latest, means, self.missing)


@dataclass(frozen=True)
class SavedTime(FilePart):
    """What a time learned, see :class:`TimeEncoder`."""

    means: Mapping[str, float]
    missing: int
    latest: int = param(MISSING, low=-(1 << 40), high=1 << 40)

    def conflicts(self) -> list[str]:
        wrong = [v for v in self.means.values() if not isinstance(v, int | float)]
        return [fault("means", "numbers by part", wrong[0])] if wrong else []


@dataclass(frozen=True)
class TimeEncoder(Encoder):
    """A time to its parts, and to the folder's ``time`` if it is the event time.

    Args:
        latest: latest time of training, in seconds since 1970.
        means: what a missing time has, by part.
        missing: training rows without a time.
    """

    saved = SavedTime
    latest: int
    means: dict[str, float]
    missing: int

    @property
    def dense(self) -> tuple[str, ...]:
        column: Any = self.column
        return tuple(f"{column.name}_{part}" for part in column.parts)

    def encode(self, values: pl.Series) -> Encoded:
        column: Any = self.column
        seconds = column.seconds(values)
        found = {}
        for part, x in column.part_values(seconds, self.latest).items():
            name = f"{column.name}_{part}"
            found[name] = x.fill_null(self.means[part]).cast(pl.Float32).alias(name)
        if column.event:
            found["time"] = seconds.alias("time")
        return Encoded(found, {"null": values.null_count()})

    def learned(self) -> JSON:
        return {"latest": self.latest, "means": dict(self.means), "missing": self.missing}

    @classmethod
    def restore(cls, column: Any, learned: Mapping[str, Any], vocabularies: Vocabularies) -> Self:
        return cls(column, **read_saved(SavedTime, learned, column.where()))
