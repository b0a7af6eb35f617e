"""Physical storage: tables of one width and precision are stored in one tensor, so that one gather reads them all."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from recsys_embed.core.program import Table
from recsys_embed.core.row_format import RowFormat
from recsys_embed.features import MAX_ROWS
from recsys_embed.kernels.places import Place
from recsys_embed.kernels.pointers import memory_of

_MADV_HUGEPAGE = 14


def stack_tables(tables: Mapping[str, Table]) -> tuple[dict[str, tuple[int, int]], dict[str, Place]]:
    """Concatenate tables of equal width that are served at one precision.

    Args:
        tables: by key; dense tables are left out.

    Returns:
        Shape of each storage by name, and the place of each table. A storage stays below 2**31 rows.

    >>> from recsys_embed.core.program import Initializer
    >>> zero = Initializer("constant")
    >>> stack_tables({"a": Table("w", 3, 4, zero), "b": Table("w", 5, 4, zero)})
    ({'width4': (8, 4)}, {'a': Place(storage='width4', offset=0), 'b': Place(storage='width4', offset=3)})
    """
    shapes: dict[str, tuple[int, int]] = {}
    places: dict[str, Place] = {}
    current: dict[tuple[int, str, RowFormat | None], str] = {}
    for key, table in tables.items():
        if table.dense:
            continue
        kind = table.width, table.precision, table.training
        # Names of optimizer state begin with that of the storage.
        base = ("" if table.precision == "fp32" else f"{table.precision}_") + f"width{table.width}"
        if table.training is not None:
            base += f"_{table.training.quantization}"
        # Of formats that differ in their step or rounding, later ones are numbered.
        name = current.setdefault(kind, base if base not in shapes else f"{base}_{len(shapes)}")
        rows = shapes.get(name, (0, 0))[0]
        if rows + table.rows > MAX_ROWS:
            name = current[kind] = f"{base}_{len(shapes)}"
            rows = 0
        places[key] = Place(name, rows)
        shapes[name] = (rows + table.rows, table.width)
    return shapes, places


def formats_of(tables: Mapping[str, Table], places: Mapping[str, Place]) -> dict[str, RowFormat]:
    """The formats of the storages that train in few bits, by name."""
    return {places[key].storage: t.training for key, t in tables.items() if key in places and t.training is not None}


def advise_huge_pages(tensor: Tensor) -> bool:
    """Ask the OS to back a CPU tensor with huge pages; True if it accepted.

    Random row reads are limited by TLB misses: huge pages make them 1.3 to 3.5 times faster. Call it before the
    first write to the tensor. It does nothing on systems other than Linux and for tensors below one huge page.
    """
    size = tensor.numel() * tensor.element_size()
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or size < 1 << 21:
        return False
    page = mmap.PAGESIZE
    start = -(-memory_of(tensor) // page) * page
    length = (memory_of(tensor) + size - start) // page * page
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(start, length, _MADV_HUGEPAGE) == 0)


def allocate(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Uninitialised ``[rows, width]``, on huge pages if the OS allows."""
    out = torch.empty(rows, width, device=device, dtype=dtype)
    if not out.is_meta:
        advise_huge_pages(out)
    return out
