"""A file that is whole or not there: written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from recsys_embed.errors import CheckpointError, ConfigError

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(path: str | Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file beside ``path``, open for writing, and its present name; it takes its place when the block ends well.

    Until then, and after any error, ``path`` is what it was. Every call has a name of its own, so several may write to
    one path; the last to end wins. What killed ones left beside it is removed.

    Raises:
        ConfigError: ``path`` is a folder, a device or a pipe, or no name that a file can have.
        CheckpointError: writing failed, e.g. the disk is full; says why.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"`path` must be the path of a file to write; got {type(path).__name__}")
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"`path` must not hold NUL characters; got {str(path)!r:.200}")
    try:
        _check_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _create(path)
    except OSError as e:
        raise _unwritten(path, e) from e
    # A lock lives as long as what holds it, so that others can tell this file from one of a process that is dead; it
    # outlives the closing of the file, up to the renaming.
    lock = os.dup(descriptor)
    try:
        with open(descriptor, "w+b") as f:
            _sweep(path)
            yield f, temporary
            f.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as e:
        raise _unwritten(path, e) from e
    finally:
        with suppress(OSError):
            temporary.unlink()
        os.close(lock)


def _check_place(path: Path) -> None:
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a folder; name the file to export to")
    if os.path.exists(path) and not os.path.isfile(path):
        # A rename would put a file in the place of the device itself.
        raise ConfigError(f"{path} is a device or a pipe; name the file to export to")


def _unwritten(path: Path, error: OSError) -> CheckpointError:
    reason = error.strerror or str(error)
    return CheckpointError(f"{path} could not be written: {reason}; what was there before is untouched")


def _create(path: Path) -> tuple[Path, int]:
    """A new file beside ``path``, open and locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        _lock(descriptor, wait=True)
        # Before it was locked another exporter may have taken it for a dead one's.
        if os.path.exists(temporary):
            return temporary, descriptor
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock was free; no where the file system, or the operating system, has none."""
    if sys.platform == "win32":
        return False
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _sweep(path: Path) -> None:
    """Remove files of exporters to ``path`` that are no longer alive, which no one has locked."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    for name in os.listdir(path.parent):
        if ours.fullmatch(name) is None:
            continue
        with suppress(OSError):
            stale = os.open(path.parent / name, os.O_RDONLY)
            try:
                if _lock(stale, wait=False):
                    os.unlink(path.parent / name)
            finally:
                os.close(stale)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
