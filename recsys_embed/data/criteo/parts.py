"""Parsed rows between the two passes of a conversion: one uncompressed file of typed columns per part.

Columns are contiguous, so the counting pass reads one field of one part with a single seek.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys_embed.data.criteo.layout import NUM_CATS, NUM_INTS
from recsys_embed.data.criteo.parse import BLANK_INT, ParsedBlock
from recsys_embed.data.folder import write_file

_SMALL_BLANK = np.iinfo(np.int32).min


@dataclass(frozen=True)
class PartInfo:
    """One line of the manifest: which text a part holds and how its columns are stored.

    ``file`` is the index of the input file; ``start``/``stop`` are offsets in its decompressed bytes, ``next_line``
    the number of the line after the part; ``rows + bad`` lines were read.
    """

    index: int
    file: int
    start: int
    stop: int
    next_line: int
    last: bool
    rows: int
    bad: int
    fault: str | None
    labels: bool
    int_type: str
    cat_type: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ParsedPart:
    """Columns of a part on disk; reads only what is asked for."""

    def __init__(self, path: Path, info: PartInfo) -> None:
        self.path = path
        self.info = info
        n = info.rows
        self._packed = (n + 7) // 8
        self._ints_at = n if info.labels else 0
        self._cats_at = self._ints_at + NUM_INTS * n * np.dtype(info.int_type).itemsize
        self._missing_at = self._cats_at + NUM_CATS * n * np.dtype(info.cat_type).itemsize
        self.size = self._missing_at + NUM_CATS * self._packed

    def labels(self) -> NDArray[np.int8] | None:
        return np.fromfile(self.path, np.int8, self.info.rows) if self.info.labels else None

    def ints(self, i: int) -> NDArray[np.int64]:
        """Integer field ``i`` (0 is I1), int64 with ``BLANK_INT`` where empty."""
        kind = np.dtype(self.info.int_type)
        at = self._ints_at + i * self.info.rows * kind.itemsize
        column = np.fromfile(self.path, kind, self.info.rows, offset=at)
        if kind == np.int64:
            return column
        wide = column.astype(np.int64)
        wide[column == _SMALL_BLANK] = BLANK_INT
        return wide

    def cats(self, j: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Category field ``j`` (0 is C1): values, and where the field is empty."""
        kind = np.dtype(self.info.cat_type)
        at = self._cats_at + j * self.info.rows * kind.itemsize
        values = np.fromfile(self.path, kind, self.info.rows, offset=at)
        bits = np.fromfile(self.path, np.uint8, self._packed, offset=self._missing_at + j * self._packed)
        return values, np.unpackbits(bits, count=self.info.rows).astype(bool)

    @staticmethod
    def write(path: Path, blocks: list[ParsedBlock]) -> tuple[str, str]:
        """Store blocks one after another; returns the types of integer and category columns."""
        narrow = [_narrow(b.ints) for b in blocks]
        fits = [n for n in narrow if n is not None]
        ints: list[NDArray[Any]] = list(fits) if len(fits) == len(blocks) else [b.ints for b in blocks]
        missing = np.concatenate([b.missing for b in blocks], axis=1)

        def save(temporary: Path) -> None:
            with temporary.open("wb") as f:
                for b in blocks:
                    if b.labels is not None:
                        f.write(b.labels.data)
                for rows in (ints, [b.cats for b in blocks]):
                    for column in zip(*rows, strict=True):
                        for piece in column:
                            f.write(np.ascontiguousarray(piece).data)
                f.write(np.ascontiguousarray(np.packbits(missing, axis=1)).data)

        write_file(path, save, durable=False)
        return str(ints[0].dtype), str(blocks[0].cats.dtype)


def _narrow(ints: NDArray[np.int64]) -> NDArray[np.int32] | None:
    """The integers in 32 bits with their own mark for empty, or None if one does not fit."""
    small = ints.astype(np.int32)
    if (small == _SMALL_BLANK).any():
        return None
    changed = small != ints
    if not (ints[changed] == BLANK_INT).all():
        return None
    small[changed] = _SMALL_BLANK
    return small
