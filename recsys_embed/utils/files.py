"""Files that are whole or absent: written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal
from zipfile import ZipFile, is_zipfile

from recsys_embed.errors import ConfigError, RecsysEmbedError

if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")


def _named(path: Path, error: OSError) -> OSError:
    """The error with the name of the file; that of a write says only that the disk is full."""
    # With a file name an error that has a text alone would lose it.
    if error.filename is None and error.errno is not None:
        error.filename = str(path)
    return error


@contextmanager
def replacing(
    path: str | Path, *, failed: Callable[[Path, OSError], Exception] = _named, durable: bool = True
) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file beside ``path``, open for writing, and its present name; it takes its place when the block ends well.

    Until then, and after any error, ``path`` is what it was. Every call has a name of its own, so several may write to
    one path; the last to end wins. What killed ones left beside it is removed.

    Args:
        path: of the file; folders above it are made.
        failed: makes the error of an OSError in the block or in writing, by default the same with the file's name.
        durable: False leaves out the flush to disk and the removal of what others left: the file outlives the process
            but perhaps not a power cut. It is for the many small files of a folder that is removed as a whole.

    Raises:
        ConfigError: ``path`` is a folder, a device or a pipe, or no name that a file can have.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"`path` must be the path of a file to write; got {type(path).__name__}")
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"`path` must not hold NUL characters; got {str(path)!r:.200}")
    if os.path.exists(path) and not os.path.isfile(path):
        # A rename would put a file in the place of a device such as /dev/null.
        raise ConfigError(f"{path} is a folder, a device or a pipe; name a file to write")
    with _translated(path, failed):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _create(path)
    # A lock lives as long as what holds it, so that others can tell this file from one of a process that is dead; it
    # outlives the closing of the file, up to the renaming.
    lock = os.dup(descriptor)
    try:
        with _translated(path, failed):
            with open(descriptor, "w+b") as f:
                if durable:
                    drop_leftovers(path.parent, path.name)
                yield f, temporary
                f.flush()
                if durable:
                    os.fsync(descriptor)
            os.replace(temporary, path)
            if durable:
                _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()
        os.close(lock)


@contextmanager
def _translated(path: Path, failed: Callable[[Path, OSError], Exception]) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        error = e if isinstance(e, RecsysEmbedError) else failed(path, e)
        if error is e:
            raise
        raise error from e


def _create(path: Path) -> tuple[Path, int]:
    """A new file beside ``path``, open and locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        _lock(descriptor, wait=True)
        # Before it was locked another writer may have taken it for a dead one's.
        if os.path.exists(temporary):
            return temporary, descriptor
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool | None:
    """Whether the lock was free; None where the file system, or the operating system, has no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move_into_place(files: Sequence[Path], folder: Path) -> None:
    """Flush finished files to disk and rename them into ``folder``, on the same file system, the first one last.

    Raises:
        OSError: one could not be; those before it are in place.
    """
    for file in files:
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
    for file in reversed(files):
        os.replace(file, folder / file.name)
    _sync_folder(folder)


def drop_leftovers(folder: Path, name: str | None = None, *, age: float = 0.0) -> None:
    """Remove what writers that are no longer alive left in a folder: files that no one has locked.

    Args:
        folder: where they wrote.
        name: of the file that they wrote; None: any, for a folder that this process alone writes to, which is cleaned
            on file systems without locks too.
        age: so many seconds old at least, where others may write to the folder all the same.
    """
    # A folder to come holds nothing.
    for entry in os.listdir(folder) if os.path.isdir(folder) else ():
        found = _TEMPORARY.fullmatch(entry)
        # Earlier versions had the process in the name in place of the random number, and no lock.
        former = found is None and name is None and re.fullmatch(r"\..+\.[0-9]+\.tmp", entry) is not None
        if not former and (found is None or name not in (None, found[1])):
            continue
        with suppress(OSError):
            stale = os.open(folder / entry, os.O_RDONLY)
            try:
                free = _lock(stale, wait=False)
                if time.time() - os.fstat(stale).st_mtime >= age and (free or (free is None and name is None)):
                    os.unlink(folder / entry)
            finally:
                os.close(stale)


def final_name(name: str) -> str:
    """The name that a file being written will have; other names stay as they are.

    >>> final_name(".stats.json.0123456789abcdef.tmp"), final_name("notes.txt")
    ('stats.json', 'notes.txt')
    """
    found = _TEMPORARY.fullmatch(name)
    return name if found is None else found[1]


def file_form(path: Path) -> Literal["json", "safetensors", "torch"]:
    """The form of a file by its content, whatever its name; by its suffix where the content is damaged."""
    with open(path, "rb") as file:
        head = file.read(64)
    # safetensors: the length of a JSON header in 8 bytes, little-endian, and the header.
    if head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= os.path.getsize(path):
        return "safetensors"
    if head.startswith(b"PK"):  # a zip file, as torch writes it
        return "torch"
    if path.suffix == ".safetensors":
        return "safetensors"
    if head.startswith(b"\x80"):  # a pickle, as torch wrote it before
        return "torch"
    return "json" if path.suffix == ".json" or head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{" else "torch"


def check_packing(path: Path) -> None:
    """Refuse a zip file, as torch writes it, whose parts would take more memory than the file has bytes.

    Raises:
        ValueError: says how much.
        OSError: the file cannot be read.
        BadZipFile: it is cut off or damaged.
    """
    if not is_zipfile(path):
        return
    with ZipFile(path) as archive:
        total = sum(part.file_size for part in archive.infolist())
    size = path.stat().st_size
    if total > size:
        raise ValueError(f"its parts take {total} bytes, more than the {size} of the file: write it with torch.save")


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that takes the place of ``path`` when it is whole, see :func:`replacing`.

    Raises:
        ConfigError: ``path`` is a folder, a device or a pipe, or holds a NUL character.
        OSError: writing failed; its ``filename`` says where.
    """
    with replacing(path) as (file, _):
        write(file)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; numbers that JSON lacks (NaN) are errors."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
