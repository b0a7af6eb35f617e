"""Addresses of memory: the only module that reads them, and checks what kernels will take them for.

Between a lookup and its backward, ``.half()``, ``.to()``, ``.data =`` or ``resize_`` may give a tensor another type,
device, layout or memory. So a kernel gets an address by :func:`address`, or of tensors that :func:`check` has passed,
or that the same call has allocated.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys_embed.errors import ConfigError

checked_address = Tensor.data_ptr
"""Address of a tensor that this call has checked or allocated."""


def address(tensor: Tensor, dtype: torch.dtype, count: int, what: str) -> int:
    """Address of ``count`` or more contiguous elements on the CPU; 0 of none.

    Args:
        what: names the tensor in errors.

    Raises:
        ConfigError: the tensor is of another type, on another device, not contiguous, smaller, or without its memory.
    """
    check(faults(tensor, (dtype,), count, what))
    return tensor.data_ptr() if count else 0


def faults(
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    count: int,
    what: str,
    *,
    strided: bool = False,
    device: torch.device | None = None,
) -> list[str]:
    """Why a tensor is not what a kernel takes it for; no more than one reason.

    Args:
        dtypes: types that the kernel reads.
        count: elements that it reads, or fewer than there are.
        strided: it reads elements by their strides.
        device: the CPU by default.
    """
    if tensor.dtype not in dtypes:
        return [f"{what} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}"]
    if not tensor.is_cpu if device is None else tensor.device != device:
        return [f"{what} must be on {device or 'cpu'}, got {tensor.device}"]
    if not strided and not tensor.is_contiguous():
        return [f"{what} must be contiguous, got strides {list(tensor.stride())}"]
    if tensor.numel() < count:
        return [f"{what} must have {count} elements or more, got {list(tensor.shape)}"]
    if tensor.numel() and tensor.untyped_storage().nbytes() < _end(tensor) * tensor.element_size():
        return [f"{what} has lost its memory, which was resized"]
    return []


def _end(tensor: Tensor) -> int:
    """Elements of the memory up to the last of the tensor."""
    first = int(tensor.storage_offset())
    if tensor.is_contiguous():
        return first + tensor.numel()
    return first + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def check(found: Iterable[str]) -> None:
    """Raise for faults of what a kernel is about to read or write; nothing has been read or written.

    Raises:
        ConfigError: names them all.
    """
    reasons = list(found)
    if reasons:
        raise ConfigError(
            f"tables, optimizer state, ids and gradients must be as they were at the lookup: {'; '.join(reasons)}. "
            "Convert, move or replace them before a lookup, or look up again before backward() and step()"
        )


def of_array(values: array[Any]) -> int:
    """Address of an array's numbers, which must not grow while a kernel reads them."""
    return values.buffer_info()[0]


def of_numpy(values: NDArray[Any]) -> int:
    """Address of the elements of records that outlive a kernel's call."""
    return int(values.ctypes.data)


def of_record(record: ctypes.Structure | ctypes.Array[Any]) -> int:
    """Address of a record that outlives a kernel's call."""
    return ctypes.addressof(record)


def memory_of(tensor: Tensor | torch.UntypedStorage) -> int:
    """A number that tells whether tensors, or storages, begin at one place in memory; not for kernels."""
    return tensor.data_ptr()
