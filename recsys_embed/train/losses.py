"""What a run minimises: losses of single rows, or of users and items, with the metrics that go with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from recsys_embed.errors import ConfigError
from recsys_embed.models import RetrievalModel, get_model
from recsys_embed.models.retrieval import Queries
from recsys_embed.train.metrics import BinaryMetrics, RealMetrics
from recsys_embed.train.retrieval_losses import (
    BPRArgs,
    SampledSoftmaxArgs,
    SoftmaxArgs,
    bpr,
    sampled_softmax,
    softmax,
)
from recsys_embed.utils.settings import Settings, build
from recsys_embed.utils.types import JSONMapping

LossName = Literal["logloss", "squared_error", "softmax", "sampled_softmax", "bpr"]


@dataclass(frozen=True)
class NoArgs(Settings):
    """Arguments of losses that have none."""

    noun = "argument of the loss"


@dataclass(frozen=True)
class Loss:
    """A loss of predictions ``[B]`` and labels ``[B]``, or of users and the items that they chose.

    Args:
        metrics: makes what accumulates the metrics of a split.
        of_rows: the loss of every row, ``[B]``, of predictions and labels.
        of_queries: in its place, the loss ``[n]`` of every query of a retrieval model, with the arguments.
        args: the arguments that it takes.
    """

    metrics: type[BinaryMetrics] | type[RealMetrics]
    of_rows: Callable[[Tensor, Tensor], Tensor] | None = None
    of_queries: Callable[[RetrievalModel, Queries, Any], Tensor] | None = None
    args: type[Settings] = NoArgs

    @property
    def real_labels(self) -> bool:
        """Whether labels may be any finite numbers, rather than 0 and 1."""
        return self.metrics.real_labels

    @property
    def needs_labels(self) -> bool:
        """Whether rows must have a label; where they need none and have none, every row is a positive."""
        return self.of_queries is None


LOSSES: Mapping[LossName, Loss] = {
    "logloss": Loss(BinaryMetrics, partial(F.binary_cross_entropy_with_logits, reduction="none")),
    "squared_error": Loss(RealMetrics, partial(F.mse_loss, reduction="none")),
    "softmax": Loss(BinaryMetrics, of_queries=softmax, args=SoftmaxArgs),
    "sampled_softmax": Loss(BinaryMetrics, of_queries=sampled_softmax, args=SampledSoftmaxArgs),
    "bpr": Loss(BinaryMetrics, of_queries=bpr, args=BPRArgs),
}


def loss_args(name: LossName, given: JSONMapping) -> Settings:
    """The arguments of a loss, checked.

    Raises:
        ConfigError: names all that it does not take.

    >>> loss_args("bpr", {"negatives": 4})
    BPRArgs(negatives=4)
    """
    return build(LOSSES[name].args, given, f"argument of loss {name!r}", where=f"`loss_args` of loss {name!r}")


def check_model(name: LossName, model: str) -> None:
    """Refuse a model that a loss cannot train.

    Raises:
        ConfigError: the loss compares items, and the model finds none.
    """
    if LOSSES[name].of_queries is not None and not issubclass(get_model(model), RetrievalModel):
        raise ConfigError(
            f"loss {name!r} trains retrieval models, such as 'twotower'; {model!r} scores rows: choose another "
            "model, or loss='logloss'"
        )
