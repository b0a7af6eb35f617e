"""Warnings about names that have changed and are accepted for one version more."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

_INNER = ("recsys_embed", "abc", "dataclasses", "importlib")


def warn_deprecated(message: str) -> None:
    """A DeprecationWarning for the line outside this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in _INNER:
            break
        level += not module.startswith("importlib._bootstrap")  # the warnings module leaves these out as well
        frame = frame.f_back
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def warn_renamed(kind: str, old: str, new: str) -> None:
    """Say that a name has changed.

    >>> import pytest
    >>> with pytest.warns(DeprecationWarning, match="use 'initializer'"):
    ...     warn_renamed("option of MultihashConfig", "law", "initializer")
    """
    warn_deprecated(f"{kind} {old!r} is now called {new!r}; use {new!r}: the earlier name goes in the next version")


def earlier_names(module: str, today: Mapping[str, str]) -> Callable[[str], Any]:
    """``__getattr__`` of a module whose names stand elsewhere today: it finds them there, and warns.

    Args:
        module: its name.
        today: by earlier name, the module of today below this package and the name in it.

    >>> import pytest
    >>> find = earlier_names("recsys_embed.run", {"lock": "data.folder.lock"})
    >>> with pytest.warns(DeprecationWarning, match="import it from recsys_embed.data.folder"):
    ...     find("lock").__module__
    'recsys_embed.data.folder'
    """

    def find(name: str) -> Any:
        if name not in today:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, current = f"{_INNER[0]}.{today[name]}".rpartition(".")
        renamed = "" if current == name else f" as {current}"
        warn_deprecated(f"{name} is no longer in {module}; import it from {home}{renamed}")
        return getattr(import_module(home), current)

    return find


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
            # Programs are built by the ten thousand in planning, with the names of today.
            for earlier in () if names.keys().isdisjoint(given) else [name for name in names if name in given]:
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
