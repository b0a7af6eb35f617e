"""Caches of the rows that a loaded module computes."""

from __future__ import annotations

from torch import nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.core.footprint import parse_bytes
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.row_cache import RowCache, RowCaches


def cache_rows(root: nn.Module, size: str | int) -> None:
    """Keep the rows of the ids that are looked up most, of every feature whose rows are computed.

    Args:
        size: bytes of all caches, of which each feature has an equal share.

    Raises:
        ConfigError: no rows are computed, or a share holds none.
    """
    total = parse_bytes(size)
    found: list[tuple[EmbeddingCollection | CompressedEmbedding, dict[int, int]]] = []
    for module in root.modules():
        if isinstance(module, EmbeddingCollection):
            found.append((module, {i: module.bundle.widths[i] for i in module.bundle.generated}))
        elif isinstance(module, CompressedEmbedding) and module.program.generates:
            found.append((module, {0: module.output_dim}))
    number = sum(len(widths) for _, widths in found)
    if not number:
        raise ConfigError(
            "`cached_rows` keeps rows that are computed (methods tt and dhe, compositional with combine='path'), and "
            "this file has none; its rows are read as they are stored, so leave it out"
        )
    for module, widths in found:
        if widths:
            caches = RowCaches({i: RowCache(width, total // number) for i, width in widths.items()}).eval()
            (module.bundle if isinstance(module, EmbeddingCollection) else module).caches = caches
