"""A pool that reuses the memory of outputs once they are released: new pages cost several times the writes to them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_SMALLEST = 1 << 18
"""Bytes below which the allocator's own memory is warm."""
_KEPT = 4
"""Memories kept at most: of outputs that a step holds at once."""
_use_count = getattr(torch._C, "_storage_Use_Count", None)
# What outputs are like, whatever type and device are torch's defaults where they are made.
_LIKE = torch.empty(0, dtype=torch.float32, device="cpu")


class OutputPool:
    """Uninitialised float32 tensors on the CPU, in memory that this pool keeps.

    A memory is handed out again when nothing but the pool refers to it any more: no tensor, no view, nothing saved for
    a backward. One that was shared with other processes never is.

    >>> pool = OutputPool()
    >>> first = pool.take((1024, 64))
    >>> address = first.data_ptr()
    >>> del first
    >>> pool.take((1024, 64)).data_ptr() == address
    True
    """

    def __init__(self) -> None:
        self._kept: list[torch.UntypedStorage] = []

    def take(self, shape: Sequence[int]) -> Tensor:
        """A contiguous tensor."""
        size = 4 * prod(shape)
        if size < _SMALLEST or _use_count is None:
            return _LIKE.new_empty(*shape)  # a tuple takes torch half as long again
        kept = self._kept
        # From the last one used, which is still warm; those that no step asks for any more drop out at the front.
        for i in reversed(range(len(kept))):
            storage = kept[i]
            if not size <= storage.nbytes() <= 2 * size or _use_count(storage._cdata) != 1:
                continue
            # Nobody's Python object but the list's, this variable's and the argument's; counted here, since how often
            # a function of Python holds its argument depends on who evaluates it. Who was sent a tensor through a
            # queue reads the very memory, and is counted nowhere.
            if sys.getrefcount(storage) == 3 and not storage.is_shared():
                kept.append(kept.pop(i))
                strides = [prod(shape[d:]) for d in range(1, len(shape) + 1)]
                return _LIKE.new_empty(0).set_(storage, 0, shape, strides)
        out = _LIKE.new_empty(*shape)
        kept.append(out.untyped_storage())
        del kept[:-_KEPT]
        return out

    @property
    def nbytes(self) -> int:
        """Memory kept, in use or not."""
        return sum(s.nbytes() for s in self._kept)

    def __deepcopy__(self, memo: object) -> OutputPool:
        return OutputPool()

    def __reduce__(self) -> tuple[type[OutputPool], tuple[()]]:
        return OutputPool, ()
