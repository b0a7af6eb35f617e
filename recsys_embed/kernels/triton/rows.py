"""Fused updates of rows that torch's operations have found; used for bags on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from recsys_embed.kernels import pointers
from recsys_embed.kernels.deferred_steps import StepLog
from recsys_embed.kernels.triton.fields import JOB, READ, ROW_LOOKUP, SORTED, Tables
from recsys_embed.kernels.triton.lookup import on_device, state_faults, table_faults
from recsys_embed.kernels.triton.update import Source, StorageReads, Target
from recsys_embed.optim import FusedOptimizer


@lru_cache(maxsize=64)
def _reads(width: int) -> StorageReads:
    """A single read, with gradients ``[n, width]`` in order."""
    read = {"storage": 0, "base": 0, "rows": 0, "own": 0, "at": 0, "stride": width, "column": 0, "num_rows": 1}
    reads = np.array([[{**read, "path": SORTED, "buffer": -1}[name] for name in READ]], np.int64)
    none = np.zeros((0, 0), np.int64)
    one, nothing = np.ones(1, np.float32), np.zeros(0, np.float32)
    return StorageReads(Tables(none[:, : len(JOB)], none[:, : len(ROW_LOOKUP)], nothing, reads, one, 0, 0), 0, 1, width)


def update_rows(
    optimizer: FusedOptimizer, weight: Tensor, state: Mapping[str, Tensor], rows: Tensor, grad: Tensor, log: StepLog
) -> None:
    """One exact step in place; arguments as of :func:`recsys_embed.kernels.fused_gather.apply_update`.

    No row may have deferred steps. Deterministic.

    Raises:
        ConfigError: table or state are not as they were when the rows were looked up; nothing has changed.
    """
    table = table_faults(weight, weight.dtype, len(weight), weight.shape[1], "the table", grad.device)
    pointers.check([*table, *state_faults(optimizer, weight, state)])
    reads = _reads(weight.shape[1])
    grad = grad.contiguous()
    source = reads.all_sources(Source(rows, rows, grad, grad))
    with on_device(weight):
        target = Target.step(optimizer, weight, state, log)
        reads.sort_and_sum(rows.to(torch.int32), len(rows), source, 0, target)
    increment_version([weight, *state.values()])
