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
from recsys_embed.train.ranking_metrics import auc_and_average_precision, exact_auc, grouped_auc

__all__ = ["BinaryMetrics", "Metrics", "RealMetrics", "exact_auc"]


@dataclass(frozen=True)
class Metrics:
    """Metrics of an evaluation, of its rows alike whatever their weights.

    Args:
        auc, logloss: of labels 0 and 1; NaN for real ones.
        calibration: mean prediction over mean label.
        samples, positives: rows, and those of label 1.
        pr_auc: mean precision at each positive (average precision).
        grouped_auc: AUC within groups, where rows have a group, see :func:`grouped_auc`.
        rmse: root of the mean squared error, of real labels; else None.
        recall, ndcg: by k, of retrieval models, see :mod:`recsys_embed.train.retrieval_metrics`; else None.
    """

    auc: float
    logloss: float
    calibration: float
    samples: int
    positives: int
    pr_auc: float | None = None
    grouped_auc: float | None = None
    rmse: float | None = None
    recall: dict[int, float] | None = None
    ndcg: dict[int, float] | None = None

    @property
    def score(self) -> float:
        """What validations are compared by, larger is better: NDCG at the first k of a retrieval model; AUC;
        minus logloss of rows of one class; minus RMSE."""
        if self.ndcg:
            return next(iter(self.ndcg.values()))
        if self.rmse is not None:
            return -self.rmse
        return -self.logloss if math.isnan(self.auc) else self.auc

    def logged(self) -> dict[str, float]:
        """The values of a log line."""
        more = {} if self.grouped_auc is None else {"grouped_auc": self.grouped_auc}
        for name, found in (("recall", self.recall), ("ndcg", self.ndcg)):
            more |= {f"{name}@{k}": value for k, value in (found or {}).items()}
        if self.rmse is not None:
            return {"rmse": self.rmse, **more}
        return {"auc": self.auc, "logloss": self.logloss, "calibration": self.calibration, **more}


class BinaryMetrics:
    """Accumulates logits and labels; 5 bytes per sample are kept for the exact AUC, sums are float64.

    >>> m = BinaryMetrics()
    >>> m.update(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    >>> m.compute().auc, round(m.compute().logloss, 4)
    (0.5, 0.6931)
    """

    real_labels = False

    def __init__(self) -> None:
        self._scores: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.bool_]] = []
        self._groups: list[NDArray[np.int64]] = []
        self._loss = 0.0
        self._predicted = 0.0

    def update(self, logits: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        """Add a batch: ``logits [n]``, ``labels [n]`` of 0 and 1, and in all batches or none int64 ``groups [n]``.

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
        if groups is not None:
            self._groups.append(groups.detach().to("cpu", torch.int64).numpy().copy())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What was accumulated: scores float32 ``[n]``, labels uint8 ``[n]``, two sums in float64, groups int64."""
        scores = torch.cat([torch.empty(0), *map(torch.from_numpy, self._scores)])
        labels = torch.cat([torch.empty(0, dtype=torch.bool), *map(torch.from_numpy, self._labels)])
        groups = torch.cat([torch.empty(0, dtype=torch.int64), *map(torch.from_numpy, self._groups)])
        sums = torch.tensor([self._loss, self._predicted], dtype=torch.float64)
        return scores, labels.to(torch.uint8), sums, groups

    def add(self, scores: Tensor, labels: Tensor, sums: Tensor, groups: Tensor | None = None) -> None:
        """Add the :meth:`tensors` of samples accumulated elsewhere."""
        self._scores.append(scores.numpy())
        self._labels.append(labels.numpy().astype(np.bool_))
        self._loss += float(sums[0])
        self._predicted += float(sums[1])
        if groups is not None and groups.numel():
            self._groups.append(groups.numpy())

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
        auc, precision = auc_and_average_precision(scores, labels)
        return Metrics(
            auc=auc,
            logloss=self._loss / n,
            calibration=self._predicted / positives if positives else math.nan,
            samples=n,
            positives=positives,
            pr_auc=precision,
            grouped_auc=grouped_auc(scores, labels, np.concatenate(self._groups)) if self._groups else None,
        )


class RealMetrics:
    """Accumulates predictions of real labels, in float64.

    >>> m = RealMetrics()
    >>> m.update(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
    >>> round(m.compute().rmse, 4)
    1.4142
    """

    real_labels = True

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)

    def update(self, predictions: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        """Add a batch: ``predictions [n]``, ``labels [n]``.

        Raises:
            DataError: other shapes, or values that are not finite.
        """
        if predictions.dim() != 1 or predictions.shape != labels.shape:
            raise DataError(
                f"predictions and labels must both have the shape [n]; got {list(predictions.shape)} and "
                f"{list(labels.shape)}"
            )
        given, wanted = predictions.detach().double(), labels.detach().double()
        error = (given - wanted).square().sum()
        if not torch.isfinite(error):
            raise DataError("predictions or labels are not numbers (NaN or infinite)")
        count = torch.tensor(float(len(wanted)), dtype=torch.float64, device=error.device)
        self._sums += torch.stack([count, error, given.sum(), wanted.sum()]).cpu()

    def tensors(self) -> tuple[Tensor]:
        """What was accumulated: rows, squared errors, predictions and labels, summed: float64 ``[4]``."""
        return (self._sums,)

    def add(self, sums: Tensor) -> None:
        """Add the :meth:`tensors` of samples accumulated elsewhere."""
        self._sums += sums.view(-1, 4).sum(0)

    def compute(self) -> Metrics:
        """Metrics of all samples so far; DataError when there are none."""
        n, error, given, wanted = self._sums.tolist()
        if not n:
            raise DataError("no samples to evaluate: the split is empty")
        calibration = given / wanted if wanted else math.nan
        return Metrics(math.nan, math.nan, calibration, int(n), 0, rmse=math.sqrt(error / n))
