"""Which kernels can run here, and why the others cannot."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from recsys_embed.errors import unknown_name

Backend = Literal["auto", "reference", "torch"]


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine and, in words, why."""

    name: str
    available: bool
    why: str


def available_backends() -> list[BackendStatus]:
    """Every backend of the library with its status here.

    >>> [b.name for b in available_backends()]
    ['reference', 'torch']
    """
    return [
        BackendStatus("reference", True, "readable definition, one feature at a time; for checking, not for speed"),
        BackendStatus("torch", True, "all features in a fixed number of torch operations, on any device"),
    ]


def choose(backend: str) -> Literal["reference", "torch"]:
    """The backend to build: the fastest that runs for ``"auto"``, else the named one or an error.

    Raises:
        UnknownNameError: no backend has that name.
    """
    if backend not in get_args(Backend):
        raise unknown_name("backend", backend, get_args(Backend))
    return "reference" if backend == "reference" else "torch"
