"""Metrics of a model on a split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from recsys_embed.data.batch import Batch, as_batch
from recsys_embed.data.checks import refuse_values
from recsys_embed.data.data_source import BatchSource
from recsys_embed.errors import DataError
from recsys_embed.models import RetrievalModel
from recsys_embed.train.loss import logits_of
from recsys_embed.train.losses import LOSSES, LossName
from recsys_embed.train.metrics import BinaryMetrics, Metrics, RealMetrics
from recsys_embed.train.retrieval_metrics import TOP_K, USER, ItemRanking, Seen
from recsys_embed.train.stop_request import StopRequest
from recsys_embed.utils.evaluation_mode import evaluation_mode


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
    top_k: Sequence[int] = TOP_K,
    exclude_seen: bool | None = None,
    seen: Seen | None = None,
) -> Metrics | None:
    """Metrics of a model on a whole split, in evaluation mode; None when ``stop`` asked to end it early.

    Args:
        loss: what the model was trained by: its metrics are told.
        top_k: lengths of the lists of items, of a retrieval model; then rows need no labels, and without them
            each is a positive.
        exclude_seen: see :class:`TrainConfig`.
        seen: what the users of each split have seen, which an evaluation adds to; of the same data.

    Raises:
        ConfigError: the model returns something other than logits ``[B]``.
        DataError: labels other than 0 and 1, numeric values or logits that are NaN or infinite.
    """
    sums, ranking = LOSSES[loss].metrics(), None
    if isinstance(model, RetrievalModel) and not sums.real_labels:
        unknown, known = getattr(data, "unknown_ids", None), USER in model.vectors.schema.names
        nobody = unknown(USER) if unknown is not None and known else ()
        ranking = ItemRanking(model, top_k, exclude_seen, {} if seen is None else seen, nobody)
    rows = labelled = 0
    with evaluation_mode(model):
        for batch in data.batches(split, batch_size, shuffle=False, device=device):
            if stop is not None and stop.requested:
                return None
            rows += len(batch.label)
            if ranking is None or not batch.label.isnan().all():
                labelled += len(batch.label)
                update(sums, model, batch, split)
            if ranking is not None:
                ranking.update(as_batch(batch))
        if ranking is None or not rows:
            return sums.compute()
        found = ranking.compute(data, split)
        nan = math.nan
        metrics = sums.compute() if labelled else Metrics(nan, nan, nan, rows, rows)
        if not LOSSES[loss].needs_labels:  # scores that are compared with each other only are no log odds
            metrics = replace(metrics, logloss=nan, calibration=nan)
        return metrics if found is None else replace(metrics, recall=found.recall, ndcg=found.ndcg)
