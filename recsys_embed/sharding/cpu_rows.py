"""Unpooled lookups of tables with ordinary gradients on CPUs, for which fbgemm has a pooled kernel only."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection


def read_dense_rows(model: nn.Module) -> None:
    """Replace every unpooled lookup of tables with ordinary gradients on a CPU by torch's.

    fbgemm's operator accepts ``PoolingMode.NONE`` there but pools nevertheless.
    """
    for collection in model.modules():
        # Lookups are no registered children of the collection that runs them.
        for lookup in collection._lookups if isinstance(collection, ShardedEmbeddingCollection) else ():
            for module in lookup.modules():
                if isinstance(module, BatchedDenseEmbedding) and module.emb_module.weights.device.type == "cpu":
                    module.emb_module.forward = partial(_rows, module.emb_module)


def _rows(tables: Any, indices: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    widths = {width for _, width in tables.embedding_specs}
    if len(widths) != 1:
        raise RuntimeError(f"tables read together by row have one width; got {sorted(widths)}")
    width = widths.pop()
    features = len(tables.weights_offsets)
    ends = offsets.long()[:: max(1, (len(offsets) - 1) // features)]
    starts = torch.div(tables.weights_offsets, width, rounding_mode="floor")
    rows = indices.long() + torch.repeat_interleave(starts, ends.diff(), output_size=len(indices))
    return F.embedding(rows, tables.weights.view(-1, width))
