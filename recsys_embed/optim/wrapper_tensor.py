"""Tensors without storage of their own: what asks for their memory is refused, where torch would read address 0."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError

_TRACERS = ("torch._subclasses", "torch._dynamo", "torch._functorch", "torch._inductor", "torch.fx")


class WrapperTensor(Tensor):
    """A tensor whose values lie in other tensors; ``to_dense()`` has them in one storage."""

    # The other tensors, as errors name them.
    _held_in: ClassVar[str] = "`rows` and `values`"

    @classmethod
    def _without_storage(cls, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Any:
        out = Tensor._make_wrapper_subclass(cls, size, (size[1], 1), dtype=dtype, device=device)
        # Code in C++ that asks for the address gets an error of torch, rather than address 0.
        torch._C._set_throw_on_mutable_data_ptr(out)
        return out

    def _refuse_address(self) -> NoReturn:
        raise ConfigError(
            f"a {type(self).__name__} has no memory of its own: {self._held_in} hold its values, and to_dense() is an "
            "ordinary tensor"
        )

    data_ptr = _refuse_address

    def untyped_storage(self) -> torch.UntypedStorage:
        """Refused, but for torch's tracers, which tell aliases by it: its methods end the process."""
        if str(sys._getframe(1).f_globals.get("__name__")).startswith(_TRACERS):
            return super().untyped_storage()
        self._refuse_address()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """The dense tensor, for other libraries."""
        return self.to_dense().__dlpack__(*args, **kwargs)
