"""A study in a file of lines: what a kill or a full disk left of one is mended, what is none is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from recsys_embed.data.folder import StorageError

_TAIL = 1 << 16


class WholeLines(JournalFileSymlinkLock):
    """Whoever gets it finds a journal of whole lines: what a full disk or a kill left of one is cut off.

    Optuna would append to it, and the line made of two would be the end of the study.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    def acquire(self) -> bool:
        held = super().acquire()
        with open(self._path, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            start = end
            while start:
                step = min(start, _TAIL)
                file.seek(start - step)
                line = file.read(step).rfind(b"\n")
                if line >= 0:
                    start += line + 1 - step
                    break
                start -= step
            if start < end:
                file.truncate(start)
        return held


class Journal(JournalFileBackend):
    """A journal that says which of its lines is none."""

    def __init__(self, path: str, lock: WholeLines) -> None:
        super().__init__(path, lock)
        self._path = path

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        number = log_number_from
        try:
            for record in super().read_logs(log_number_from):
                number += 1
                if not isinstance(record, dict) or "op_code" not in record:
                    raise ValueError(f"no record of a study: {record!s:.40}")
                yield record
        except ValueError as e:
            raise StorageError(
                f"the study's storage {self._path} is damaged or no journal of a study: near line {number} ({e}); put "
                "back a copy, remove the lines that are no JSON of a record, or name another storage"
            ) from e
