"""Whether the GPU kernels can run here; triton itself is imported only to find out, and only where torch sees a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

from recsys_embed.errors import BackendError, MissingDependencyError
from recsys_embed.optim import FusedOptimizer, rule_name
from recsys_embed.utils.optional import require

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether triton runs kernels in its interpreter, on the CPU: ``TRITON_INTERPRET=1``, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_not() -> str | None:
    """In words why the kernels cannot run; None where they can."""
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else "torch is a build without CUDA"
    try:
        require("triton", extra="triton", purpose="backend 'triton'")
    except MissingDependencyError as e:
        return str(e)
    return None


def knows(optimizer: FusedOptimizer | None) -> bool:
    """Whether the kernels can run and hold the optimizer's rule."""
    if why_not() is not None or optimizer is None:
        return why_not() is None
    from recsys_embed.kernels.triton.rules import RULES

    return rule_name(optimizer) in RULES


@cache
def _compiles_for(device: torch.device) -> bool:
    """Whether triton knows the GPU; asked only about one in use, since asking sets CUDA up."""
    return torch.cuda.get_device_capability(device) >= (7, 5)


def require_triton() -> None:
    """Do nothing where the kernels can run.

    Raises:
        BackendError: they cannot; says why.
    """
    why = why_not()
    if why is not None:
        raise BackendError(f"backend 'triton' cannot run: {why}. Use backend 'auto' or 'torch'")


def runs_on(ids: Tensor, tables: Sequence[Tensor]) -> bool:
    """Whether the kernels may read these tensors: of one GPU and one 16- or 32-bit type, and nobody traces."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not tables or type(ids) is not Tensor:
        return False
    kind, device = tables[0].dtype, ids.device
    if device.type != ("cpu" if interpreted() else "cuda") or kind not in _TYPES or why_not() is not None:
        return False
    for t in tables:
        # Rows are read 16 bytes at a time, which a table that begins elsewhere does not allow.
        if type(t) not in (Tensor, Parameter) or t.dtype is not kind or t.device != device or not t.is_contiguous():
            return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return interpreted() or (_compiles_for(device) and all(t.data_ptr() % 16 == 0 for t in tables))
