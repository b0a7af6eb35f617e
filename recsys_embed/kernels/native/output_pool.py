"""A pool that reuses the memory of released outputs: page faults of new memory cost several times the writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_SMALLEST = 1 << 18
"""Bytes below which torch's allocator reuses memory itself."""
_KEPT = 4
"""Most blocks of memory in the pool: as many outputs as a step holds at once."""
_use_count = getattr(torch._C, "_storage_Use_Count", None)
# Template of outputs, independent of torch's default dtype and device.
_LIKE = torch.empty(0, dtype=torch.float32, device="cpu")


class OutputPool:
    """Uninitialised float32 tensors on the CPU, in memory that the pool reuses.

    Memory is reused when only the pool refers to it: no tensor, no view, and no tensor saved for backward. Memory that
    was shared with other processes is never reused.

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
            return _LIKE.new_empty(*shape)  # unpacked: passing a tuple takes 1.5 times as long
        kept = self._kept
        # Most recently used first, which is still in the cache; unused blocks are dropped at the front.
        for i in reversed(range(len(kept))):
            storage = kept[i]
            if not size <= storage.nbytes() <= 2 * size or _use_count(storage._cdata) != 1:
                continue
            # Three references: the list, this variable and the argument of getrefcount. It is called here, not in a
            # function, whose own references depend on the interpreter. Processes that got the tensor through a queue
            # share the memory without being counted, hence is_shared.
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
        """Bytes of memory held, in use or not."""
        return sum(s.nbytes() for s in self._kept)

    def __deepcopy__(self, memo: object) -> OutputPool:
        return OutputPool()

    def __reduce__(self) -> tuple[type[OutputPool], tuple[()]]:
        return OutputPool, ()
