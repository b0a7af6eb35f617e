"""Batches that batch normalisation can take: it needs two rows or more to see a variance."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from recsys_embed.data.batch import Batch
from recsys_embed.data.data_source import BatchSource, BatchStream
from recsys_embed.errors import ConfigError


def normalises_batches(model: nn.Module) -> bool:
    """Whether a model takes statistics of each training batch."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def leaves_one_row(data: BatchSource, batch_size: int) -> bool:
    """Whether the last training batch is a single row, where the data set tells its rows.

    Raises:
        ConfigError: every batch is a single row.
    """
    rows = data.rows("train") if hasattr(data, "rows") else None
    if batch_size == 1 or rows == 1:
        what = f"`batch_size` {batch_size}" if batch_size == 1 else "one training row"
        raise ConfigError(
            f"batch normalisation needs two rows or more in every training batch; got {what}; "
            "raise it, or build the model without (`batch_norm` of `model_args`)"
        )
    return rows is not None and rows % batch_size == 1


def need_two_rows(batch: Batch) -> None:
    """Refuse a training batch of one row."""
    if len(batch.label) < 2:
        raise ConfigError(
            f"batch normalisation needs two rows or more in every training batch; got {len(batch.label)}; choose a "
            "`batch_size` that does not leave one row at the end, or build the model without `batch_norm`"
        )


class LastRowJoined:
    """Batches of an epoch whose last one, a single row, goes into the batch before it.

    >>> import torch
    >>> ones = [Batch(torch.zeros(n, 0), torch.zeros(n, 1, dtype=torch.int64), torch.ones(n)) for n in (2, 2, 1)]
    >>> [batch.num_rows for batch in LastRowJoined(ones)]
    [2, 3]
    """

    def __init__(self, batches: BatchStream) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches) - 1

    def __iter__(self) -> Iterator[Batch]:
        held: Batch | None = None
        for batch in self.batches:
            if held is not None and len(batch.label) == 1:
                held = Batch.cat([held, batch])
            else:
                if held is not None:
                    yield held
                held = batch
        if held is not None:
            yield held
