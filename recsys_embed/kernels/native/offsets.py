"""Offsets of bags, checked by the kernels: in a small batch torch's operations take longer than the lookup."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_embed.kernels.native.library import loaded
from recsys_embed.kernels.native.lookup import runs_on
from recsys_embed.kernels.pointers import checked_address


def known_to_fit(offsets: Tensor, count: int, closed: bool) -> bool:
    """Whether int64 ``offsets [n]`` start at 0, never decrease, and end at ``count`` (without ``closed``, or below).

    False also where the kernels cannot tell.
    """
    if torch.compiler.is_compiling() or not runs_on(offsets, ()) or not offsets.is_contiguous():
        return False
    return bool(loaded().handle.rse_offsets_fit(checked_address(offsets), offsets.numel(), count, closed))
