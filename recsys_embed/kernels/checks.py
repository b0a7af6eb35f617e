"""Checks of ids before any kernel reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError, IdRangeError


def check_id_dtype(ids: Tensor, where: str) -> None:
    """Raise unless ``ids`` are int32 or int64."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"ids must be int32 or int64; got {ids.dtype} (feature {where!r})")


def check_id_range(ids: Tensor, size: int, where: str) -> None:
    """Raise unless all ids lie in ``[0, size)``.

    On a GPU, and while tracing, the check is an asynchronous assertion: it costs no synchronisation.

    Raises:
        IdRangeError: names the smallest and largest id.
    """
    if ids.numel() == 0:
        return
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= size:
            raise IdRangeError(f"ids must be in [0, {size}); got values from {low} to {high} (feature {where!r})")
    elif ids.device.type != "meta":
        torch._assert_async(((ids >= 0) & (ids < size)).all(), f"ids of feature {where!r} must be in [0, {size})")
