"""Atomic writes of files, and a lock that allows one writer per folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from recsys_embed.errors import RecsysEmbedError
from recsys_embed.utils.files import replacing

SCHEMA_FILE = "schema.json"
STATS_FILE = "stats.json"
WORK_DIR = ".work"
LOCK_FILE = ".lock"
TEXT_FILE, TRUTH_FILE, CHANCE_FILE = "synthetic.tsv", "truth.json", "truth.parquet"
_TRIES = 9
OUR_FILES = frozenset({LOCK_FILE, STATS_FILE, TEXT_FILE, TRUTH_FILE, CHANCE_FILE})


class StorageError(RecsysEmbedError, OSError):
    """A folder cannot be written: full, read-only, or in use by another process."""


def storage_error(path: Path, error: BaseException) -> StorageError:
    """A StorageError for a failed write, with advice."""
    why = getattr(error, "strerror", None) or str(error)
    hint = "free some space or choose another folder, then run the same command again: it continues where it stopped"
    return StorageError(f"{path}: cannot be written ({why}); {hint}")


def boot_id() -> str | None:
    """Names the time since the machine started, or None where the system does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None


def write_file(path: Path, write: Callable[[Path], None], *, durable: bool = True) -> None:
    """Let ``write`` fill a file by the name it is given, which takes the place of ``path`` when it is whole.

    ``durable=False`` leaves out the flush to disk, see :func:`recsys_embed.utils.files.replacing`. It is for work that
    is discarded after a restart of the machine, which :func:`boot_id` tells.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with replacing(path, failed=storage_error, durable=durable or boot_id() is None) as (_, temporary):
        try:
            write(temporary)
        except Exception as e:
            if type(e).__module__.startswith("polars"):
                raise storage_error(path, e) from e
            raise


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Atomic write of bytes."""
    with replacing(path, failed=storage_error, durable=durable or boot_id() is None) as (file, _):
        file.write(data)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Atomic write of JSON, the same bytes for the same value."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), durable=durable)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class FolderHeldError(StorageError):
    """Another process holds the lock of the folder; the message names it."""


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder for this process; the lock ends with the process, also if it is killed.

    Args:
        folder: made if need be; whoever holds it may remove it.
        wait: until another process lets go of it.

    Raises:
        FolderHeldError: another process holds it.
        StorageError: the folder cannot be made.
    """
    handle = _held(folder, wait)
    try:
        handle.seek(0)
        handle.truncate()
        handle.write(str(os.getpid()))
        handle.flush()
        yield
    finally:
        handle.close()


def _held(folder: Path, wait: bool) -> IO[str]:
    """The folder's lock file, locked."""
    import fcntl

    missed = 0
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = (folder / LOCK_FILE).open("a+")
        except OSError as e:
            # The holder may remove the folder just as it is opened.
            missed += 1
            if isinstance(e, FileNotFoundError) and missed < _TRIES:
                continue
            raise storage_error(folder, e) from e
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as e:
            with handle:
                handle.seek(0)
                who = handle.read().strip() or "unknown"
            raise FolderHeldError(
                f"{folder}: another process (pid {who}) is writing this folder; wait for it, or choose another folder"
            ) from e
        # A file that its holder removed is no lock: others make a new one.
        if os.fstat(handle.fileno()).st_nlink:
            return handle
        handle.close()
