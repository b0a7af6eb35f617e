"""Recording of programs: where torch records operations, values must not decide which of them run."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from recsys_embed.errors import ConfigError


def recording() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def tracing() -> bool:
    """Whether torch.jit.trace is recording, as TensorBoard does for its graphs."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def hidden(tensor: Tensor) -> bool:
    """Whether values of a tensor must not decide what runs: torch records, or transforms a function (vmap)."""
    return recording() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def unmapped(tensor: Tensor) -> Tensor:
    """The values of a tensor for all samples over which functions are mapped (vmap), to be checked at once."""
    if torch.compiler.is_compiling():
        return tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def refused_when_run(values: Tensor, bad: Tensor) -> Tensor:
    """Return ``values``; the traced program raises an index error when it runs if any element of ``bad`` holds.

    A traced program keeps only operations whose results it returns, so an assertion would be dropped. The result
    therefore depends on a row that exists only if nothing is bad.
    """
    zero = torch.zeros(1, dtype=values.dtype, device=values.device)
    return values + zero.index_select(0, bad.any().long().reshape(1)).sum()


def refuse_scripting(module: nn.Module) -> NoReturn:
    """What torch.jit.script asks of a module first: TorchScript's language lacks what the lookups are written in."""
    raise ConfigError(
        f"torch.jit.script cannot compile {type(module).__name__}: use torch.jit.trace, torch.export, or torch.compile"
    )
