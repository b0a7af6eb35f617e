"""Records of CSV text: where they end, what is quoted, and which are not whole."""

from __future__ import annotations

import re
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recsys_embed.data.sources.text import Ends, line_ends, record

_MAX_LINES = 1 << 10
"""Lines that a quoted field may span; one that does not end by then begins with a stray quote."""
_NEWLINE = ord("\n")


class Records:
    """The rule by which text is records.

    A field is quoted if it begins with a quote; in it two quotes stand for one, and separators and newlines are text.

    Args:
        separator: one byte.
        quote: one byte, or none: quotes are plain characters.
    """

    def __init__(self, separator: bytes, quote: bytes) -> None:
        self.separator, self.quote = separator, quote

    @cached_property
    def _quoted(self) -> bytes:
        q = re.escape(self.quote)
        return q + b"(?:[^" + q + b"]|" + q + q + b")*"

    @cached_property
    def _field(self) -> bytes:
        q, s = re.escape(self.quote), re.escape(self.separator)
        return b"(?:" + self._quoted + q + b"|[^" + s + q + rb"\n][^" + s + q + rb"\n]*|)"

    @cached_property
    def _whole(self) -> re.Pattern[bytes]:
        s = re.escape(self.separator)
        return re.compile(self._field + b"(?:" + s + self._field + rb")*\r?\n?", re.DOTALL)

    @cached_property
    def _open(self) -> re.Pattern[bytes]:
        return re.compile(b"(?:" + self._field + re.escape(self.separator) + b")*" + self._quoted, re.DOTALL)

    def _inside(self, text: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which bytes are inside of quotes, if every quote opens or closes a field or is one of two."""
        return (np.cumsum(text == self.quote[0], dtype=np.uint8) & 1).astype(bool)

    def _regular(self, text: NDArray[np.uint8]) -> bool:
        """Whether every quote opens or closes a field or is one of two."""
        at = np.flatnonzero(text == self.quote[0])
        edge = np.array([_NEWLINE], np.uint8)
        padded = np.concatenate([edge, text, edge])
        before, after = padded[at], padded[at + 2]
        outer = [self.separator[0], _NEWLINE]
        opens, closes = before[0::2], after[1::2]
        return bool(
            np.isin(opens, [*outer, self.quote[0]]).all() and np.isin(closes, [*outer, self.quote[0], ord("\r")]).all()
        )

    def ends(self, data: bytes, ended: bool) -> Ends:
        """Where the whole records of ``data`` end; all of ``data`` if nothing comes after it.

        >>> Records(b",", b'"').ends(b'1,"x\\ny"\\n2,z\\n3,"', False).tolist()
        [8, 12]
        """
        found = line_ends(data)
        if not self.quote or self.quote not in data:
            return found
        text = np.frombuffer(data, np.uint8)
        if not self._regular(text):
            return self._careful_ends(data, found, ended)
        inside = self._inside(text)
        outside = found[~inside[found - 1]]
        if (ended or len(data) > 1 << 24) and inside[-1]:
            return self._careful_ends(data, found, ended)
        return outside

    def _careful_ends(self, data: bytes, lines: Ends, ended: bool) -> Ends:
        """Line by line: a stray quote makes its own line bad and no other."""
        ends: list[int] = []
        i, stops = 0, lines.tolist()
        while i < len(stops):
            start = ends[-1] if ends else 0
            last = min(i + _MAX_LINES, len(stops))
            j, state = i, "open"
            while j < last and state == "open":
                text = data[start : stops[j]]
                if self.quote not in text or self._whole.fullmatch(text):
                    state = "whole"
                elif not self._open.fullmatch(text):
                    state = "stray"
                else:
                    j += 1
            if state == "open" and last == len(stops) and last - i < _MAX_LINES and not ended:
                break
            i = j if state == "whole" else i
            ends.append(stops[i])
            i += 1
        return np.array(ends, np.int64)

    def stray(self, data: bytes, ends: Ends) -> list[int]:
        """Numbers of the records that have a quote where none may be."""
        if not self.quote or self.quote not in data:
            return []
        text = np.frombuffer(data, np.uint8)
        if self._regular(text) and not self._inside(text)[ends - 1].any():
            return []
        at = np.flatnonzero(text == self.quote[0])
        with_quotes = np.unique(np.searchsorted(ends, at, side="right")).tolist()
        return [i for i in with_quotes if not self._whole.fullmatch(record(data, ends, i))]

    def fields(self, data: bytes, ends: Ends) -> NDArray[np.int64]:
        """Number of fields of each record; none may have stray quotes."""
        text = np.frombuffer(data, np.uint8)
        separators = text == self.separator[0]
        if self.quote and self.quote in data:
            separators &= ~self._inside(text)
        upto = np.searchsorted(np.flatnonzero(separators), ends)
        return np.diff(upto, prepend=0) + 1

    def multiline(self, data: bytes, ends: Ends) -> bool:
        """Whether some record spans lines."""
        return bool(self.quote) and self.quote in data and data.count(b"\n") != len(ends)
