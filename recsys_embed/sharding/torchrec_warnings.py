"""Suppression of TorchRec's warnings that users cannot act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _OnlyErrors(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


@contextmanager
def only_errors_of_torchrec() -> Iterator[None]:
    """Suppress log records below ERROR and deprecation warnings of TorchRec's planner and wrappers."""
    only_errors = _OnlyErrors()
    handlers = [*logging.getLogger().handlers, *([logging.lastResort] if logging.lastResort else [])]
    names = [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "torchrec"]
    loggers = [logging.getLogger(), *map(logging.getLogger, names)]
    for one in (*handlers, *loggers):
        one.addFilter(only_errors)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="torchrec")
            yield
    finally:
        for one in (*handlers, *loggers):
            one.removeFilter(only_errors)
