"""What no file holds of a module that was built without memory."""

from __future__ import annotations

import torch
from torch import nn

from recsys_embed.kernels.constants import Constants
from recsys_embed.kernels.indexes import IndexStore


def recreate_derived_tensors(module: nn.Module, device: torch.device) -> None:
    """Recreate on ``device`` the tensors that files do not hold: derived constants, counters, empty buffers."""
    for part in module.modules():
        if isinstance(part, Constants | IndexStore):
            part.recreate_derived_tensors(device)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta and buffer.numel() == 0:
                # Not zeros_like: asked of a meta tensor, it loads all of torch's symbolic shapes.
                setattr(part, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
