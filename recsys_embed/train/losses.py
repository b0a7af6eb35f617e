"""What a run minimises: losses of single rows, with the metrics that go with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from recsys_embed.train.metrics import BinaryMetrics, RealMetrics

LossName = Literal["logloss", "squared_error"]


@dataclass(frozen=True)
class Loss:
    """A loss of predictions ``[B]`` and labels ``[B]``.

    Args:
        of_rows: the loss of every row, ``[B]``.
        metrics: makes what accumulates the metrics of a split.
    """

    of_rows: Callable[[Tensor, Tensor], Tensor]
    metrics: type[BinaryMetrics] | type[RealMetrics]

    @property
    def real_labels(self) -> bool:
        """Whether labels may be any finite numbers, rather than 0 and 1."""
        return self.metrics.real_labels


LOSSES: Mapping[LossName, Loss] = {
    "logloss": Loss(partial(F.binary_cross_entropy_with_logits, reduction="none"), BinaryMetrics),
    "squared_error": Loss(partial(F.mse_loss, reduction="none"), RealMetrics),
}
