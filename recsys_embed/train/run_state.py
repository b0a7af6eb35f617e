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
    best_auc: float = -math.inf
    best_step: int = 0
    waited: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    samples: int = 0
    seconds: float = 0.0
    log_bytes: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def note_validation(self, metrics: dict[str, float], patience: int | None, min_delta: float) -> bool:
        """Record a validation; returns whether it is the best so far, and sets ``stopped`` when patience ends."""
        self.pending_validation = False
        self.history.append({"step": self.step, **metrics})
        # The first validation counts as best even where its AUC is NaN for want of a second class.
        better = len(self.history) == 1 or metrics["auc"] > self.best_auc + min_delta
        if better:
            self.best_auc, self.best_step, self.waited = metrics["auc"], self.step, 0
            return True
        self.waited += 1
        self.stopped = patience is not None and self.waited >= patience
        return False
