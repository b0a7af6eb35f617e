"""Sequential reading of a plain, gzip or zstandard file, with detection of truncated archives."""

from __future__ import annotations

import zlib
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

from recsys_embed.errors import DataError
from recsys_embed.utils.optional import require

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_INPUT = {"gzip": 64 << 10, "zstd": 1 << 10}
"""Compressed bytes per call; few for zstd, whose decoder makes up to 32 MiB of them and does not bound the output."""
_OUTPUT = 4 << 20


class _Decoder(Protocol):
    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes) -> bytes: ...


class _GzipDecoder:
    """A zlib decoder whose calls give ``_OUTPUT`` bytes at most; what it has not come to it takes up at the next."""

    def __init__(self) -> None:
        self._zlib, self.eof, self.unused_data, self.rest = zlib.decompressobj(31), False, b"", b""

    def decompress(self, data: bytes) -> bytes:
        out = self._zlib.decompress(self.rest + data if self.rest else data, _OUTPUT)
        self.rest, self.eof, self.unused_data = self._zlib.unconsumed_tail, self._zlib.eof, self._zlib.unused_data
        return out


class Reader:
    """A file's decompressed bytes; the form is recognised by content, so a wrong suffix does no harm.

    ``position`` is how far the file on disk has been read, ``fault`` what is wrong with the archive once its end (or
    the damage) has been reached, else None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.fault: str | None = None
        try:
            self._file = path.open("rb")
            magic = self._file.peek(4)[:4]
        except OSError as e:
            raise DataError(f"{path}: cannot be read ({e.strerror or e})") from e
        self.kind = "gzip" if magic.startswith(_GZIP) else "zstd" if magic == _ZSTD else "plain"
        self._zstd = require("zstandard", extra="data", purpose="reading .zst files") if self.kind == "zstd" else None
        self._decoder: _Decoder | None = None if self.kind == "plain" else self._new()
        self._held: deque[bytes] = deque()
        self._start = 0  # what of the first was handed out
        self._ended = False

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes, fewer only at the end (then look at ``fault``)."""
        if self.kind == "plain":
            data = self._raw(size)
            return data
        taken: list[bytes] = []
        while size > 0 and (self._held or not self._ended):
            if not self._held:
                self._inflate()
                continue
            piece = self._held[0][self._start : self._start + size]
            self._start, size = self._start + len(piece), size - len(piece)
            taken.append(piece)
            if self._start == len(self._held[0]):
                self._held.popleft()
                self._start = 0
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def skip(self, offset: int) -> None:
        """Move forward to a decompressed offset."""
        if self.kind == "plain":
            self._file.seek(offset)
            self.position = offset
            return
        while offset > 0:
            got = len(self.read(min(offset, 8 << 20)))
            if not got:
                raise DataError(f"{self.path}: is shorter than when its conversion began; use --restart")
            offset -= got

    def _raw(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as e:
            raise DataError(f"{self.path}: cannot be read at byte {self.position} ({e.strerror or e})") from e
        self.position += len(data)
        return data

    def _new(self) -> _Decoder:
        decoder: Any = self._zstd.ZstdDecompressor().decompressobj() if self._zstd else _GzipDecoder()
        return cast("_Decoder", decoder)

    def _inflate(self) -> None:
        decoder = self._decoder or self._new()
        pending = getattr(decoder, "rest", b"")
        data = b"" if pending else self._raw(_INPUT[self.kind])
        if not data and not pending:
            self._ended = True
            self.fault = f"the {self.kind} archive is cut off: its end is missing"
            return
        errors = (zlib.error,) if self._zstd is None else (self._zstd.ZstdError,)
        try:
            while True:
                out = decoder.decompress(data)
                if out:
                    self._held.append(out)
                if not decoder.eof:
                    return
                # Archives may be several members long, with zeros between and after them.
                data = decoder.unused_data.lstrip(b"\0")
                while not data:
                    more = self._raw(_INPUT[self.kind])
                    if not more:
                        self._ended = True
                        return
                    data = more.lstrip(b"\0")
                decoder = self._decoder = self._new()
        except errors as e:
            self._ended = True
            self.fault = f"the {self.kind} archive is damaged ({e})"
