"""What searches and studies compare candidates by: AUC, RMSE of real labels, or NDCG of retrieval models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from recsys_embed.errors import ConfigError
from recsys_embed.models import RetrievalModel, get_model
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.losses import LOSSES
from recsys_embed.train.metrics import Metrics

QualityKey = Literal["auc", "rmse", "ndcg"]


@dataclass(frozen=True)
class Quality:
    """A metric of the validation rows.

    Args:
        key: what objectives and results call it.
        label: what people call it.
        logged: its key in the log of a run.
        rises: whether larger is better.

    >>> quality_of(TrainConfig(loss="squared_error")).best([0.9, 0.8])
    0.8
    """

    key: QualityKey
    label: str
    logged: str
    rises: bool = True

    def of(self, metrics: Metrics | None) -> float:
        """Its value.

        Raises:
            ConfigError: the rows have none.
        """
        value = None if metrics is None else metrics.logged().get(self.logged)
        if value is None or math.isnan(value):
            why = "hold no positive whose item can be found" if self.key == "ndcg" else "are of one class"
            raise ConfigError(f"the validation rows {why}, so they have no {self.label}; use more of them")
        return float(value)

    def score(self, value: float) -> float:
        """The value with the sign with which larger is better."""
        return value if self.rises else -value

    def best(self, values: list[float]) -> float:
        """The best of some values."""
        return max(values, key=self.score)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for results that are read later."""
        return {"key": self.key, "label": self.label, "rises": self.rises}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quality:
        """Of :meth:`to_dict`."""
        return cls(data["key"], data["label"], data["key"], data["rises"])


AUC = Quality("auc", "AUC", "auc")
RMSE = Quality("rmse", "RMSE", "rmse", rises=False)


def quality_of(config: TrainConfig) -> Quality:
    """What runs of these settings are compared by: the metric that validations go by.

    >>> quality_of(TrainConfig()).label, quality_of(TrainConfig(model="twotower", loss="bpr", top_k=(5,))).label
    ('AUC', 'NDCG@5')
    """
    if LOSSES[config.loss].real_labels:
        return RMSE
    if issubclass(get_model(config.model), RetrievalModel):
        k = config.top_k[0]
        return Quality("ndcg", f"NDCG@{k}", f"ndcg@{k}")
    return AUC


def metrics_text(metrics: Metrics) -> str:
    """The metrics that the rows have, in words.

    >>> metrics_text(Metrics(0.75, 0.5, 1.0, samples=1000, positives=10))
    'AUC 0.7500, logloss 0.5000'
    """
    if metrics.rmse is not None:
        return f"RMSE {metrics.rmse:.4f}"
    found = [("AUC", metrics.auc), ("logloss", metrics.logloss)]
    for name, values in (("recall", metrics.recall), ("NDCG", metrics.ndcg)):
        found += [(f"{name}@{k}", value) for k, value in (values or {}).items()]
    return ", ".join(f"{name} {value:.4f}" for name, value in found if not math.isnan(value))
