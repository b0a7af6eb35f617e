"""Every error the library raises on purpose: one root, each also a builtin so callers can catch either."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class RecsysEmbedError(Exception):
    """Root of the library's errors; its text is one message meant for the user."""


class ConfigError(RecsysEmbedError, ValueError):
    """A configuration or argument is outside what is allowed; names all faults at once."""


class UnknownNameError(ConfigError):
    """A name (method, model, key, column) is not known; names the nearest one that is."""


class BudgetError(RecsysEmbedError, ValueError):
    """A byte budget cannot be met; states what is required, what is available and the ways out."""


class IdRangeError(RecsysEmbedError, IndexError):
    """An id lies outside the range its feature declares."""


class DataError(RecsysEmbedError, ValueError):
    """Input data is malformed; names file, line, column and reason."""


class CheckpointError(RecsysEmbedError, RuntimeError):
    """A checkpoint is damaged or belongs to another configuration."""


class ExportError(RecsysEmbedError, RuntimeError):
    """A model cannot be written as a graph, or what was exported does not compute what it computes."""


class MissingDependencyError(RecsysEmbedError, ImportError):
    """An optional library is absent or of an incompatible version; names the fix."""


class BackendError(RecsysEmbedError, RuntimeError):
    """A kernel backend was asked for by name and cannot run; says why."""


def unknown_name(kind: str, got: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for an unknown name, with the nearest known one.

    >>> print(unknown_name("method", "hsh", ["hash", "full"]))
    unknown method 'hsh'; did you mean 'hash'? Known: full, hash
    """
    names = sorted(known)
    near = get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UnknownNameError(f"unknown {kind} {got!r}{hint} Known: {', '.join(names)}")


def raise_faults(faults: Sequence[str], where: str, error: type[RecsysEmbedError] = ConfigError) -> None:
    """Raise one error that lists every fault found in ``where``; do nothing if there is none."""
    if len(faults) == 1:
        raise error(f"{faults[0]} ({where})")
    if faults:
        raise error(
            f"{len(faults)} faults in {where}:\n" + "\n".join("  - " + f.replace("\n", "\n    ") for f in faults)
        )
