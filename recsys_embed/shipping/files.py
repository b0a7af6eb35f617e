"""A file that is whole or not there: written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from recsys_embed.errors import CheckpointError, ConfigError


@contextmanager
def replacing(path: str | Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file beside ``path``, open for writing, and its present name; it takes its place when the block ends well.

    Until then, and after any error, ``path`` is what it was. Every call has a name of its own, so several may write to
    one path; the last to end wins.

    Raises:
        ConfigError: ``path`` is a folder, a device or a pipe.
        CheckpointError: writing failed, e.g. the disk is full; says why.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"`path` must be the path of a file to write; got {type(path).__name__}")
    path = Path(path)
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a folder; name the file to export to")
    if os.path.exists(path) and not os.path.isfile(path):
        # A rename would put a file in the place of the device itself.
        raise ConfigError(f"{path} is a device or a pipe; name the file to export to")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with open(descriptor, "w+b") as f:
            yield f, temporary
            f.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as e:
        reason = e.strerror or str(e)
        raise CheckpointError(f"{path} could not be written: {reason}; what was there before is untouched") from e
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
