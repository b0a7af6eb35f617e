"""Optuna's journal file with repair: truncated last lines are removed, other damage is reported with its line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from recsys_embed.data.folder import StorageError

_TAIL = 1 << 16


class RepairingLock(JournalFileSymlinkLock):
    """A lock that, once acquired, removes a truncated last line that a kill or a full disk left in the journal.

    Optuna would append to the truncated line, and the joined line would make the study unreadable.
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


class CheckedJournal(JournalFileBackend):
    """A journal that reports the number of a damaged line."""

    def __init__(self, path: str, lock: RepairingLock) -> None:
        super().__init__(path, lock)
        self._path = path

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        number = log_number_from
        try:
            for record in super().read_logs(log_number_from):
                number += 1
                if not isinstance(record, dict) or "op_code" not in record:
                    raise ValueError(f"not a record of a study: {record!s:.40}")
                yield record
        except ValueError as e:
            raise StorageError(
                f"the study's storage {self._path} is damaged or not a journal of a study: near line {number} ({e}); "
                "put back a copy, remove the lines that are not a JSON record, or name another storage"
            ) from e
