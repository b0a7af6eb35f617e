"""Types of values that are written as text."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

TYPES: dict[str, pl.DataType] = {
    "string": pl.String(),
    "integer": pl.Int64(),
    "unsigned": pl.UInt64(),
    "float": pl.Float64(),
    "boolean": pl.Boolean(),
}
"""Types that the options of a text source name."""
_NAMES = {str(t): name for name, t in TYPES.items()}
_INTEGER = r"^-?(0|[1-9][0-9]*)$"
_FLOAT = r"^[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$|^[+-]?(?i:nan|inf|infinity)$"
_BOOLEAN = r"^(?i:true|false)$"


def infer_type(text: pl.Series, decimal: str = ".") -> pl.DataType:
    """The narrowest type of some texts; numbers that begin with a zero, such as zip codes, are strings.

    >>> [str(infer_type(pl.Series(v))) for v in (["1", " 2", None], ["1", "2.5e3"], ["true"], ["007"], [None])]
    ['Int64', 'Float64', 'Boolean', 'String', 'Null']
    """
    known = text.cast(pl.String).drop_nulls().str.strip_chars()
    known = known.filter(known.str.len_bytes() > 0)
    if not len(known):
        return pl.String() if text.drop_nulls().len() else pl.Null()
    if known.str.contains(_INTEGER).all():
        for dtype in (pl.Int64(), pl.UInt64()):
            if known.cast(dtype, strict=False).null_count() == 0:
                return dtype
        return pl.String()
    if _dotted(known, decimal).str.contains(_FLOAT).all():
        return pl.Float64()
    return pl.Boolean() if known.str.contains(_BOOLEAN).all() else pl.String()


@dataclass(frozen=True)
class NumberCount:
    """How many values of a column are numbers, of those that its text files begin with.

    Args:
        known: values that are not missing.
        whole: those that are integers.
        number: those that are numbers, integers too.
        other: the first that is no number, or None.
    """

    known: int = 0
    whole: int = 0
    number: int = 0
    other: str | None = None

    def __add__(self, more: NumberCount) -> NumberCount:
        return NumberCount(
            self.known + more.known,
            self.whole + more.whole,
            self.number + more.number,
            more.other if self.other is None else self.other,
        )

    @property
    def share(self) -> float:
        """Share of the values that are numbers."""
        return self.number / max(1, self.known)


def count_numbers(text: pl.Series, decimal: str = ".") -> NumberCount:
    """How many of some texts are numbers.

    >>> count_numbers(pl.Series(["1", " 2.5", "n/a", "", None]))
    NumberCount(known=3, whole=1, number=2, other='n/a')
    """
    known = text.drop_nulls().str.strip_chars()
    known = known.filter(known.str.len_bytes() > 0)
    whole = known.str.contains(_INTEGER)
    number = whole | _dotted(known, decimal).str.contains(_FLOAT)
    others = known.filter(~number)
    return NumberCount(len(known), int(whole.sum()), int(number.sum()), str(others[0]) if len(others) else None)


def read_values(
    text: pl.Series, dtype: pl.DataType, decimal: str = ".", *, told: bool = False
) -> tuple[pl.Series, pl.Series | None]:
    """Texts as values of a type, and which of them are none; blanks around a number do not count.

    Args:
        text: strings and nulls.
        dtype: one of ``TYPES``.
        decimal: what stands before the fraction of a float.
        told: the user names the type; else an integer must not begin with a zero, whose meaning would be lost.

    >>> values, wrong = read_values(pl.Series(["1", " 2", "x", None]), pl.Int64())
    >>> values.to_list(), wrong.to_list()
    ([1, 2, None, None], [False, False, True, False])
    """
    if dtype == pl.String:
        return text, None
    written = _dotted(text, decimal) if dtype.is_float() else text
    values = _cast(written, dtype)
    failed = values.is_null() & text.is_not_null()
    stripped = written
    if failed.any():
        stripped = written.str.strip_chars()
        values = values.zip_with(~failed, _cast(stripped, dtype))
        failed = values.is_null() & (stripped.str.len_bytes() > 0).fill_null(False)
    if dtype.is_integer() and not told:
        padded = stripped.str.starts_with("0") & (stripped.str.len_bytes() > 1)
        if padded.any():
            failed = failed | padded.fill_null(False)
    return values, failed if failed.any() else None


def list_type(text: pl.Series, separator: str) -> pl.DataType:
    """The type of the values of lists that are written as text: integers, or else strings."""
    found = infer_type(text.drop_nulls().str.split(separator).explode())
    return found if found == pl.Int64 else pl.String()


def read_lists(text: pl.Series, separator: str, dtype: pl.List) -> tuple[pl.Series, pl.Series | None]:
    """Lists that are written as text, and which of them hold a value of another type; blanks around one do not count.

    >>> values, wrong = read_lists(pl.Series(["1|2", " 3", "4|x", None]), "|", pl.List(pl.Int64()))
    >>> values.to_list(), wrong.to_list()
    ([[1, 2], [3], [4, None], None], [False, False, True, False])
    """
    pieces = text.str.split(separator).list.eval(pl.element().str.strip_chars())
    if dtype.inner == pl.String:
        return pieces, None
    values = pieces.cast(dtype, strict=False)
    lost = pl.element().cast(dtype.inner, strict=False).is_null() & (pl.element().str.len_bytes() > 0)
    failed = pieces.list.eval(lost).list.any().fill_null(False)
    return values, failed if failed.any() else None


def type_name(dtype: pl.DataType) -> str:
    """What the options call a type."""
    return _NAMES.get(str(dtype), str(dtype))


def _dotted(text: pl.Series, decimal: str) -> pl.Series:
    if decimal == ".":
        return text
    # A dot in it is then no number.
    return text.str.replace_all(".", "?", literal=True).str.replace_all(decimal, ".", literal=True)


def _cast(text: pl.Series, dtype: pl.DataType) -> pl.Series:
    if dtype == pl.Boolean:
        words = {"true": True, "false": False, "1": True, "0": False}
        return text.str.to_lowercase().replace_strict(words, default=None, return_dtype=pl.Boolean)
    return text.cast(dtype, strict=False)
