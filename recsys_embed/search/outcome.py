"""The result of a search."""

from __future__ import annotations

from dataclasses import dataclass

from recsys_embed.core.footprint import Footprint
from recsys_embed.models import CTRModel
from recsys_embed.plan import Plan
from recsys_embed.train.json_values import footprint_dict, json_ready
from recsys_embed.train.result import TrainResult
from recsys_embed.utils.types import JSON


@dataclass(frozen=True)
class SearchOutcome:
    """A finished search.

    Args:
        plan: of the vectors.
        model: the retrained model.
        result: metrics of the retraining.
        footprint: bytes of the embedding part.
        full_bytes: bytes of the full tables.
        seconds: by stage.
        cost: seconds of all stages divided by those of one training over full tables of as many epochs.

    >>> from recsys_embed import FeatureSpec, Schema
    >>> from recsys_embed.models import build_model
    >>> schema = Schema([FeatureSpec("C1", 100, 4)])
    >>> model = build_model("dnn", schema, Plan.uniform(schema, "hash", budget=400), num_dense=2, hidden=(8,))
    >>> result = TrainResult(None, None, steps=9, best_step=9, samples_per_s=1e5, seconds=0.2, history=[])
    >>> found = SearchOutcome(model.vectors.plan, model, result, model.footprint(), 1600, {"retrain": 0.2}, cost=1.0)
    >>> found.to_dict()["compression"]
    4.0
    """

    plan: Plan
    model: CTRModel
    result: TrainResult
    footprint: Footprint
    full_bytes: int
    seconds: dict[str, float]
    cost: float

    def to_dict(self) -> JSON:
        """JSON-ready; the model left out."""
        return {
            **json_ready(self.result.to_dict()),
            "footprint": footprint_dict(self.footprint),
            "full_bytes": self.full_bytes,
            "compression": self.full_bytes / self.footprint.serve,
            "stage_seconds": self.seconds,
            "cost_in_trainings": self.cost,
        }
