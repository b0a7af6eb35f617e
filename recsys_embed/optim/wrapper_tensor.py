"""Tensors without storage of their own: what asks for their memory is refused, where torch would read address 0."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError


class WrapperTensor(Tensor):
    """A tensor whose values lie in other tensors; ``to_dense()`` has them in one storage."""

    @classmethod
    def _without_storage(cls, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Any:
        out = Tensor._make_wrapper_subclass(cls, size, (size[1], 1), dtype=dtype, device=device)
        # Code in C++ that asks for the address gets an error of torch, rather than address 0.
        torch._C._set_throw_on_mutable_data_ptr(out)
        return out

    def _no_memory(self, *_: object, **__: object) -> NoReturn:
        raise ConfigError(
            f"a {type(self).__name__} has no memory of its own: `rows` and `values` are its tensors, and to_dense() "
            "is an ordinary one"
        )

    data_ptr = untyped_storage = storage = _typed_storage = cast("Any", _no_memory)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.to_dense().__dlpack__(*args, **kwargs)
