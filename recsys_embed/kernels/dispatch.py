"""Which kernels can run here, and why the others cannot."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

from recsys_embed.errors import BackendError, unknown_name
from recsys_embed.kernels import native
from recsys_embed.optim import FusedOptimizer

Backend = Literal["auto", "reference", "torch", "native"]


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine and, in words, why."""

    name: str
    available: bool
    why: str


def available_backends() -> list[BackendStatus]:
    """Every backend of the library with its status here.

    >>> [b.name for b in available_backends()]
    ['reference', 'torch', 'native']
    """
    found = native.library()
    why = found
    if isinstance(found, native.Library):
        threads = "torch's threads" if found.threaded else "one thread: torch's OpenMP runtime was not found"
        why = f"compiled for the CPU ({found.variant}, {threads}); float32 tables, all features in one call"
    return [
        BackendStatus("reference", True, "readable definition, one feature at a time; for checking, not for speed"),
        BackendStatus("torch", True, "all features in a fixed number of torch operations, on any device"),
        BackendStatus("native", isinstance(found, native.Library), str(why)),
    ]


def choose(backend: str, optimizer: FusedOptimizer | None = None) -> Literal["reference", "torch", "native"]:
    """The backend to build: the fastest that runs for ``"auto"``, else the named one or an error.

    ``"native"`` hands what it does not do (other devices and types than float32 on the CPU, bags, compiled and exported
    programs) to ``"torch"``.

    Raises:
        UnknownNameError: no backend has that name.
        BackendError: the named one cannot run here, or not with the optimizer.
    """
    if backend not in get_args(Backend):
        raise unknown_name("backend", backend, get_args(Backend))
    fits = native.knows(optimizer)
    if backend == "native":
        native.loaded()
        if not fits:
            raise BackendError(f"backend 'native' does not know the rule of {optimizer!r}; use backend 'torch'")
    if backend == "auto":
        return "native" if fits and isinstance(native.library(), native.Library) else "torch"
    return cast("Literal['reference', 'torch', 'native']", backend)
