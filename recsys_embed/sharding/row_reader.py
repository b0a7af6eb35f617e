"""Rows of many tables of one width, wherever TorchRec put them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from recsys_embed.kernels.constants import Constants
from recsys_embed.sharding.physical_tables import Slab, pick


class RowReader(Constants):
    """Reads rows of tables laid end to end, of which TorchRec's collection ``ec`` holds each by itself.

    A row that occurs several times is fetched once, so neither frequent ids nor long bags cost traffic; its gradient
    is summed before it travels back.

    Args:
        slabs: the tables, of one width and layout, in the order of their rows.
        device: ``"meta"`` allocates nothing until the collection is sharded.
    """

    def __init__(self, slabs: Sequence[Slab], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.slabs = tuple(slabs)
        self.per_row, self.width = slabs[0].per_row, slabs[0].width
        self.names = [slab.name for slab in slabs]
        configs = [
            EmbeddingConfig(
                name=slab.name, num_embeddings=slab.shape[0], embedding_dim=slab.shape[1], feature_names=[slab.name]
            )
            for slab in slabs
        ]
        self.ec = EmbeddingCollection(tables=configs, device=torch.device(device or "cpu"))
        self.add_constant("starts", [0, *accumulate(slab.rows for slab in slabs)])

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[n, width]`` of int64 ``rows [n]``, counted over all tables; zeros for -1."""
        distinct, inverse = rows.unique(return_inverse=True)
        absent = int((distinct[:1] < 0).sum())
        asked = distinct[absent:]
        starts = self.constant("starts")
        counts = torch.searchsorted(asked, starts).diff()
        local = asked - torch.repeat_interleave(starts[:-1], counts, output_size=len(asked))
        jagged = KeyedJaggedTensor(
            keys=self.names, values=torch.div(local, self.per_row, rounding_mode="floor"), lengths=counts
        )
        found = self.ec(jagged)
        values = torch.cat([found[name].values() for name in self.names])
        values = pick(values, local % self.per_row, self.per_row, self.width)
        if absent:
            values = torch.cat([values.new_zeros(1, self.width), values])
        return values.index_select(0, inverse)
