"""Exact ranking and calibration metrics from logits, accumulated batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recsys_embed.data.checks import label_faults
from recsys_embed.errors import DataError, raise_faults

_CHUNK = 1 << 20


def exact_auc(scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), a tie counting one half.

    Counted in integers, so the result is exact up to one final division, whatever the order of the samples.

    Args:
        scores: ``[n]`` float32, any monotone score (logits keep apart what a sigmoid would round together).
        labels: ``[n]`` bool.

    Returns:
        A number in [0, 1]; NaN where only one class is present, as no pair exists.

    Memory: a sorted copy of the scores (4 bytes each) and 32 MiB of working space.

    >>> exact_auc(np.float32([0, 1, 1, 2]), np.bool_([0, 1, 0, 1]))
    0.875
    """
    positive, negative = scores[labels], scores[~labels]
    pairs = positive.size * negative.size
    if pairs == 0:
        return math.nan
    negative.sort()
    positive.sort()
    twice_wins = 0
    for start in range(0, positive.size, _CHUNK):
        part = positive[start : start + _CHUNK]
        twice_wins += int(np.searchsorted(negative, part, "left").sum(dtype=np.int64))
        twice_wins += int(np.searchsorted(negative, part, "right").sum(dtype=np.int64))
    return twice_wins / (2 * pairs)


@dataclass(frozen=True)
class Metrics:
    """Metrics of an evaluation; ``calibration`` is mean prediction over mean label."""

    auc: float
    logloss: float
    calibration: float
    samples: int
    positives: int

    @property
    def score(self) -> float:
        """What validations are compared by, larger is better: the AUC, or minus the logloss of rows of one class."""
        return -self.logloss if math.isnan(self.auc) else self.auc


class BinaryMetrics:
    """Accumulates logits and labels; 5 bytes per sample are kept for the exact AUC, sums are float64.

    >>> m = BinaryMetrics()
    >>> m.update(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    >>> m.compute().auc, round(m.compute().logloss, 4)
    (0.5, 0.6931)
    """

    def __init__(self) -> None:
        self._scores: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.bool_]] = []
        self._loss = 0.0
        self._predicted = 0.0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: ``logits [n]``, ``labels [n]`` of 0 and 1.

        Raises:
            DataError: other shapes, a logit that is not finite, or a label other than 0 and 1.
        """
        if logits.dim() != 1 or logits.shape != labels.shape:
            raise DataError(
                f"logits and labels must both have the shape [n]; got {list(logits.shape)} and {list(labels.shape)}"
            )
        logits, labels = logits.detach().to("cpu", torch.float32), labels.detach().to("cpu", torch.float64)
        raise_faults(label_faults(labels), "metrics", DataError)
        if not torch.isfinite(logits).all():
            raise DataError(
                "the model returned logits that are not numbers (NaN or infinite); if it was trained just now, lower "
                "the learning rate or clip gradients"
            )
        wide = logits.double()
        # log(1 + e^x) - y x is exact where a sigmoid would have rounded to 0 or 1.
        self._loss += float((F.softplus(wide) - labels * wide).sum())
        self._predicted += float(torch.sigmoid(wide).sum())
        self._scores.append(logits.numpy().copy())
        self._labels.append(labels.bool().numpy())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What was accumulated: scores float32 ``[n]``, labels uint8 ``[n]``, and two sums in float64."""
        scores = torch.cat([torch.empty(0), *map(torch.from_numpy, self._scores)])
        labels = torch.cat([torch.empty(0, dtype=torch.bool), *map(torch.from_numpy, self._labels)])
        return scores, labels.to(torch.uint8), torch.tensor([self._loss, self._predicted], dtype=torch.float64)

    def add(self, scores: Tensor, labels: Tensor, sums: Tensor) -> None:
        """Add the :meth:`tensors` of samples accumulated elsewhere."""
        self._scores.append(scores.numpy())
        self._labels.append(labels.numpy().astype(np.bool_))
        self._loss += float(sums[0])
        self._predicted += float(sums[1])

    def compute(self) -> Metrics:
        """Metrics of all samples so far; DataError when there are none."""
        if not self._scores:
            raise DataError("no samples to evaluate: the split is empty")
        scores, labels = np.concatenate(self._scores), np.concatenate(self._labels)
        if not scores.size:
            raise DataError("no samples to evaluate: the split is empty")
        # One array each from here on, so that computing twice does not copy twice.
        self._scores, self._labels = [scores], [labels]
        n, positives = labels.size, int(labels.sum())
        return Metrics(
            auc=exact_auc(scores, labels),
            logloss=self._loss / n,
            calibration=self._predicted / positives if positives else math.nan,
            samples=n,
            positives=positives,
        )
