"""Files that are whole or absent: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from recsys_embed.errors import ConfigError


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a temporary file, then rename it to ``path``; a crash leaves the previous file whole.

    Raises:
        ConfigError: ``path`` is a folder, a device or a pipe, or holds a NUL character.
        OSError: writing failed; its ``filename`` says where.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"the path of a file must not hold NUL characters; got {str(path)!r:.200}")
    if os.path.exists(path) and not os.path.isfile(path):
        # A rename would put a file in the place of a device such as /dev/null.
        raise ConfigError(f"{path} is a folder, a device or a pipe; name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        # A write's says only that the disk is full. With a file name an error that has a text alone would lose it.
        if e.filename is None and e.errno is not None:
            e.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def drop_temporaries(folder: Path, age: float = 0.0) -> None:
    """Remove what processes killed over an :func:`atomic_write` left in a folder.

    Args:
        folder: this process's alone, or
        age: so many seconds old at least, where others write small files there.
    """
    for stale in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - stale.stat().st_mtime >= age:
                stale.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; numbers that JSON lacks (NaN) are errors."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, atomically."""

    def write(file: IO[bytes]) -> None:
        file.write(text.encode())

    atomic_write(path, write)
