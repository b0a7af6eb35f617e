"""One line of Criteo text read slowly and exactly: its values, or what is wrong with it and in which column.

The fast parser hands over only the rows it cannot read; this is also its oracle in the tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from recsys_embed.data.criteo.layout import MAX_LINE_BYTES, NUM_INTS, RESERVED_ID, LineLayout

_INT = re.compile(rb"(-?[0-9]+)(\.0+)?\Z")
_HEX = re.compile(rb"[0-9a-fA-F]+\Z")
_LABELS = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read: 1-based line in its file, the column's name if one is to blame, why, and the bytes."""

    line: int
    column: str | None
    reason: str
    raw: bytes

    def describe(self, file: str) -> str:
        """``file, line L, column C: reason``, the form of every message about a bad row.

        >>> BadRow(3, "C7", "expected hex; got 'x'", b"").describe("day_0")
        "day_0, line 3, column C7: expected hex; got 'x'"
        """
        where = f", column {self.column}" if self.column else ""
        return f"{file}, line {self.line}{where}: {self.reason}"


@dataclass(frozen=True)
class GoodRow:
    """Values of one row; an empty field is None."""

    label: int | None
    ints: tuple[int | None, ...]
    cats: tuple[int | None, ...]


def show(raw: bytes, limit: int = 40) -> str:
    """Bytes as printable ASCII in quotes, cut at ``limit``.

    >>> show(b"caf\\xe9\\x00")
    "'caf\\\\xe9\\\\x00'"
    """
    text = ascii(raw[:limit].decode("latin-1"))
    return text + "..." if len(raw) > limit else text


def read_line(raw: bytes, layout: LineLayout, line: int) -> GoodRow | BadRow:
    """Read one line without its newline.

    An integer written as ``260.0`` (what a round trip through float columns leaves behind) is read as 260.

    >>> read_line(b"1" + b"\\t" * 39, LineLayout(), 1).label
    1
    >>> read_line(b"2" + b"\\t" * 39, LineLayout(), 7).describe("f.tsv")
    "f.tsv, line 7, column label: expected 0 or 1; got '2'"
    """
    kept = raw[:MAX_LINE_BYTES]
    if len(raw) > MAX_LINE_BYTES:
        return BadRow(line, None, overlong(len(raw)), kept)
    body = raw[:-1] if raw.endswith(b"\r") else raw
    cells = body.split(layout.separator.encode())
    if len(cells) != layout.num_fields:
        return BadRow(line, None, _wrong_count(body, cells, layout), kept)
    faults: list[tuple[str, str]] = []
    label: int | None = None
    names = iter(layout.names)
    cell = iter(cells)
    if layout.labels:
        name, value = next(names), next(cell)
        label = _LABELS.get(value)
        if label is None:
            faults.append((name, f"expected 0 or 1; got {show(value)}"))
    ints: list[int | None] = []
    cats: list[int | None] = []
    for i, (name, value) in enumerate(zip(names, cell, strict=True)):
        number, why = _integer(value) if i < NUM_INTS else _category(value, layout)
        (ints if i < NUM_INTS else cats).append(number)
        if why:
            faults.append((name, why))
    if faults:
        column, reason = faults[0]
        more = f" (and {len(faults) - 1} more bad fields in this row)" if len(faults) > 1 else ""
        return BadRow(line, column, reason + more, kept)
    return GoodRow(label, tuple(ints), tuple(cats))


def overlong(size: int) -> str:
    """The reason given for a line above the limit."""
    return f"expected a line of at most {MAX_LINE_BYTES} bytes; got {size}"


def _integer(value: bytes) -> tuple[int | None, str]:
    if not value:
        return None, ""
    match = _INT.match(value) if len(value) <= 64 else None
    if match is None:
        return None, f"expected an integer or nothing; got {show(value)}"
    number = int(match[1])
    if abs(number) >= 1 << 63:
        return None, f"expected an integer of 64 bits; got {show(value)}"
    return number, ""


def _category(value: bytes, layout: LineLayout) -> tuple[int | None, str]:
    if not value:
        return None, ""
    if _HEX.match(value):
        if len(value) <= layout.hex_digits:
            number = int(value, 16)
            return number, "expected another id: this one stands for the empty field" if number == RESERVED_ID else ""
        hint = "; 64-bit ids need --id-bits 64" if layout.id_bits == 32 and len(value) <= 16 else ""
        return None, f"expected at most {layout.hex_digits} hexadecimal digits; got {len(value)}: {show(value)}{hint}"
    return None, f"expected up to {layout.hex_digits} hexadecimal digits or nothing; got {show(value)}"


def _wrong_count(body: bytes, cells: list[bytes], layout: LineLayout) -> str:
    if not body:
        return f"expected {layout.num_fields} fields; got an empty line"
    name = {"\t": "tab", ",": "comma", " ": "space"}.get(layout.separator, repr(layout.separator))
    text = f"expected {layout.num_fields} {name}-separated fields; got {len(cells)}"
    for other, called in ((b",", "comma"), (b"\t", "tab")):
        if other != layout.separator.encode() and body.count(other) == layout.num_fields - 1:
            return f"{text}, but {layout.num_fields} separated by {called}: pass --separator {called}"
    if layout.labels and len(cells) == layout.num_fields - 1:
        return f"{text}: a row without label? pass --labels no for such a file"
    if not layout.labels and len(cells) == layout.num_fields + 1:
        return f"{text}: a row with label? pass --labels yes for such a file"
    return f"{text} (line begins {show(body)})"
