"""Whether the GPU kernels can run here; triton is only imported for the check, and only if torch finds a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

from recsys_embed.errors import BackendError, MissingDependencyError
from recsys_embed.kernels.derivatives import have_tangents, transformed
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.kernels.pointers import memory_of
from recsys_embed.optim import FusedOptimizer, rule_name
from recsys_embed.utils.optional import require

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether triton interprets kernels on the CPU, for tests: ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_not() -> str | None:
    """The reason why the kernels cannot run; None if they can."""
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else "torch is a build without CUDA"
    try:
        require("triton", extra="triton", purpose="backend 'triton'")
    except MissingDependencyError as e:
        return str(e)
    return None


def knows(optimizer: FusedOptimizer | None) -> bool:
    """Whether the kernels can run and have the optimizer's rule."""
    if why_not() is not None or optimizer is None:
        return why_not() is None
    from recsys_embed.kernels.triton.rules import RULES

    return rule_name(optimizer) in RULES


@cache
def _compiles_for(device: torch.device) -> bool:
    """Whether triton supports the GPU; only called for one in use, because it initialises CUDA."""
    return torch.cuda.get_device_capability(device) >= (7, 5)


def require_triton() -> None:
    """Raise if the kernels cannot run.

    Raises:
        BackendError: they cannot run; says why.
    """
    why = why_not()
    if why is not None:
        raise BackendError(f"backend 'triton' cannot run: {why}. Use backend 'auto' or 'torch'")


def runs_on(ids: Tensor, tables: Sequence[Tensor]) -> bool:
    """Whether the kernels may read these tensors: on one GPU, of one 16- or 32-bit type, not traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not tables or type(ids) is not Tensor:
        return False
    kind, device = tables[0].dtype, ids.device
    if device.type != ("cpu" if interpreted() else "cuda") or kind not in _TYPES or why_not() is not None:
        return False
    for t in tables:
        if isinstance(t, LowPrecisionTable):
            held = t.stored
            # Rows that are stored unrounded are left to torch.
            if kind is not torch.float32 or held.device != device or not held.is_contiguous() or t.format.has_master:
                return False
            continue
        # Loads of 16 bytes need tables whose address is aligned to 16 bytes.
        if type(t) not in (Tensor, Parameter) or t.dtype is not kind or t.device != device or not t.is_contiguous():
            return False
    if torch._C._len_torch_dispatch_stack() or transformed() or have_tangents((ids, *tables)):
        return False
    floats = [t for t in tables if not isinstance(t, LowPrecisionTable)]
    return interpreted() or (_compiles_for(device) and all(memory_of(t) % 16 == 0 for t in floats))
