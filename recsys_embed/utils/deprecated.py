"""Warnings about names that have changed and are accepted for one version more."""

from __future__ import annotations

import sys
import warnings

_INNER = ("recsys_embed", "abc", "dataclasses")


def warn_deprecated(message: str) -> None:
    """A DeprecationWarning for the line outside this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def warn_renamed(kind: str, old: str, new: str) -> None:
    """Say that a name has changed.

    >>> import pytest
    >>> with pytest.warns(DeprecationWarning, match="use 'initializer'"):
    ...     warn_renamed("option of MultihashConfig", "law", "initializer")
    """
    warn_deprecated(f"{kind} {old!r} is now called {new!r}; use {new!r}: the earlier name goes in the next version")
