"""Row reads from tables of one width that TorchRec holds, sharded or not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from recsys_embed.kernels.constants import Constants
from recsys_embed.sharding.physical_tables import PhysicalTable, select_rows


class TorchRecRowReader(Constants):
    """Reads rows through TorchRec's EmbeddingCollection ``ec``; row numbers count over all tables, end to end.

    Row numbers are deduplicated before the exchange between processes: a row that occurs several times is sent once,
    and its gradients are summed before they are sent back.

    Args:
        physical_tables: the tables, of one width and layout, in the order of their rows.
        device: ``"meta"`` allocates nothing until the collection is sharded.
    """

    def __init__(self, physical_tables: Sequence[PhysicalTable], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.physical_tables = tuple(physical_tables)
        self.per_row, self.width = physical_tables[0].per_row, physical_tables[0].width
        self.names = [physical.name for physical in physical_tables]
        configs = [
            EmbeddingConfig(
                name=physical.name,
                num_embeddings=physical.shape[0],
                embedding_dim=physical.shape[1],
                feature_names=[physical.name],
            )
            for physical in physical_tables
        ]
        self.ec = EmbeddingCollection(tables=configs, device=torch.device(device or "cpu"))
        self.add_constant("starts", [0, *accumulate(physical.rows for physical in physical_tables)])

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[n, width]`` of int64 ``rows [n]``, counted over all tables; zeros for -1."""
        distinct, inverse = rows.unique(return_inverse=True)
        absent = int((distinct[:1] < 0).sum())
        asked = distinct[absent:]
        starts = self.constant("starts", asked)
        counts = torch.searchsorted(asked, starts).diff()
        local = asked - torch.repeat_interleave(starts[:-1], counts, output_size=len(asked))
        jagged = KeyedJaggedTensor(
            keys=self.names, values=torch.div(local, self.per_row, rounding_mode="floor"), lengths=counts
        )
        found = self.ec(jagged)
        values = torch.cat([found[name].values() for name in self.names])
        values = select_rows(values, local % self.per_row, self.per_row, self.width)
        if absent:
            values = torch.cat([values.new_zeros(1, self.width), values])
        return values.index_select(0, inverse)
