"""The loss of a batch, and the reason why one is not finite: the data, the weights, or the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recsys_embed.data.batch import Batch, as_batch
from recsys_embed.data.checks import refuse_values
from recsys_embed.errors import ConfigError, RecsysEmbedError
from recsys_embed.models import RetrievalModel
from recsys_embed.models.retrieval import Queries
from recsys_embed.train.catalogue import positives_of
from recsys_embed.train.losses import LOSSES, Loss, LossName, loss_args
from recsys_embed.train.result import DivergedError
from recsys_embed.utils.settings import Settings

if TYPE_CHECKING:
    from recsys_embed.train.config import TrainConfig

HUGE = 1e6
"""Standard deviations beyond which a numeric value is named as what drives a loss out of range."""


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits ``[B]`` of a batch.

    Raises:
        ConfigError: the model returns something else.
    """
    logits: Any = model(batch.dense, batch.inputs if isinstance(batch, Batch) else batch.ids)
    if not isinstance(logits, Tensor) or logits.shape != batch.label.shape:
        name = type(model).__name__
        wanted = f"{name} must return logits [B], here [{len(batch.label)}]"
        if not isinstance(logits, Tensor):
            raise ConfigError(f"{wanted}; got {type(logits).__name__}")
        cure = ": end `logits` with .squeeze(-1)" if logits.shape == (len(batch.label), 1) else ""
        raise ConfigError(f"{wanted}; got {list(logits.shape)}{cure}")
    return logits


def loss_of(
    model: nn.Module,
    batch: Batch,
    reduction: str = "mean",
    loss: LossName = "logloss",
    args: Settings | None = None,
) -> Tensor:
    """The loss of a batch: the sum over its rows, each times its ``weight`` where rows have one; or that by B.

    Losses over items have a term for each positive row, or each item of its history, in place of each row.

    Raises:
        ConfigError: the model returns something other than logits ``[B]``, or finds no items where the loss needs them.
    """
    kind = LOSSES[loss]
    if kind.of_rows is None:
        return _loss_of_queries(model, batch, reduction, kind, args or loss_args(loss, {}))
    rows = kind.of_rows(logits_of(model, batch), batch.label)
    weight = batch.extra.get("weight") if isinstance(batch, Batch) else None
    if weight is not None:
        rows = rows * weight
    return rows.sum() if reduction == "sum" else rows.mean()


def _loss_of_queries(model: nn.Module, batch: Batch, reduction: str, kind: Loss, args: Settings) -> Tensor:
    """The loss of the positive rows whose items can be found; 0 where there are none."""
    if not isinstance(model, RetrievalModel) or kind.of_queries is None:
        raise ConfigError(f"this loss needs a retrieval model, such as 'twotower'; got {type(model).__name__}")
    batch = as_batch(batch)
    positive = positives_of(batch.label)
    if not positive.all():
        rows = positive.nonzero().flatten()
        batch = batch.map(lambda part: part.index_select(0, rows))
    queries = model.queries(batch.dense, batch.inputs)
    found = model.in_catalogue[queries.targets]
    if not found.all():
        queries = Queries(*(part[found] for part in queries))
    if not len(queries.targets):
        return queries.vectors.sum()
    losses = kind.of_queries(model, queries, args)
    weight = batch.extra.get("weight")
    if weight is not None:
        losses = losses * weight[queries.rows]
    return losses.sum() if reduction == "sum" else losses.mean()


def wrong_labels(label: Tensor, loss: LossName = "logloss") -> Tensor:
    """How many labels are neither 0 nor 1: a scalar on their device, so that no step waits for it by itself."""
    off = label - label.bool().to(label.dtype)
    return (off if LOSSES[loss].needs_labels else off.masked_fill(label.isnan().all(), 0)).count_nonzero()


def explain(value: float, batch: Batch, model: nn.Module, config: TrainConfig, step: int, epoch: int) -> Exception:
    """The error for a loss that is not finite, or for labels that are no classes; it advises what fits the cause.

    Args:
        value: the loss.
        batch: what it was of.
        model: as it was.
        config: settings of the run.
        step: steps done before.
        epoch: epochs done before.
    """
    where = f"step {step + 1} (epoch {epoch + 1})"
    kind = LOSSES[config.loss]
    try:
        refuse_values(
            batch,
            f"the training batch of {where}",
            real_labels=kind.real_labels,
            needs_labels=kind.needs_labels,
        )
    except RecsysEmbedError as e:
        return e
    last = "; the last checkpoint is from before this step"
    told = f"the loss is {value} at {where}"
    wrong = [name for name, p in model.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
    if wrong and step == 0:
        return DivergedError(
            f"{told}, because weights hold NaN or infinite values before any training: {', '.join(wrong[:5])}; "
            "see what they were initialised or loaded from"
        )
    if not wrong and (far := _far_values(batch.dense, model)):
        return DivergedError(f"{told}, where {far}{last}")
    weight = batch.extra.get("weight") if isinstance(batch, Batch) else None
    if weight is not None and (most := float(weight.max())) > HUGE:
        return DivergedError(
            f"{told}, where weights of rows reach {most:.3g}; divide the `weight` column by its mean{last}"
        )
    tables = config.embedding_learning_rate or config.learning_rate
    return DivergedError(
        f"{told}; lower `learning_rate` ({config.learning_rate:g}) or `embedding_learning_rate` ({tables:g}), "
        f"add `warmup_steps`, or set `clip_norm`{last}"
    )


def _far_values(dense: Tensor, model: nn.Module) -> str:
    """Names the numeric column whose values are too large to multiply, if one is."""
    buffers = dict(model.named_buffers())
    ends = {name.rpartition(".")[2]: value for name, value in buffers.items()}
    mean, std = ends.get("numeric_mean"), ends.get("numeric_std")
    if mean is None or std is None or not dense.numel() or dense.shape[1:] != mean.shape:
        return ""
    far = ((dense.double() - mean) / std).abs().amax(0)
    column = int(far.argmax())
    if not float(far[column]) > HUGE:
        return ""
    largest = float(dense[:, column].abs().max())
    return (
        f"numeric column {column} (counted from 0) reaches {largest:.3g}, {float(far[column]):.3g} times the scale it "
        "is divided by; set `standardise`, or take its logarithm or clip it in the data"
    )
