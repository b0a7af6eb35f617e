"""Training: settings, loop, exact metrics, checkpoints and comparisons of methods."""

from __future__ import annotations

from recsys_embed.train.config import TrainConfig
from recsys_embed.train.evaluation import evaluate
from recsys_embed.train.loop import Trainer
from recsys_embed.train.metrics import BinaryMetrics, Metrics, RealMetrics
from recsys_embed.train.ranking_metrics import exact_auc
from recsys_embed.train.result import DivergedError, TrainResult
from recsys_embed.train.run import run_training
from recsys_embed.train.stop_request import Interrupted
from recsys_embed.train.warm_start import settings_of_run

__all__ = [
    "BinaryMetrics",
    "DivergedError",
    "Interrupted",
    "Metrics",
    "RealMetrics",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "evaluate",
    "exact_auc",
    "run_training",
    "settings_of_run",
]
