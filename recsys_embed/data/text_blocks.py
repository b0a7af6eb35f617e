"""Input files as blocks of complete lines; each file is read once, sequentially."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from recsys_embed.data.compressed_file import Reader
from recsys_embed.data.criteo.explain import BadRow, overlong, show
from recsys_embed.data.criteo.layout import MAX_LINE_BYTES, LineLayout
from recsys_embed.errors import DataError, raise_faults

BLOCK_BYTES = 4 << 20
"""Bytes of text that are parsed at once; small, so that the working arrays (eight times as large) stay in the cache."""
Tri = Literal["auto", "yes", "no"]
_SHORTEST_ROW = 32
_SHORT_LINES = 1 << 14


@dataclass(frozen=True)
class TextBlock:
    """Whole lines of one file.

    Args:
        start, stop: offsets in the decompressed file.
        first_line: 1-based number of the first line of ``data``.
        data: the lines, each ending in a newline.
        bad: lines that are not whole (overlong, or cut off with their archive) and not part of ``data``.
        position: bytes of the file on disk read so far, for progress.
        fault: what is wrong with the file as a whole; set on its last block only.
    """

    start: int
    stop: int
    first_line: int
    data: bytes
    bad: tuple[BadRow, ...]
    position: int
    fault: str | None = None


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Expand files, globs and folders: in the order given; inside a glob or folder in natural order.

    Raises:
        ConfigError: names every input that matches nothing, and every file given twice.
    """
    found: list[Path] = []
    faults = []
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            hits = [p for p in path.iterdir() if p.is_file() and not p.name.startswith((".", "_"))]
        elif path.exists():
            hits = [path] if path.is_file() else []
        else:
            hits = [Path(p) for p in glob.glob(str(item), recursive=True) if Path(p).is_file()]
        if not hits:
            why = "no such file or folder, and no match as a glob"
            if path.is_dir():
                why = "the folder holds no files"
            elif path.exists():
                # Inputs are read more than once and resumed at an offset.
                why = "not a regular file; write a pipe or device to a file first"
            faults.append(f"input {str(item)!r}: {why}")
        found += sorted(hits, key=natural_key)
    seen: set[Path] = set()
    for path in found:
        real = path.resolve()
        if real in seen:
            faults.append(f"input {str(path)!r} is given more than once")
        seen.add(real)
    raise_faults(faults, "the inputs of `data criteo`")
    return found


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts ``day_2`` before ``day_10``."""
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", str(path)) if t]


def detect(path: Path, layout: LineLayout, *, header: Tri = "auto", labels: Tri = "auto") -> tuple[bool, LineLayout]:
    """Whether the file starts with a header, and the layout of its rows, from its first line.

    A first line is a header if it has the fields of a row and all of them are names. 39 fields mean no labels.

    Raises:
        DataError: the header names Criteo's columns in another order, or the file is no text.
    """
    with Reader(path) as reader:
        first = reader.read(MAX_LINE_BYTES).partition(b"\n")[0].removesuffix(b"\r")
    if first.startswith(b"PAR1"):
        raise DataError(f"{path}: a Parquet file; this reads Criteo's text. `recsys-embed data table` reads any table")
    cells = first.split(layout.separator.encode())
    is_header = header == "yes"
    if header == "auto":
        is_header = abs(len(cells) - layout.num_fields) <= 1 and all(
            re.match(rb"[A-Za-z_][\w .-]*\Z", c) for c in cells
        )
    has_labels = labels == "yes" or (labels == "auto" and len(cells) != layout.num_fields - layout.labels)
    layout = LineLayout(has_labels, layout.separator, layout.id_bits)
    if is_header and len(cells) == layout.num_fields:
        names = [c.decode("latin-1").strip().lower() for c in cells]
        want = [n.lower() for n in layout.names]
        if sorted(names[has_labels:]) == sorted(want[has_labels:]) and names[has_labels:] != want[has_labels:]:
            order = ", ".join(layout.names)
            raise DataError(f"{path}, line 1: expected the columns in the order {order}; got {show(first, 200)}")
    return is_header, layout


def read_blocks(
    path: Path, *, header: bool, start: int = 0, first_line: int = 1, block_bytes: int | None = None
) -> Iterator[TextBlock]:
    """Yield the file's lines block by block.

    Blocks depend only on the content, ``block_bytes`` (4 MiB unless given) and ``start`` (a former block's ``stop``;
    ``first_line`` is then the line after it), so a reader that resumes sees the blocks that would have come.
    """
    block_bytes = block_bytes or BLOCK_BYTES
    with Reader(path) as reader:
        reader.skip(start)
        offset, line, carry, ended = start, first_line, b"", False
        while True:
            if not ended and len(carry) < block_bytes:
                need = block_bytes - len(carry)
                got = reader.read(need)
                ended = len(got) < need
                carry += got
            if not carry:
                break
            cut = _end_of_lines(carry)
            if not cut and not ended:
                head, size, newline, carry, ended = _overlong_line(reader, carry, block_bytes)
                stop = offset + size + newline
                yield TextBlock(offset, stop, line, b"", (BadRow(line, None, overlong(size), head),), reader.position)
                offset, line = stop, line + 1
                continue
            if not cut and reader.fault:
                why = f"{reader.fault}; this line is incomplete: {show(carry)}"
                bad = BadRow(line, None, why, carry[:MAX_LINE_BYTES])
                yield TextBlock(offset, offset + len(carry), line, b"", (bad,), reader.position)
                offset += len(carry)
                break
            data = carry[:cut] if cut else carry + b"\n"
            carry = carry[cut:] if cut else b""
            stop = offset + (cut or len(data) - 1)
            count = data.count(b"\n")
            if header and offset == 0:
                data, line, count = data[data.index(b"\n") + 1 :], line + 1, count - 1
            yield TextBlock(offset, stop, line, data, (), reader.position)
            offset, line = stop, line + count
        fault = reader.fault
        if fault is None and line == 1 + header and start == 0:
            fault = "the file holds a header and no rows" if header and offset else "the file is empty"
        if fault:
            yield TextBlock(offset, offset, line, b"", (), reader.position, fault)


def _end_of_lines(text: bytes) -> int:
    """Where the block of whole lines at the beginning of ``text`` ends; 0 where no line does.

    Text of more lines than rows can be holds bad rows, of which fewer are taken at once: each costs much memory.
    """
    if text.count(b"\n") <= len(text) // _SHORTEST_ROW + 1:
        return text.rfind(b"\n") + 1
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    return int(ends[min(_SHORT_LINES, len(ends)) - 1]) + 1


def _overlong_line(reader: Reader, head: bytes, step: int) -> tuple[bytes, int, bool, bytes, bool]:
    """Read to the end of a line longer than a block.

    Returns its beginning, its size, whether a newline ends it, what was read after it, and whether the file ended.
    """
    size = len(head)
    head = head[:MAX_LINE_BYTES]
    while True:
        got = reader.read(step)
        ended = len(got) < step
        end = got.find(b"\n")
        if end >= 0:
            return head, size + end, True, got[end + 1 :], ended
        size += len(got)
        if ended:
            return head, size, False, b"", True
