"""What torch's compiler does to Python that a backward calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


def in_compiled_autograd() -> bool:
    """Whether compiled autograd runs this backward, which leaves out what is queued for its end."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "in_compiled_autograd_region", False))


def uncompiled(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that is never compiled, though a function that is compiled runs a backward which calls it.

    As ``torch.compiler.disable``, which takes some microseconds for each call outside of compiled functions too.
    """
    disabled = torch._disable_dynamo(method)
    compiling = torch._C._dynamo.eval_frame.get_eval_frame_callback

    @wraps(method)
    def call(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        if compiling() is None:
            return method(self, *args, **kwargs)
        found: R = disabled(self, *args, **kwargs)
        return found

    return call
