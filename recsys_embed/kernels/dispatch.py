"""Choice of a backend: which kernels can run on this machine, and why others cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from recsys_embed.errors import BackendError, unknown_name
from recsys_embed.kernels.native import library as native_library
from recsys_embed.kernels.native import lookup as native
from recsys_embed.kernels.triton import status
from recsys_embed.optim import FusedOptimizer
from recsys_embed.utils.deprecated import warn_deprecated

Backend = Literal["auto", "reference", "torch", "native", "triton"]
Chosen = Literal["reference", "torch", "native", "triton"]


# By name of batched kernels: whether they can run with an optimizer's rule.
KNOWS: Mapping[str, Callable[[FusedOptimizer | None], bool]] = {"native": native.knows, "triton": status.knows}
# By name of batched kernels: whether they may read these tensors.
RUNS_ON: Mapping[str, Callable[[Tensor, Sequence[Tensor]], bool]] = {
    "native": native.runs_on,
    "triton": status.runs_on,
}


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and the reason."""

    name: str
    available: bool
    why: str


def available_backends() -> list[BackendStatus]:
    """Every backend of the library with its status here.

    >>> [b.name for b in available_backends()]
    ['reference', 'torch', 'native', 'triton']
    """
    found = native_library.library()
    why = found
    if isinstance(found, native_library.Library):
        threads = "torch's threads" if found.threaded else "one thread: torch's OpenMP runtime was not found"
        why = f"compiled for the CPU ({found.variant}, {threads}); float32 tables and exports, all features in one call"
    return [
        BackendStatus("reference", True, "readable definition, one feature at a time; for checking, not for speed"),
        BackendStatus("torch", True, "all features in a fixed number of torch operations, on any device"),
        BackendStatus("native", isinstance(found, native_library.Library), str(why)),
        BackendStatus(
            "triton",
            status.why_not() is None,
            status.why_not()
            or "compiled for the GPU at first use; float32, bfloat16 and float16 tables, all features in one launch",
        ),
    ]


def named(backend: str) -> str:
    """``backend``; ``"auto"``, with a DeprecationWarning, for ``"fbgemm"``, which no longer trains.

    >>> named("torch")
    'torch'
    """
    if backend != "fbgemm":
        return backend
    warn_deprecated(
        "backend 'fbgemm' no longer looks up or trains tables, which took it 1.1 to 6.3 times as long as 'native'; the "
        "backend that 'auto' picks runs instead, with the same weights and optimizer state. Write backend='auto'. To "
        "read a quantised export with FBGEMM, use load(path, backend='fbgemm')"
    )
    return "auto"


def choose(backend: str, optimizer: FusedOptimizer | None = None, device: torch.device | None = None) -> Chosen:
    """The backend to build: the fastest that runs for ``"auto"``, else the named one or an error.

    ``"native"`` leaves to ``"torch"`` what it does not support: devices and types other than float32 on the CPU, bags
    pooled by maximum or with learned weights, exported programs. So does ``"triton"``: devices other than GPUs,
    float64, all bags, compiled and exported programs.

    Args:
        device: of the tables, the CPU by default.

    Raises:
        UnknownNameError: no backend has that name.
        BackendError: the named one cannot run here, or not with the optimizer.
    """
    if backend not in get_args(Backend):
        raise unknown_name("backend", backend, get_args(Backend))
    if backend in ("native", "triton"):
        if backend == "native":
            native_library.loaded()
        else:
            status.require_triton()
        if not KNOWS[backend](optimizer):
            raise BackendError(f"backend {backend!r} does not know the rule of {optimizer!r}; use backend 'torch'")
    if backend == "auto":
        wanted = "triton" if device is not None and device.type == "cuda" else "native"
        if wanted in kernels(backend, optimizer):
            return cast("Chosen", wanted)
        status_of = {b.name: b for b in available_backends()}[wanted]
        why = f"it does not know {optimizer!r}" if status_of.available else status_of.why
        say_once(f"backend 'auto' is 'torch' here, not {wanted!r}: {why}")
        return "torch"
    return cast("Chosen", backend)


@cache
def say_once(line: str) -> None:
    """Log a warning, once per process."""
    logging.getLogger(__name__).warning(line)


def kernels(backend: str, optimizer: FusedOptimizer | None = None) -> tuple[str, ...]:
    """Names of the batched kernels that lookups of a backend may run on, whichever device their tables move to."""
    # Triton's interpreter is for tests only.
    names = ["native", "triton"] if not status.interpreted() else ["native"]
    return tuple(
        name for name in (names if backend == "auto" else [backend]) if name in KNOWS and KNOWS[name](optimizer)
    )
