"""A lock that copies and pickles."""

from __future__ import annotations

import threading
from typing import Any


class Lock:
    """A reentrant lock; a copy or a pickle of it is a new one, not held."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()
