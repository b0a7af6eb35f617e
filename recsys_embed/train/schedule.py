"""Learning rates over time: one factor that scales the dense optimizer and the fused one alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from recsys_embed.train.config import TrainConfig


@dataclass
class Schedule:
    """Factor of the peak learning rate at each step.

    Args:
        config: ``schedule``, ``warmup_steps``, ``final_factor``, ``plateau_factor``, ``plateau_patience``.
        total_steps: length of the run; where ``cosine`` reaches its end.

    >>> schedule = Schedule(TrainConfig(schedule="cosine", warmup_steps=2), total_steps=12)
    >>> [round(schedule.factor(s), 3) for s in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    config: TrainConfig
    total_steps: int
    scale: float = 1.0
    best: float = -math.inf
    waited: int = 0

    def factor(self, step: int) -> float:
        """Factor for the step with index ``step`` (0 is the first)."""
        c = self.config
        if step < c.warmup_steps:
            return self.scale * (step + 1) / c.warmup_steps
        if c.schedule != "cosine":
            return self.scale
        progress = (step - c.warmup_steps) / max(1, self.total_steps - c.warmup_steps)
        return c.final_factor + (1 - c.final_factor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def on_validation(self, score: float) -> None:
        """Tell a ``plateau`` schedule the latest validation's score, larger is better."""
        if self.config.schedule != "plateau":
            return
        if not score <= self.best + self.config.min_delta:
            self.best, self.waited = score, 0
            return
        self.waited += 1
        if self.waited >= self.config.plateau_patience:
            self.scale, self.waited = self.scale * self.config.plateau_factor, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.best, self.waited = state["scale"], state["best"], state["waited"]
