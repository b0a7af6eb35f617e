"""Extensions from other distributions, found by entry points and imported at first need.

A distribution names the module that registers its method, model, search or update rule:

    [project.entry-points."recsys_embed.methods"]
    mymethod = "mypackage.mymethod"

A plugin that cannot be imported never keeps the library from working: it is told of by a warning, in the error about
the name it should have brought, and by ``recsys-embed doctor``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from recsys_embed.errors import UnknownNameError, unknown_name

METHODS, MODELS, RULES, SEARCHES = (f"recsys_embed.{kind}" for kind in ("methods", "models", "rules", "searches"))
GROUPS = (METHODS, MODELS, RULES, SEARCHES)


class Plugin(NamedTuple):
    """One entry point that was tried; ``fault`` says why it could not be imported, None where it could."""

    group: str
    name: str
    module: str
    distribution: str
    fault: str | None

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.module}, from {self.distribution})"


_TRIED: dict[str, list[Plugin]] = {}


def load_plugins(group: str) -> list[Plugin]:
    """Import what the entry points of ``group`` name, once per process, and say what became of each."""
    if group in _TRIED:
        return _TRIED[group]
    # Before anything is imported: a plugin's module asks for names itself.
    tried = _TRIED[group] = []
    for point in sorted(entry_points(group=group), key=lambda p: (p.name, p.value)):
        plugin = _imported(group, point)
        tried.append(plugin)
    # After all are tried: a warning may be made an error.
    for plugin in tried:
        if plugin.fault is not None:
            warnings.warn(f"{plugin} cannot be imported: {plugin.fault}", RuntimeWarning, stacklevel=2)
    return tried


def _imported(group: str, point: EntryPoint) -> Plugin:
    fault = None
    try:
        point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # whatever another's module does when it is imported
        fault = _told(e)
    dist = "an unnamed distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return Plugin(group, point.name, point.value, dist, fault)


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its text is another's code too
        return type(error).__name__


def unknown_plugin_name(kind: str, got: str, known: Iterable[str], group: str) -> UnknownNameError:
    """As :func:`recsys_embed.errors.unknown_name`, with the plugins of ``group`` that could not be imported."""
    broken = [f"{plugin} cannot be imported: {plugin.fault}" for plugin in load_plugins(group) if plugin.fault]
    return UnknownNameError("; ".join([str(unknown_name(kind, got, known)), *broken]))
