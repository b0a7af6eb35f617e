"""A model with its rows rounded as its plan serves them, to be measured as what will be deployed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.core.precision import round_rows_


@contextmanager
def rounded_rows(model: nn.Module) -> Iterator[None]:
    """Within the block, tables of collections hold the values that an export of the plan's precisions stores.

    Afterwards they are as before. Takes a copy of the tables that are rounded.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for module in model.modules():
                if not isinstance(module, EmbeddingCollection) or module.from_file:
                    continue
                of_heads = module.bundle.heads.tables()
                for key, described in module.tables.items():
                    # Rows that train at their precision are served as they are.
                    if described.precision != "fp32" and described.training is None:
                        table = (of_heads[key] if described.dense else module.table(key)).detach()
                        kept.append((table, table.clone()))
                        round_rows_(table.view(len(table), -1), described.precision)
            yield
        finally:
            for table, before in kept:
                table.copy_(before)
