"""The end of a Parquet file: how many bytes each column takes in each row group (Thrift's compact protocol)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

_MAGIC = b"PAR1"
_TRUE, _FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 6, 7, 8, 9, 10, 11, 12
# Numbers of fields in parquet.thrift.
_ROWS, _ROW_GROUPS, _COLUMNS, _META_DATA, _PATH, _COMPRESSED = 3, 4, 1, 3, 3, 7


def column_bytes(path: Path) -> list[dict[str, int]]:
    """Bytes of each column as they are stored, in each row group.

    Raises:
        ValueError: the file does not end as Parquet does, or its end contradicts itself.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != _MAGIC or length + 8 > size:
            raise ValueError("no Parquet footer")
        file.seek(size - 8 - length)
        reader = _Compact(file.read(length))
    try:
        whole = reader.struct()
        groups = whole[_ROW_GROUPS]
        if whole[_ROWS] != sum(group[_ROWS] for group in groups):
            raise LookupError(f"{whole[_ROWS]} rows, of which the row groups hold {sum(g[_ROWS] for g in groups)}")
        found = []
        for group in groups:
            held: Counter[str] = Counter()
            for chunk in group[_COLUMNS]:
                about = chunk[_META_DATA]
                if not 0 <= about[_COMPRESSED] <= size:
                    raise LookupError(f"a column of {about[_COMPRESSED]} bytes in a file of {size}")
                held[about[_PATH][0].decode()] += about[_COMPRESSED]
            found.append(dict(held))
    except (LookupError, TypeError, AttributeError, RecursionError, UnicodeDecodeError) as e:
        raise ValueError(f"the Parquet footer cannot be read ({e})") from e
    return found


class _Compact:
    """Values of Thrift's compact protocol, structs as dictionaries by number of field."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self) -> dict[int, Any]:
        """The struct that begins here."""
        found, number = {}, 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
        return found

    def _value(self, kind: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if _BYTE < kind <= _I64:
            return self._integer()
        if kind == _STRUCT:
            return self.struct()
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15) for _ in range(count)]
        if kind == _MAP:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(count)]
        length = 8 if kind == _DOUBLE else self._unsigned() if kind == _BINARY else -1
        if length < 0 or self.at + length > len(self.data):
            raise LookupError(f"type {kind} at byte {self.at}")
        self.at += length
        return self.data[self.at - length : self.at]

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _unsigned(self) -> int:
        found = shift = 0
        while True:
            byte = self._byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
            shift += 7
            if shift > 63:
                raise LookupError(f"an integer of more than 64 bits at byte {self.at}")

    def _integer(self) -> int:
        found = self._unsigned()
        return (found >> 1) ^ -(found & 1)
