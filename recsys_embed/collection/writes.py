"""Writes to tables by others, while steps of their rows are deferred: torch counts the writes to a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from recsys_embed.errors import ConfigError
from recsys_embed.kernels.deferred_steps import StepLog


def note_writes(logs: Mapping[str, StepLog], tables: Sequence[Tensor | None]) -> None:
    """Remember how often tables have been written to; ``logs`` are theirs, in order."""
    for log, table in zip(logs.values(), tables, strict=True):
        log.writes = None if table is None or table.is_inference() else table._version


def refuse_writes(logs: Mapping[str, StepLog], tables: Sequence[Tensor | None]) -> None:
    """Refuse to apply deferred steps where others have written to a table since :func:`note_writes`.

    Raises:
        ConfigError: says so, once; from then on the deferred steps are those of what was written.
    """
    found = []
    for (name, log), table in zip(logs.items(), tables, strict=True):
        if table is not None and log.rates and log.writes not in (None, table._version):
            log.writes = None
            found.append(name)
    if found:
        raise ConfigError(
            f"{', '.join(found)} was changed in place while steps of its rows were deferred (rows='all'), which "
            "would now change what was written; call catch_up_() of the collection before you write to a "
            "parameter that you hold, or take it from model.parameters() each time"
        )
