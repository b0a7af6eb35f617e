"""Deprecated: aliases for names that moved to other modules."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

_HOME = {
    "LEAST_OF_A_CLASS": "checks",
    "Search": "base",
    "SearchOutcome": "outcome",
    "need_classes": "checks",
    "need_validation": "checks",
    "run_search": "run",
    "total_budget": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"recsys_embed.search.{_HOME[name]}"
    warnings.warn(f"{name} is no longer in {__name__}; import it from {home}", DeprecationWarning, stacklevel=2)
    return getattr(import_module(home), name)
