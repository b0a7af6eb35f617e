"""The file format, safetensors, read and written with the standard library and torch alone.

Eight bytes of header length, a JSON header padded with blanks, then the tensors without gaps. The metadata hold
the manifest and a digest of the header, computed with zeros in place of the digest's own 64 characters; the manifest
holds a digest of every tensor. The header's digest therefore covers the file, and any changed byte is detected.

Files may be malicious: nothing is allocated by sizes that a header claims, only by the size that the file has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.kernels.storage import advise_huge_pages
from recsys_embed.utils.strict_json import strict_json

MAX_HEADER = 32 << 20
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ALIGN = 64
_MAX_DIMS = 16  # numbers of many factors take long to multiply
_START = b'{"__metadata__":{"digest":"'
_ZEROS = b"0" * 64
_HUGEPAGE = 14  # MADV_HUGEPAGE of Linux
_NORESERVE = 0x4000  # MAP_NORESERVE of Linux: private pages that are never written need no swap


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file: name of its dtype, shape, and its byte range, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def lay_out(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> dict[str, TensorInfo]:
    """Offsets of tensors without gaps: wide dtypes first, so that each is aligned, otherwise in the given order."""
    entries, end = {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        size = prod(shape) * dtype.itemsize
        entries[name] = TensorInfo(NAMES[dtype], tuple(shape), end, end + size)
        end += size
    return entries


def header_bytes(manifest: Mapping[str, Any], entries: Mapping[str, TensorInfo], size: int = 0) -> bytes:
    """Length and header, padded to ``size`` bytes in all, or to what alignment needs.

    Raises:
        CheckpointError: longer than a reader accepts.
    """
    metadata = {"digest": _ZEROS.decode(), "format": "pt", "recsys_embed": _dump(manifest)}
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, e in entries.items():
        header[name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.stop]}
    text = _dump(header).encode()
    total = size or -(-(8 + len(text)) // _ALIGN) * _ALIGN
    if total - 8 > MAX_HEADER or total < 8 + len(text):
        raise CheckpointError(f"the header takes {len(text)} bytes; at most {min(total - 8, MAX_HEADER)} are possible")
    whole = (total - 8).to_bytes(8, "little") + text.ljust(total - 8)
    digest = hashlib.sha256(whole).hexdigest().encode()
    at = 8 + len(_START)
    return whole[:at] + digest + whole[at + 64 :]


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def parse_json(text: str | bytes, what: str, path: Path) -> Any:
    """JSON without repeated keys, NaN or infinities.

    Raises:
        CheckpointError: anything else; names file and reason.
    """
    try:
        return strict_json(text)
    except ValueError as e:
        raise CheckpointError(f"{path} is damaged: its {what} cannot be read: {e}") from e


class ExportFile:
    """An exported file, opened and checked for structure; tensors are views of it.

    Args:
        path: the file.
        memory_map: read tensors from the file as they are needed; otherwise read it whole now.

    Raises:
        ConfigError: ``path`` is no path.
        CheckpointError: absent, not an export, cut, or its header is damaged or contradicts itself.

    Attributes:
        manifest: the parsed manifest.
        entries: the tensors by name.
    """

    def __init__(self, path: str | Path, memory_map: bool = True) -> None:
        if not isinstance(path, str | os.PathLike):
            raise ConfigError(f"`path` must be the path of an exported file; got {type(path).__name__}")
        self.path = Path(path)
        if not os.path.isfile(self.path):
            run = "; it is a folder: `recsys-embed export` makes a file of a run" if os.path.isdir(self.path) else ""
            raise CheckpointError(f"no exported file at {self.path}{run}")
        with open(self.path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            header = self._header(f.read(8), f, size)
            self.entries, manifest = self._entries(header, size - f.tell())
            self.manifest = parse_json(manifest, "manifest", self.path)
            self._offset = f.tell()
            if memory_map and size > self._offset:
                self._buffer: Any = _map(f.fileno(), size)
            else:
                self._buffer, self._offset = self._read(f, size - self._offset), 0
        self.header_size = size - sum(e.stop - e.start for e in self.entries.values())

    def _read(self, file: BinaryIO, size: int) -> memoryview:
        """The rest of the file in memory, on huge pages where the system has them: rows are read several times as fast
        as from pages of a mapped file."""
        held = torch.empty(size, dtype=torch.uint8)
        advise_huge_pages(held)
        view = memoryview(cast("Any", held.numpy()))
        if file.readinto(view) != size:  # type: ignore[attr-defined]
            raise self._damaged("it became shorter while it was read")
        return view

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {why}")

    def _header(self, prefix: bytes, file: Any, size: int) -> Any:
        length = int.from_bytes(prefix, "little")
        text = file.read(length) if length <= min(MAX_HEADER, size - 8) else b""
        if _foreign(text):
            raise CheckpointError(
                f"{self.path} is a safetensors file, but not one that recsys_embed.export wrote; read it with "
                "safetensors.torch.load_file"
            )
        if len(prefix) < 8 or size < 8 + len(_START) + 64:
            raise self._damaged(f"{size} bytes are too few for a header; it may have been cut")
        if length > MAX_HEADER or 8 + length > size:
            raise CheckpointError(
                f"{self.path} is not an exported file, or damaged: its header claims {length} bytes; the file has "
                f"{size}, and headers at most {MAX_HEADER}"
            )
        at = len(_START)
        if not text.startswith(_START) or len(text) < at + 64:
            raise CheckpointError(f"{self.path} was not written by recsys_embed.exports, or its header is damaged")
        found = text[at : at + 64]
        wanted = hashlib.sha256(prefix + text[:at] + _ZEROS + text[at + 64 :]).hexdigest().encode()
        if found != wanted:
            raise self._damaged(f"header: expected digest {found[:16]!r}..., its content has {wanted[:16]!r}...")
        return parse_json(text, "header", self.path)

    def _entries(self, header: Any, room: int) -> tuple[dict[str, TensorInfo], str]:
        metadata = header.pop("__metadata__") if isinstance(header, dict) else None
        manifest = metadata.get("recsys_embed") if isinstance(metadata, dict) else None
        if not isinstance(manifest, str):
            raise self._damaged("its header holds no manifest")
        entries: dict[str, TensorInfo] = {}
        for name, item in header.items():
            try:
                (start, stop), shape = item["data_offsets"], item["shape"]
                if len(shape) > _MAX_DIMS:
                    raise ValueError
                numbers = [start, stop, *shape]
                if any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
                    raise ValueError
                entry = TensorInfo(item["dtype"], tuple(shape), start, stop)
                itemsize = DTYPES[entry.dtype].itemsize
            except (KeyError, TypeError, ValueError) as e:
                raise self._damaged(f"tensor {name!r} is described by {str(item)[:80]}") from e
            if prod(entry.shape) * itemsize != stop - start:
                raise self._damaged(
                    f"tensor {name!r}, {entry.dtype} {list(shape)}, takes {prod(entry.shape) * itemsize} bytes; its "
                    f"place {start} to {stop} has {stop - start}"
                )
            entries[name] = entry
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise self._damaged(f"tensor {name!r} begins at byte {entry.start}; the one before ends at {end}")
            if entry.start % DTYPES[entry.dtype].itemsize:
                raise self._damaged(f"tensor {name!r} of {entry.dtype} begins at byte {entry.start}, not aligned")
            end = entry.stop
        if end != room:
            cut = "it was cut" if room < end else "something was added"
            raise self._damaged(f"its tensors take {end} bytes; it holds {room} ({cut})")
        return entries, manifest

    def verify(self, digests: Mapping[str, str]) -> None:
        """Compare every tensor with its digest.

        Raises:
            CheckpointError: names the first tensor whose bytes are others.
        """
        view = memoryview(self._buffer)
        for name, entry in self.entries.items():
            found = hashlib.sha256(view[self._offset + entry.start : self._offset + entry.stop]).hexdigest()
            if found != digests[name]:
                raise self._damaged(
                    f"tensor {name!r}, bytes {entry.start} to {entry.stop}: expected SHA-256 {digests[name][:16]}..., "
                    f"got {found[:16]}..."
                )

    def tensor(self, name: str) -> Tensor:
        """A tensor, as a view of the file where it is mapped: writing to it changes memory, not the file."""
        entry = self.entries[name]
        return self._view(entry.dtype, entry.start, prod(entry.shape)).view(entry.shape)

    def run(self, names: Sequence[str]) -> Tensor:
        """Tensors of one type that stand end to end, as one flat tensor.

        Raises:
            CheckpointError: they do not.
        """
        entries = [self.entries[n] for n in names]
        for name, before, entry in zip(names[1:], entries, entries[1:], strict=False):
            if before.stop != entry.start or before.dtype != entry.dtype:
                raise self._damaged(f"tensor {name!r} does not follow the table before it")
        return self._view(entries[0].dtype, entries[0].start, sum(prod(e.shape) for e in entries))

    def _view(self, dtype: str, start: int, count: int) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=DTYPES[dtype])
        return torch.frombuffer(self._buffer, dtype=DTYPES[dtype], count=count, offset=self._offset + start)


class LargeWrites:
    """Gathers what is written to a file into pieces of 4 MiB that end at multiples of it.

    File caches of Linux take pages as large as a write covers, and huge pages are read several times as fast by rows.

    Args:
        file: where it begins to write, at its position.
    """

    _SIZE = 4 << 20  # twice a huge page; larger pieces are no faster

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._held = file, memoryview(bytearray(self._SIZE))
        self._first = self._end = file.tell() % self._SIZE

    def write(self, data: memoryview) -> int:
        """Take bytes; how many they are."""
        size = len(data)
        while len(data):
            count = min(len(data), self._SIZE - self._end)
            self._held[self._end : self._end + count] = data[:count]
            self._end, data = self._end + count, data[count:]
            if self._end == self._SIZE:
                self.flush()
        return size

    def flush(self) -> None:
        """Write what is held."""
        self._file.write(self._held[self._first : self._end])
        self._first = self._end = self._end % self._SIZE


def _foreign(text: bytes) -> bool:
    """Whether a header is of a safetensors file that this library did not write."""
    if text.startswith(_START) or b'"recsys_embed"' in text:
        return False
    try:
        header = strict_json(text)
    except ValueError:
        return False
    return isinstance(header, dict) and all(
        name == "__metadata__" or (isinstance(item, dict) and "data_offsets" in item) for name, item in header.items()
    )


def _map(fd: int, size: int) -> mmap.mmap:
    """The file mapped privately (copy on write), because torch does not accept read-only memory.

    On huge pages where the system's file cache holds them: of ext4, XFS and tmpfs on recent kernels of Linux.
    """
    if sys.platform.startswith("linux"):
        flags = mmap.MAP_PRIVATE | _NORESERVE
        mapped = mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapped.madvise(_HUGEPAGE)
        return mapped
    return mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
