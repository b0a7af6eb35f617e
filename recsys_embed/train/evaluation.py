"""Metrics of a model on a split."""

from __future__ import annotations

import torch
from torch import nn

from recsys_embed.data.data_source import BatchSource
from recsys_embed.train.metrics import BinaryMetrics, Metrics
from recsys_embed.train.stop_request import StopRequest


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: BatchSource,
    split: str,
    *,
    batch_size: int = 16384,
    device: torch.device | str | None = None,
    stop: StopRequest | None = None,
) -> Metrics | None:
    """Metrics of a model on a whole split, in evaluation mode; None when ``stop`` asked to end it early."""
    was_training = model.training
    model.eval()
    sums = BinaryMetrics()
    try:
        for batch in data.batches(split, batch_size, shuffle=False, device=device):
            if stop is not None and stop.requested:
                return None
            sums.update(model(batch.dense, batch.ids), batch.label)
    finally:
        model.train(was_training)
    return sums.compute()
