"""Caches of the rows that a loaded module computes."""

from __future__ import annotations

import torch
from torch import nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.core.footprint import format_bytes, parse_bytes
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec
from recsys_embed.kernels.row_cache import RowCache, RowCaches


def cache_rows(root: nn.Module, size: str | int) -> None:
    """Keep the rows of the ids that are looked up most, of every feature whose rows are computed.

    Args:
        size: bytes of all caches, of which each feature has an equal share.

    Raises:
        ConfigError: no rows are computed, or a share holds none, or more than can be allocated.
    """
    total = parse_bytes(size)
    found: list[tuple[EmbeddingCollection | CompressedEmbedding, dict[int, tuple[int, FeatureSpec]]]] = []
    raw: set[int] = set()  # modules of features in a collection, which do not know that their ids are any
    for module in root.modules():
        if isinstance(module, EmbeddingCollection):
            specs = list(module.schema)
            own = [s.name for s in specs if s.ids == "raw" and s.name not in module.bundle.programs]
            raw |= {id(module.bundle._module(name)) for name in own}
            found.append((module, {i: (module.bundle.widths[i], specs[i]) for i in module.bundle.generated}))
        elif isinstance(module, CompressedEmbedding) and module.program.generates:
            found.append((module, {0: (module.output_dim, module.spec)}))
    number = sum(len(features) for _, features in found)
    if not number:
        raise ConfigError(
            "`cached_rows` keeps rows that are computed (methods tt and dhe, compositional with combine='path'), and "
            "this file has none; its rows are read as they are stored, so leave it out"
        )
    for module, features in found:
        if features:
            caches = {
                i: _cache(width, total // number, module, None if id(module) in raw else spec)
                for i, (width, spec) in features.items()
            }
            of_module = RowCaches(caches, module).eval()
            (module.bundle if isinstance(module, EmbeddingCollection) else module).caches = of_module


def _cache(width: int, size: int, module: nn.Module, spec: FeatureSpec | None) -> RowCache:
    """A cache of the size, or of places for all ids of the feature, if these are known and take less."""
    cache = RowCache(width, size, None if spec is None or spec.ids == "raw" else spec.num_ids)
    device = next((p.device for p in module.parameters()), None)
    try:
        torch.empty(cache.most_bytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as e:
        raise ConfigError(
            f"a cache of {format_bytes(cache.most_bytes)} cannot be allocated; give fewer bytes as `cached_rows`"
        ) from e
    return cache
