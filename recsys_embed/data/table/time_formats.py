"""How the times of a column of text are written, where it is not as ISO 8601 has it."""

from __future__ import annotations

import polars as pl

from recsys_embed.data.columns import Time

_DAYS = ("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%d-%m-%Y", "%m-%d-%Y", "%Y.%m.%d")
_HOURS = ("", " %H:%M", " %H:%M:%S")


def time_formats(texts: pl.Series) -> list[str]:
    """Formats of ``strftime`` of which each reads every text; none where the texts are no times.

    Two where days and months cannot be told apart.

    >>> time_formats(pl.Series(["31.01.2026 23:59", "01.02.2026 00:00"]))
    ['%d.%m.%Y %H:%M']
    >>> time_formats(pl.Series(["01/02/2026"])), time_formats(pl.Series(["1.2"]))
    (['%d/%m/%Y', '%m/%d/%Y'], [])
    """
    if not len(texts) or not texts.str.contains(r"^\d{1,4}[./-]\d{1,2}[./-]\d{1,4}( \d{1,2}:\d\d(:\d\d)?)?$").all():
        return []
    forms = [day + hours for day in _DAYS for hours in _HOURS]
    return [f for f in forms if not Time("time", format=f).seconds(texts).has_nulls()]
