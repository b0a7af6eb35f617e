"""The gather floor: the rows that a lookup reads, copied out once each by a loop in C++ that does nothing else."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys_embed import EmbeddingCollection
from recsys_embed.collection.lookup_bundle import LookupBundle
from recsys_embed.kernels.storage import allocate


@cache
def _library() -> Any:
    """Compiled for this processor at first use."""
    source = Path(__file__).with_name("floor.cpp")
    folder = Path(tempfile.mkdtemp())
    flags = ["-O3", "-march=native", "-std=c++17", "-fPIC"]
    subprocess.run(["g++", *flags, "-fopenmp", "-c", str(source), "-o", str(folder / "floor.o")], check=True)
    subprocess.run(["g++", "-shared", str(folder / "floor.o"), "-o", str(folder / "floor.so")], check=True)
    library = ctypes.CDLL(str(folder / "floor.so"))
    number = ctypes.c_int64
    library.floor_gather.argtypes = [ctypes.c_void_p, number, ctypes.c_void_p, number, number, ctypes.c_void_p, number]
    library.floor_gather.restype = None
    return library


def gather(table: Tensor, rows: Tensor, out: Tensor, width: int) -> None:
    """``out[i] = table.flatten()[rows[i] * table.shape[1] :][:width]`` in float32, in torch's number of threads."""
    threads, stride = torch.get_num_threads(), 4 * table.shape[1]
    _library().floor_gather(table.data_ptr(), stride, rows.data_ptr(), len(rows), 4 * width, out.data_ptr(), threads)


def reads(coll: EmbeddingCollection, ids: Tensor) -> list[tuple[str, Tensor, int]]:
    """Storage, rows in the order of the ids, and elements from each row's first on, of a lookup.

    Runs of rows, which lie side by side, are one read.
    """
    bundle = LookupBundle(coll.schema, coll.plan, coll.places, _shapes(coll), torch.empty(0), "torch")
    found: list[tuple[str, Tensor, int]] = []
    columns = [ids[:, list(part)] for part in bundle.parts[: len(bundle.kernel.groups)]]
    for group, request in zip(bundle.kernel.groups, bundle.kernel._requests(columns, None)[2], strict=True):
        for read, (storage, rows) in zip(group.reads, request, strict=True):
            width, count = _shapes(coll)[storage][1], _shapes(coll)[storage][0]
            first = (rows[..., 0] if read.num_rows > 1 else rows).clamp_max(count - read.num_rows)
            found.append((storage, first.contiguous().view(-1), read.num_rows * width))
    return found


def _shapes(coll: EmbeddingCollection) -> dict[str, tuple[int, int]]:
    return {name: (getattr(coll, name).shape[0], getattr(coll, name).shape[1]) for name in coll.storages}


def floor_of(coll: EmbeddingCollection, batches: list[Tensor]) -> Callable[[int], None]:
    """Gathers what a lookup of a batch reads, from tables of its own like the collection's, into outputs used again.

    The rows are known beforehand; a call is the reading and writing alone. The tables are its own so that nothing else
    has warmed them; they lie in huge pages where the OS allows, as the collection's do.
    """
    wanted = [reads(coll, ids) for ids in batches]
    tables = {name: allocate(*shape, torch.device("cpu"), torch.float32) for name, shape in _shapes(coll).items()}
    for name, table in tables.items():
        table.copy_(getattr(coll, name).detach())
    largest = max(wanted, key=lambda found: len(found[0][1]))
    outs = [torch.empty(len(rows) * width) for _, rows, width in largest]

    def run(turn: int) -> None:
        for (storage, rows, width), out in zip(wanted[turn], outs, strict=True):
            gather(tables[storage], rows, out, width)

    return run


def oracle(coll: EmbeddingCollection, ids: Tensor) -> Tensor:
    """The vectors of ``ids``, as the readable definition has them in float64: ``[B, fields * dim]``."""
    bundle = LookupBundle(coll.schema, coll.plan, coll.places, _shapes(coll), torch.empty(0), "reference")

    def read(storage: str, rows: Tensor, partial: bool) -> Tensor:
        return getattr(coll, storage).detach()[rows.clamp_min(0)].double()

    return bundle.single(ids, read).flatten(1)
