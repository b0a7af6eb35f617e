"""Metrics of a model on a split."""

from __future__ import annotations

import torch
from torch import nn

from recsys_embed.data.batch import Batch
from recsys_embed.data.checks import refuse_values
from recsys_embed.data.data_source import BatchSource
from recsys_embed.errors import DataError
from recsys_embed.train.loss import logits_of
from recsys_embed.train.losses import LOSSES, LossName
from recsys_embed.train.metrics import BinaryMetrics, Metrics, RealMetrics
from recsys_embed.train.stop_request import StopRequest


def update(sums: BinaryMetrics | RealMetrics, model: nn.Module, batch: Batch, split: str) -> None:
    """Add a batch to the metrics of a split; an error names the cause that lies in its rows, if one does."""
    logits = logits_of(model, batch)
    try:
        sums.update(logits, batch.label, batch.extra.get("group") if isinstance(batch, Batch) else None)
    except DataError:
        refuse_values(batch, f"a batch of the split {split!r}", real_labels=sums.real_labels)
        raise


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: BatchSource,
    split: str,
    *,
    batch_size: int = 16384,
    device: torch.device | str | None = None,
    stop: StopRequest | None = None,
    loss: LossName = "logloss",
) -> Metrics | None:
    """Metrics of a model on a whole split, in evaluation mode; None when ``stop`` asked to end it early.

    Args:
        loss: what the model was trained by: its metrics are told.

    Raises:
        ConfigError: the model returns something other than logits ``[B]``.
        DataError: labels other than 0 and 1, numeric values or logits that are NaN or infinite.
    """
    was_training = model.training
    model.eval()
    sums = LOSSES[loss].metrics()
    try:
        for batch in data.batches(split, batch_size, shuffle=False, device=device):
            if stop is not None and stop.requested:
                return None
            update(sums, model, batch, split)
    finally:
        model.train(was_training)
    return sums.compute()
