"""What plans of methods with one store for many features have in common."""

from __future__ import annotations

from collections.abc import Sequence

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.features import FeatureSpec


def private_tables(
    specs: Sequence[FeatureSpec], budget: int, plain: MethodConfig, full_below: int
) -> tuple[dict[str, MethodConfig], int, list[FeatureSpec]]:
    """Features that keep a plain table of their own, the bytes these take, and the features left.

    Those of fewer than ``full_below`` ids do, smallest first, while they take at most half of ``budget``.
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
