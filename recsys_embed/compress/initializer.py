"""The initializer for a table that replaces a trained one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from recsys_embed.embedding import CompressedEmbedding


def element_std(module: nn.Module) -> float:
    """Standard deviation of a full table's elements without the padding row; 1, as in torch, where unknown."""
    if isinstance(module, CompressedEmbedding):
        return module.spec.initial_distribution()[1]
    weight = cast("Tensor", module.weight)
    if weight.is_meta:
        return 1.0
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    count = weight.numel()
    for part in weight.detach().split(1 << 18):
        sums += torch.stack([part.double().sum(), part.double().square().sum()])
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        row = weight.detach()[padding].double()
        sums -= torch.stack([row.sum(), row.square().sum()])
        count -= row.numel()
    if not torch.isfinite(sums).all() or count < 2:
        return 1.0
    mean = sums[0] / count
    return float((sums[1] / count - mean * mean).clamp_min(0).sqrt())


def initializer_for(modules: Iterable[nn.Module]) -> str:
    """A normal initializer whose variance is the mean variance of the tables it replaces."""
    squares = [element_std(m) ** 2 for m in modules]
    std = (sum(squares) / len(squares)) ** 0.5
    return f"normal:{std:.6g}".replace("e+", "e")
