"""What a column of a table is, guessed from a sample of its values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from recsys_embed.data.columns.label import WORDS
from recsys_embed.data.columns.vocabulary import MAX_WHOLE, value_type
from recsys_embed.data.sources.values import NumberCount, infer_type, read_values
from recsys_embed.data.table.time_formats import time_formats

NULL_WORDS = ("NULL", "null", "NA", "N/A", "\\N", "None", "none", "-", "?", "nan", "NaN")
"""Texts that stand for a missing value in many tables."""
_LABELS = ("label", "click", "clicked", "is_click", "clk", "target", "y", "conversion", "converted", "is_clicked",
           "purchase", "purchased", "like", "liked", "is_attributed", "rating", "overall", "stars")  # fmt: skip
"""Names of labels, the likeliest first."""
_HISTORY = re.compile(r"hist|last|recent|seq|past|prev|viewed|clicked|watched|bought|session", re.I)
_TIME = re.compile(r"(^|_)(ts|t|date|day|dt|at|when|hour)(_|$)|time|stamp", re.I)
_WEIGHT = re.compile(r"^(sample_?)?weights?$", re.I)
_GROUP = re.compile(r"^(qid|query_?id|search_?id|session_?id|group|group_?id)$", re.I)
_ID = re.compile(r"(^|_)(id|uid|iid|code|zip|ip|cat|category|type|kind|brand|user|item|movie|ad|site|app|device|country"
                 r"|city|gender|field|bin)s?(_|$)|id$", re.I)  # fmt: skip
_ROW_ID = re.compile(r"^(id|index|row|row_?(id|number|nr)|event_?id|impression_?id|uuid|guid)$|^(unnamed.*|)$", re.I)
_AMOUNT = re.compile(r"price|count|num|age|amount|score|len|size|duration|depth|position|rank|days|hours|qty|quantity"
                     r"|total|dwell|tempo|bpm|sum|avg|mean|rate|ratio|year", re.I)  # fmt: skip
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_FROM, _TO = 631_152_000, 4_102_444_800
"""1990 and 2100."""
MOST = 0.95
"""Share of a column's values from which the others are taken for faults."""
_FEW = 100
"""Rows below which nothing is said about how often values repeat."""


@dataclass
class Guess:
    """What a column seems to be.

    Args:
        name: of the table's column.
        entry: of the schema; None: nothing.
        facts: cardinality, missing share, examples.
        remarks: what a person should look at.
        left_out: whether the entry is written as a comment.
        nulls: texts of the column that stand for a missing value.
        type: of text that is to be read as numbers, as ``types`` of the reader has it.
    """

    name: str
    entry: dict[str, Any] | None
    facts: str
    remarks: list[str] = field(default_factory=list)
    left_out: bool = False
    nulls: tuple[str, ...] = ()
    type: str | None = None

    @property
    def kind(self) -> str | None:
        """The kind of the entry."""
        return None if self.entry is None else self.entry["kind"]


def guess_column(values: pl.Series) -> Guess:
    """What a column is, by its name, its type and its values; the label is chosen later, among all columns."""
    made = Guess(values.name, None, _facts(values))
    known = values.drop_nulls()
    dtype = values.dtype
    if not len(known):
        made.remarks.append("every value is missing")
        return made
    if isinstance(dtype, pl.List | pl.Array):
        _guess_list(made, known)
    elif dtype == pl.Boolean:
        made.entry = {"kind": "categorical"}
    elif dtype == pl.Date or isinstance(dtype, pl.Datetime):
        made.entry = {"kind": "time"}
    elif dtype in (pl.String, pl.Categorical, pl.Enum):
        _guess_text(made, known.cast(pl.String))
    elif dtype.is_integer() and value_type(dtype) is not None:
        _guess_integer(made, known)
    elif dtype.is_float() or dtype.is_decimal():
        _guess_float(made, known)
    else:
        made.remarks.append(f"no kind of column takes {dtype}; take its parts into columns of their own")
        return made
    _repeats(made, known)
    return made


def guess_numbers(text: pl.Series, count: NumberCount, decimal: str = ".") -> tuple[Guess, pl.Series]:
    """What a column of text is that holds numbers but for a few values, and its values: numbers if it is one of them.

    Args:
        text: a sample.
        count: how many of its values are numbers, of those that stand for none.
        decimal: what stands before the fraction of a number.
    """
    whole = count.whole == count.number
    numbers, _ = read_values(text, pl.Int64() if whole else pl.Float64(), decimal, told=True)
    made = guess_column(numbers)
    said = f"{_percent(count.share)} of the values are numbers; others, e.g. {_short(count.other)}, are "
    words = json.dumps(count.other, ensure_ascii=False)
    label = label_entry(numbers)
    if made.kind not in ("numeric", "weight", "time") and (label is None or not _named_label(text.name)):
        made = guess_column(text)
        made.remarks.append(f"{said}categories of their own")
        return made, text
    made.facts = _facts(text)
    made.type = "integer" if whole and made.kind == "time" else "float"
    made.nulls = _null_words(text.drop_nulls()) if made.kind == "numeric" else ()
    made.remarks.append(
        f"{said}bad rows, which --on-bad-row quarantine sets aside; if they stand for a missing value, add them to "
        f"[source]: nulls = [{words}]"
    )
    return made, numbers


def without_null_words(text: pl.Series) -> pl.Series:
    """Texts but those that stand for a missing value."""
    return text.filter(~text.is_in(list(NULL_WORDS)))


def _null_words(known: pl.Series) -> tuple[str, ...]:
    return tuple(sorted(set(known.filter(known.is_in(list(NULL_WORDS))).to_list())))


def _percent(share: float) -> str:
    """A share below one, never rounded to all."""
    return f"{min(99.99, 100 * share):.2f} %"


def _facts(values: pl.Series) -> str:
    known = values.drop_nulls()
    missing = 100.0 * (len(values) - len(known)) / max(1, len(values))
    if values.dtype.is_nested():
        shown = known.head(2).to_list()
        distinct = ""
    else:
        shown = known.unique(maintain_order=True).head(3).to_list()
        distinct = f"{known.n_unique():,} distinct, "
    examples = ", ".join(_short(v) for v in shown)
    return f"{distinct}{missing:.1f} % missing" + (f"; e.g. {examples}" if shown else "")


def _short(value: Any) -> str:
    text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:37] + "..."


def _repeats(made: Guess, known: pl.Series) -> None:
    if known.dtype.is_nested() or made.kind in (None, "time", "weight"):
        return
    distinct = known.n_unique()
    if distinct == 1:
        made.remarks.append("constant: one value in all of the sample")
    if made.kind in ("categorical", "group") and len(known) >= _FEW and distinct == len(known):
        made.remarks.append("looks like an id: no value occurs twice, so that nothing can be learned of one")
        made.left_out |= bool(_ROW_ID.search(made.name))
    elif made.kind == "categorical" and len(known) >= _FEW and distinct > len(known) / 2:
        made.remarks.append(
            f"looks like an id: {distinct:,} distinct values in {len(known):,} rows, most of them too rare to be "
            "learned; `min_count` makes these one"
        )


def _guess_list(made: Guess, known: pl.Series) -> None:
    lists = known.arr.to_list() if isinstance(known.dtype, pl.Array) else known
    inner = lists.dtype.inner  # type: ignore[attr-defined]
    lengths = lists.list.len().to_numpy()
    if inner.is_float() and lengths.min() == lengths.max() and int(lengths[0]) > 1:
        made.entry = {"kind": "vector", "width": int(lengths[0])}
    elif inner.is_nested():
        made.remarks.append("lists of lists have no kind; flatten them")
    else:
        made.entry = {"kind": "sequence" if _HISTORY.search(made.name) else "list"}
        made.facts += f"; {lengths.mean():.1f} values per row, at most {lengths.max()}"


def _guess_text(made: Guess, known: pl.Series) -> None:
    bare = known.filter(~known.is_in(list(NULL_WORDS)) & (known.str.len_bytes() > 0))
    times = _times(bare)
    share = int(times.sum()) / max(1, len(bare))
    if share >= MOST:
        made.entry = {"kind": "time"}
        if share < 1:
            other = _short(bare.filter(~times)[0])
            made.remarks.append(
                f"{_percent(share)} of the values are times; others, e.g. {other}, are bad rows, which --on-bad-row "
                "quarantine sets aside"
            )
        return
    forms = time_formats(bare)
    if forms:
        made.entry = {"kind": "time", "format": forms[0]}
        made.remarks.append(f"times as {' or '.join(forms)}" + (": choose the `format`" if len(forms) > 1 else ""))
        return
    inferred = infer_type(bare)
    if inferred.is_numeric() and len(bare) < len(known):
        made.nulls = _null_words(known)
    if inferred.is_numeric():
        words = ", ".join(map(repr, made.nulls))
        made.remarks.append(f"text that holds numbers{f' and {words} for a missing value' if made.nulls else ''}")
        made.entry = {"kind": "categorical"}
        return
    if known.str.contains(r"^0[0-9]+$").any() and known.str.contains(r"^[0-9]+$").all():
        made.remarks.append("numbers that begin with 0 are kept as text")
    if known.str.contains(r"^'.*'$").mean() >= MOST:  # type: ignore[operator]
        made.remarks.append(
            'every value stands in single quotes; if these are not part of it, say so to the reader: quote = "\'"'
        )
    if bare.str.contains(r"^-?[0-9]+(,[0-9]+)?$").all() and bare.str.contains(",", literal=True).any():
        made.remarks.append('if these are numbers with a decimal comma, say so to the reader: decimal = ","')
    separator = _separator(known)
    if separator is not None:
        pieces = known.str.split(separator).explode().str.strip_chars()
        entry = {"kind": "sequence" if _HISTORY.search(made.name) else "list", "separator": separator}
        made.entry = {**entry, "values": "integer"} if infer_type(pieces) == pl.Int64 else entry
        made.remarks.append(f"looks like values separated by {separator!r}")
        return
    if found := _null_words(known):
        shown = json.dumps(found, ensure_ascii=False)
        made.remarks.append(
            f"has {shown} as values; where these are missing ones, name them to the reader: nulls = {shown}"
        )
    blanks = known.head(1000).str.count_matches(r"\s+").to_numpy()
    if blanks.mean() > 4 and known.n_unique() > len(known) / 10:
        made.remarks.append("looks like free text, whose n-grams are no features yet; as a category each text is one")
        made.left_out = True
    made.entry = {"kind": "categorical"}


def _times(known: pl.Series) -> pl.Series:
    """Which texts are times as ISO 8601 has them."""
    from recsys_embed.data.columns import Time

    written = known.str.contains(r"^\s*\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?\s*$")
    if not len(known) or written.mean() < MOST:  # type: ignore[operator]
        return pl.Series([False] * len(known), dtype=pl.Boolean)
    return written & Time(known.name or "time").seconds(known).is_not_null()


def _separator(known: pl.Series) -> str | None:
    """What separates the values of a delimited list, whose pieces occur again and again."""
    for separator, allowed in (("|", r".*"), (";", r".*"), (",", r"^\S*$"), (" ", r"^[0-9]+( [0-9]+)*$")):
        with_it = known.str.contains(separator, literal=True).to_numpy()
        if with_it.mean() < 0.2 or not known.str.contains(allowed).all():
            continue
        pieces = known.str.split(separator).explode().str.strip_chars()
        if pieces.n_unique() < max(2, 0.5 * len(pieces)):
            return separator
    return None


def _guess_integer(made: Guess, known: pl.Series) -> None:
    whole = known.to_numpy()
    low, high, distinct = int(whole.min()), int(whole.max()), known.n_unique()
    if _TIME.search(_plain(made.name)):
        unit = next((u for u, per in _UNITS.items() if _FROM * per <= low and high <= _TO * per), None)
        if unit is not None:
            made.entry = {"kind": "time"} if unit == "s" else {"kind": "time", "unit": unit}
            made.remarks += [] if unit == "s" else [f"timestamp in {unit}"]
            return
        if low > 19_000_000 and high < 21_001_232:
            made.remarks.append("looks like dates as YYYYMMDD; make it a date for splits by time")
    if _WEIGHT.search(made.name) and low >= 0:
        made.entry = {"kind": "weight"}
    elif _GROUP.search(made.name):
        made.entry = {"kind": "group"}
    else:
        dense = distinct > _FEW and distinct > 0.5 * (high - low + 1)
        amount = _AMOUNT.search(made.name) is not None
        id_like = _ID.search(_plain(made.name)) is not None or high > 1 << 31 or low < -(1 << 31)
        if id_like or (not amount and (distinct <= 20 or dense)):
            made.entry = {"kind": "categorical"}
        else:
            made.entry = _number(known)


def _guess_float(made: Guess, known: pl.Series) -> None:
    number = known.cast(pl.Float64).fill_nan(None).drop_nulls()
    x = number.to_numpy()
    whole = len(x) > 0 and bool((x == np.floor(x)).all()) and bool((np.abs(x) <= MAX_WHOLE).all())
    if whole:
        _guess_integer(made, number.cast(pl.Int64))
        made.remarks.append("float that holds integers")
    elif _WEIGHT.search(made.name) and len(x) and x.min() >= 0:
        made.entry = {"kind": "weight"}
    else:
        made.entry = _number(number)
    if number.is_infinite().any():
        made.remarks.append("holds infinite numbers, which are bad rows without `clip`")


def _number(known: pl.Series) -> dict[str, Any]:
    x = known.cast(pl.Float64).to_numpy()
    x = x[np.isfinite(x)]
    if len(x) and x.min() >= 0 and np.quantile(x, 0.99) > 20 * max(1.0, float(np.median(x))):
        return {"kind": "numeric", "transform": "log"}
    return {"kind": "numeric"}


# -- among all columns -------------------------------------------------------------------------------------------------


def label_entry(values: pl.Series) -> dict[str, Any] | None:
    """The entry of a column as a label, or None if it cannot be one."""
    known = values.drop_nulls()
    if values.dtype == pl.Boolean:
        return {"kind": "label"}
    if values.dtype == pl.String and len(known):
        words = known.str.to_lowercase().str.strip_chars()
        fits = words.is_in(list(WORDS))
        return {"kind": "label"} if fits.sum() >= MOST * len(words) and words.filter(fits).n_unique() > 1 else None
    if not values.dtype.is_numeric() or not len(known):
        return None
    distinct = set(known.unique().head(21).cast(pl.Float64).to_list())
    if distinct <= {0.0, 1.0}:
        return {"kind": "label"}
    if distinct <= {-1.0, 1.0}:
        return {"kind": "label", "threshold": 1}
    if len(distinct) <= 20 and min(distinct) >= 0 and max(distinct) <= 5:
        return {"kind": "label", "threshold": 4}
    return None


def _plain(name: str) -> str:
    """A name in small letters, without signs such as a question mark.

    >>> _plain("Clicked?"), _plain("is click")
    ('clicked', 'is_click')
    """
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def _named_label(name: str) -> bool:
    return _plain(name) in _LABELS


def choose_labels(sample: pl.DataFrame) -> tuple[list[str], bool]:
    """Columns that look like labels, the likeliest first, and whether only their values say so."""
    by_name = {_plain(c): c for c in reversed(sample.columns)}
    named = [by_name[n] for n in _LABELS if n in by_name]
    found = [c for c in named if label_entry(sample[c]) is not None]
    if found:
        return found, False
    binary = [c for c in sample.columns if label_entry(sample[c]) == {"kind": "label"} and sample[c].n_unique() > 1]
    binary = [c for c in binary if sample[c].dtype != pl.String] or binary
    return binary[:1] if len(binary) == 1 else [], True


def leaks(values: pl.Series, label: pl.Series) -> bool:
    """Whether a column alone gives a binary label ``[0, 1]`` away."""
    rows = pl.DataFrame({"value": values, "label": label.cast(pl.Float64)}).drop_nulls()
    base = rows["label"].mean()
    if values.dtype.is_nested() or len(rows) < _FEW or not isinstance(base, float) or not 0.01 < base < 0.99:
        return False
    if values.dtype.is_numeric() and values.n_unique() > 20:
        ordered = rows.sort("value")["label"].to_numpy()
        ones = int(ordered.sum())
        return bool(ordered[len(ordered) - ones :].all() or ordered[:ones].all())
    groups = rows.group_by("value").agg(pl.len(), right=pl.max_horizontal(pl.mean("label"), 1 - pl.mean("label")))
    often = groups.filter(pl.col("len") > 1)
    counts, right = often["len"].to_numpy(), often["right"].to_numpy()
    return bool(counts.sum() >= len(rows) / 2 and (counts * right).sum() >= 0.999 * counts.sum())


def shared_vocabulary(sample: pl.DataFrame, guesses: Mapping[str, Guess]) -> dict[str, str]:
    """By list or sequence, the categorical column whose values it holds."""
    singles = {n: set(sample[n].drop_nulls().unique().to_list()) for n, g in guesses.items() if g.kind == "categorical"}
    found = {}
    for name, guess in guesses.items():
        if guess.kind not in ("list", "sequence") or guess.entry is None or guess.left_out:
            continue
        if "separator" in guess.entry:
            pieces = sample[name].drop_nulls().str.split(guess.entry["separator"]).explode().str.strip_chars()
            pieces = pieces.cast(pl.Int64) if guess.entry.get("values") == "integer" else pieces
        else:
            values = sample[name].drop_nulls()
            pieces = (values.arr.to_list() if isinstance(values.dtype, pl.Array) else values).explode()
        kinds = {n: sample[n].dtype.is_integer() == pieces.dtype.is_integer() for n in singles}
        mine = set(pieces.drop_nulls().unique().to_list())
        shares = {n: len(mine & own) / max(1, len(mine)) for n, own in singles.items() if kinds[n] and len(own) > 2}
        best = max(shares, key=lambda n: shares[n], default=None)
        if best is not None and shares[best] >= 0.5:
            found[name] = best
    return found
