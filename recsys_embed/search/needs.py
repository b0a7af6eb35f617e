"""What studies need beyond this library."""

from __future__ import annotations

from typing import Any

from recsys_embed.utils.optional import require


def require_optuna() -> Any:
    """Optuna, which then tells only of what goes wrong.

    Raises:
        MissingDependencyError: it is not installed; says what installs it.
    """
    optuna = require("optuna", extra="search", purpose="a study")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
