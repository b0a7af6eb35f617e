"""State of a run: position in the data, validation history and early stopping."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunState:
    """The values that, with the tensors of a checkpoint, determine how a run continues.

    ``pending_validation`` is set when a validation is due and cleared when it is done, so that a run stopped between
    the two validates first when it resumes.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    pending_validation: bool = False
    stopped: bool = False
    best_score: float = -math.inf
    best_step: int = 0
    waited: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    samples: int = 0
    seconds: float = 0.0
    log_bytes: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunState:
        """Inverse of :meth:`to_dict`; earlier versions compared validations by AUC alone."""
        known = dict(values)
        if "best_auc" in known:
            known["best_score"] = known.pop("best_auc")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def note_validation(self, metrics: dict[str, float], score: float, patience: int | None, min_delta: float) -> bool:
        """Record a validation; returns whether it is the best so far, and sets ``stopped`` when patience ends.

        Args:
            metrics: to keep.
            score: what it is compared by, see :class:`recsys_embed.train.metrics.Metrics`.
            patience: validations without gain until the run stops.
            min_delta: gain that counts.
        """
        self.pending_validation = False
        self.history.append({"step": self.step, **metrics})
        # Written so that NaN, which a run of an earlier version may have kept as its best, never stays the best.
        better = not score <= self.best_score + min_delta
        if better:
            self.best_score, self.best_step, self.waited = score, self.step, 0
            return True
        self.waited += 1
        self.stopped = patience is not None and self.waited >= patience
        return False
