"""Warnings about names that have changed and are accepted for one version more."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

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


def renamed_fields(**names: str) -> Callable[[C], C]:
    """Class decorator: constructor arguments and attributes under their earlier names, which warn.

    Args:
        names: the name of today by the earlier one.

    >>> import pytest
    >>> from dataclasses import dataclass
    >>> @renamed_fields(run="num_rows")
    ... @dataclass(frozen=True)
    ... class Read:
    ...     num_rows: int = 1
    >>> with pytest.warns(DeprecationWarning, match="use 'num_rows'"):
    ...     Read(run=3), Read(3).run
    (Read(num_rows=3), 3)
    """

    def decorated(cls: C) -> C:
        made = cls.__init__  # type: ignore[misc]

        @wraps(made)
        def __init__(self: Any, *args: Any, **given: Any) -> None:
            for earlier in [name for name in names if name in given]:
                if names[earlier] in given:
                    raise TypeError(f"`{earlier}` is the earlier name of `{names[earlier]}`; give one")
                warn_renamed(f"argument of {cls.__name__}", earlier, names[earlier])
                given[names[earlier]] = given.pop(earlier)
            made(self, *args, **given)

        cls.__init__ = __init__  # type: ignore[misc]
        for earlier, name in names.items():
            setattr(cls, earlier, property(_reader(cls.__name__, earlier, name)))
        return cls

    return decorated


def _reader(owner: str, earlier: str, name: str) -> Callable[[object], object]:
    def read(self: object) -> object:
        warn_renamed(f"attribute of {owner}", earlier, name)
        return getattr(self, name)

    return read
