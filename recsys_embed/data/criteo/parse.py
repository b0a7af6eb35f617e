"""Criteo text to typed columns, with no Python per row on good rows.

A block of whole lines becomes one array of separator positions; every field is then read as eight bytes at once and
decoded with 64-bit integer arithmetic (eight digits per word). Anything unusual (a wrong number of fields, a byte that
is no digit, a number of more than 16 digits) is handed, row by row, to the slow and exact twin in ``explain.py``, which
either reads the row or names what is wrong with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys_embed.data.criteo.explain import BadRow, read_line
from recsys_embed.data.criteo.layout import NUM_CATS, NUM_INTS, RESERVED_ID, LineLayout

U64 = np.uint64
Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]
BLANK_INT = -(1 << 63)
"""Stands for an empty integer field; no row can contain it, the parser refuses integers of that size."""
_PAD = 16
_SLICE = 16384
_LF, _CR, _MINUS, _ZERO, _ONE = 10, 13, 45, 48, 49


def _each_byte(b: int) -> np.uint64:
    return U64(int.from_bytes(bytes([b]) * 8, "little"))


_X01, _X06, _X0F, _X30 = (_each_byte(b) for b in (0x01, 0x06, 0x0F, 0x30))
_X76, _X80, _XF0 = (_each_byte(b) for b in (0x76, 0x80, 0xF0))
_LANE16, _LANE32, _LOW32 = U64(0x00FF00FF00FF00FF), U64(0x0000FFFF0000FFFF), U64(0xFFFFFFFF)
# Masks of the last n of eight bytes: a field is read backwards from its end, and what precedes it becomes zeros.
_TAIL = np.array([((1 << 64) - 1) ^ ((1 << (64 - 8 * n)) - 1) for n in range(9)], dtype=U64)
_HEAD30 = ~_TAIL & _X30


class _Scratch(threading.local):
    """Large temporaries, kept per thread: fresh pages for every block would cost a third of the time."""

    def __init__(self) -> None:
        self.held: dict[str, NDArray[Any]] = {}

    def take(self, name: str, size: int, kind: type[Any]) -> NDArray[Any]:
        """An array [size] with undefined content, valid until the next call with this name."""
        held = self.held.get(name)
        if held is None or len(held) < size:
            held = self.held[name] = np.empty(size, kind)
        return held[:size]


_scratch = _Scratch()


@dataclass
class ParsedBlock:
    """Typed columns of the good rows of one block, in file order; ``lines == rows + len(bad)``.

    Args:
        labels: int8 [n], or None for files without labels.
        ints: int64 [13, n], ``BLANK_INT`` where empty.
        cats: uint32 or uint64 [26, n], 0 where empty.
        missing: bool [26, n], true where a category is empty.
        lines: lines seen.
        bad: the lines left out, in file order.
    """

    labels: NDArray[np.int8] | None
    ints: NDArray[np.int64]
    cats: NDArray[Any]
    missing: Flags
    lines: int
    bad: list[BadRow] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return int(self.ints.shape[1])


def parse_block(text: bytes, layout: LineLayout, *, first_line: int = 1) -> ParsedBlock:
    """Parse whole lines, each ending in a newline (LF or CR LF).

    Args:
        text: the lines.
        layout: fields, separator and id width.
        first_line: the number of the first line in its file, for messages.

    >>> row = b"1" + b"\\t7" * 13 + b"\\t0000000a" * 26 + b"\\n"
    >>> block = parse_block(row, LineLayout())
    >>> block.rows, int(block.ints[0, 0]), int(block.cats[25, 0])
    (1, 7, 10)
    """
    padded = _scratch.take("text", len(text) + 2 * _PAD, np.uint8)
    padded[:_PAD] = 0
    body = padded[_PAD : _PAD + len(text)]
    body[:] = np.frombuffer(text, np.uint8)
    found = np.equal(body, _LF, out=_scratch.take("newline", len(text), bool))
    line_stop = np.flatnonzero(found)
    found |= np.equal(body, ord(layout.separator), out=_scratch.take("separator", len(text), bool))
    marks = np.flatnonzero(found)
    lines, width = len(line_stop), layout.num_fields
    line_start = np.concatenate([np.zeros(min(1, lines), np.int64), line_stop[:-1] + 1])
    whole = np.ones(lines, bool)
    if len(marks) != lines * width or not np.array_equal(marks[width - 1 :: width], line_stop):
        counts = np.diff(np.searchsorted(marks, line_stop), prepend=-1)
        whole = counts == width
        marks = marks[: counts.sum()][np.repeat(whole, counts)]
    block, suspect = _decode(padded, marks.reshape(-1, width), line_start[whole], layout)
    block.lines = lines
    if block.rows != lines or suspect.any():
        _reparse_flagged(text, block, whole, suspect, line_start, line_stop, layout, first_line)
    return block


def _decode(
    padded: NDArray[np.uint8], marks: NDArray[np.int64], start: NDArray[np.int64], layout: LineLayout
) -> tuple[ParsedBlock, Flags]:
    """Decode rows that have the right number of fields; flag those with a field the fast path cannot read.

    Args:
        padded: the text between two pads.
        marks: int64 [n, fields], where each field ends.
        start: int64 [n], where each row begins.
    """
    n = len(marks)
    block = ParsedBlock(
        labels=np.zeros(n, np.int8) if layout.labels else None,
        ints=np.empty((NUM_INTS, n), np.int64),
        cats=np.empty((NUM_CATS, n), np.uint64 if layout.id_bits == 64 else np.uint32),
        missing=np.empty((NUM_CATS, n), bool),
        lines=n,
    )
    suspect = np.zeros(n, bool)
    for first in range(0, n, _SLICE):
        rows = slice(first, min(first + _SLICE, n))
        stops = _scratch.take("stops", marks[rows].size, np.int64).reshape(layout.num_fields, -1)
        stops[:] = marks[rows].T
        _decode_slice(padded, stops, start[rows], layout, block, rows, suspect[rows])
    return block, suspect


def _decode_slice(
    padded: NDArray[np.uint8],
    stops: NDArray[np.int64],
    start: NDArray[np.int64],
    layout: LineLayout,
    block: ParsedBlock,
    rows: slice,
    suspect: Flags,
) -> None:
    """Decode a slice of rows into ``block``; temporaries then stay in the cache and need no fresh pages."""
    # words[i] are the eight bytes before position i of the text.
    words = np.ndarray((len(padded) - _PAD,), "<u8", padded, offset=_PAD - 8, strides=(1,))
    at = padded[_PAD:]
    stops[-1] -= padded[stops[-1] + (_PAD - 1)] == _CR
    labels = None if block.labels is None else block.labels[rows]
    ints, cats, missing = block.ints[:, rows], block.cats[:, rows], block.missing[:, rows]
    lead = 1 if layout.labels else 0
    for f, stop in enumerate(stops):
        length = stop - start
        if f < lead and labels is not None:
            byte = at[start]
            suspect |= (length != 1) | ((byte != _ZERO) & (byte != _ONE))
            np.equal(byte, _ONE, out=labels.view(bool))
        elif f < lead + NUM_INTS:
            column = ints[f - lead]
            value, bad = _number(words, stop, length, _decimal, U64(10**8))
            column[:] = value.view(np.int64)
            column[length == 0] = BLANK_INT
            odd = np.flatnonzero(bad)
            if len(odd):
                signed = odd[at[start[odd]] == _MINUS]
                value, bad[signed] = _number(words, stop[signed], length[signed] - 1, _decimal, U64(10**8))
                bad[signed] |= length[signed] == 1
                column[signed] = -value.view(np.int64)
                suspect |= bad
        else:
            j = f - lead - NUM_INTS
            value, bad = _number(words, stop, length, _hexadecimal, U64(1 << 32))
            cats[j] = value
            np.equal(length, 0, out=missing[j])
            bad |= (value == U64(RESERVED_ID)) if layout.id_bits == 64 else (length > 8)
            suspect |= bad
        start = stop + 1


def _number(
    words: Words,
    stop: NDArray[np.int64],
    length: NDArray[np.int64],
    decode: Callable[[Words], tuple[Words, Flags]],
    unit: np.uint64,
) -> tuple[Words, Flags]:
    """Decode digit strings of up to 16 digits that end before ``stop``; also flags those that cannot be decoded."""
    x = words[stop]
    if length.min(initial=8) < 8:
        # A field of n < 8 digits is the last n bytes of its word; the bytes before it become '0' digits.
        short = np.minimum(length, 8)
        x &= _TAIL[short]
        x |= _HEAD30[short]
    value, bad = decode(x)
    if length.max(initial=0) > 8:
        # More than 8 digits: the eight bytes before are the high part, which counts `unit` (10**8 or 16**8).
        long = np.flatnonzero(length > 8)
        rest = np.minimum(length[long] - 8, 8)
        head, head_bad = decode(words[stop[long] - 8] & _TAIL[rest] | _HEAD30[rest])
        value[long] += head * unit
        bad[long] |= head_bad | (length[long] > 16)
    return value, bad


def _decimal(x: Words) -> tuple[Words, Flags]:
    """Decode eight ASCII digits per word, the first digit in the lowest byte (SWAR: all bytes of a word at once)."""
    x ^= _X30  # '0'..'9' is 0x30..0x39, so digits become 0..9
    # byte > 9 exactly if byte + 0x76 >= 0x80, as 0x76 = 0x80 - 10. Bytes of 0x80 and more are caught by `| x`; only
    # they can carry into the next byte, and their word is flagged already.
    bad = (((x + _X76) | x) & _X80) != 0
    # Join neighbours, first digit lowest: byte 0 of 10 x + (x >> 8) is 10 d0 + d1 <= 99, so nothing carries. Then the
    # same for pairs in lanes of 16 bits (factor 100) and for fours in lanes of 32 (factor 10000).
    x = (x * U64(10) + (x >> U64(8))) & _LANE16
    x = (x * U64(100) + (x >> U64(16))) & _LANE32
    x = (x * U64(10000) + (x >> U64(32))) & _LOW32
    return x, bad


def _hexadecimal(x: Words) -> tuple[Words, Flags]:
    """Decode eight ASCII hex digits per word; a word is valid if encoding its nibbles gives its characters again."""
    letter = (x >> U64(6)) & _X01  # bit 6 is set in 'A'..'F' (0x41..) and 'a'..'f' (0x61..), not in '0'..'9' (0x30..)
    nibble = (x & _X0F) + letter * U64(9)  # 'a' & 15 = 1, so letters give 10..15
    # Encode: 0x30 + nibble, plus 0x27 where nibble >= 10 (then nibble + 6 has bit 4), as 'a' = 0x30 + 10 + 0x27.
    again = nibble + _X30 + ((nibble + _X06) >> U64(4) & _X01) * U64(0x27)
    x |= letter << U64(5)  # letters to lower case
    x ^= again  # zero in every byte that is a hex digit
    x |= nibble & _XF0  # letters beyond 'f' encode to themselves, with a nibble above 15
    bad = x != 0
    # Join neighbours, most significant digit lowest: n0 << 4 | n1, then bytes to 16 and 32 bits in the same way.
    x = (nibble << U64(4) | nibble >> U64(8)) & _LANE16
    x = (x << U64(8) | x >> U64(16)) & _LANE32
    x = (x << U64(16) | x >> U64(32)) & _LOW32
    return x, bad


def _reparse_flagged(
    text: bytes,
    block: ParsedBlock,
    whole: Flags,
    suspect: Flags,
    line_start: NDArray[np.int64],
    line_stop: NDArray[np.int64],
    layout: LineLayout,
    first_line: int,
) -> None:
    """Parse flagged lines by the slow parser: store the valid ones, drop and record the others."""
    slot = np.cumsum(whole) - 1
    doubtful = ~whole
    doubtful[np.flatnonzero(whole)[suspect]] = True
    keep = np.ones(block.rows, bool)
    for i in np.flatnonzero(doubtful):
        row = read_line(text[line_start[i] : line_stop[i]], layout, first_line + int(i))
        if isinstance(row, BadRow):
            block.bad.append(row)
            if whole[i]:
                keep[slot[i]] = False
            continue
        k = slot[i]
        if block.labels is not None:
            block.labels[k] = row.label or 0
        block.ints[:, k] = [BLANK_INT if v is None else v for v in row.ints]
        block.cats[:, k] = [v or 0 for v in row.cats]
        block.missing[:, k] = [v is None for v in row.cats]
    if not keep.all():
        block.labels = None if block.labels is None else block.labels[keep]
        block.ints, block.cats, block.missing = block.ints[:, keep], block.cats[:, keep], block.missing[:, keep]
