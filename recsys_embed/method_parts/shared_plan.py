"""Plans of methods that store many features in one table: which features keep tables of their own."""

from __future__ import annotations

from collections.abc import Sequence

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.features import FeatureSpec


def keep_small_tables(
    specs: Sequence[FeatureSpec], budget: int, plain: MethodConfig, full_below: int
) -> tuple[dict[str, MethodConfig], int, list[FeatureSpec]]:
    """Split features into those that keep a full table (with its bytes) and those left to share.

    Features with fewer than ``full_below`` ids keep one, smallest first, while these take at most half of ``budget``.

    Returns:
        Configurations and total bytes of the full tables, and the remaining features.
    """
    chosen: dict[str, MethodConfig] = {}
    spent = 0
    for spec in sorted(specs, key=lambda s: (s.num_embeddings, s.name)):
        if spec.ids == "raw" or spec.num_embeddings >= full_below:
            continue
        need = plain.footprint(spec).serve
        if spent + need <= budget // 2:
            chosen[spec.name] = plain
            spent += need
    return chosen, spent, [s for s in specs if s.name not in chosen]
