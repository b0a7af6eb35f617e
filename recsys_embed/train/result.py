"""Result of a training run: its metrics, or the error that ended it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from recsys_embed.errors import RecsysEmbedError
from recsys_embed.train.metrics import Metrics
from recsys_embed.utils.types import JSON


class DivergedError(RecsysEmbedError, ArithmeticError):
    """The loss became NaN or infinite; names the step and what to change."""


@dataclass(frozen=True)
class TrainResult:
    """Metrics of a run.

    ``samples_per_s`` covers loading, forward, backward and updates, not validation.
    """

    test: Metrics | None
    valid: Metrics | None
    steps: int
    best_step: int
    samples_per_s: float
    seconds: float
    history: list[dict[str, float]]

    def to_dict(self) -> JSON:
        return asdict(self)
