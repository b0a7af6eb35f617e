"""Optuna, which studies alone need: imported at first use, its log restricted to warnings."""

from __future__ import annotations

from typing import Any

from recsys_embed.utils.optional import require


def require_optuna() -> None:
    """Import Optuna and restrict its log to warnings.

    Raises:
        MissingDependencyError: it is not installed; says how to get it.
    """
    optuna: Any = require("optuna", extra="search", purpose="a study")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
