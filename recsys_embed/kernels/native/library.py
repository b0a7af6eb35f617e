"""The compiled CPU kernels as a loaded library, and the records of a call (ops/cpu/program.h)."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

from recsys_embed.errors import BackendError
from recsys_embed.kernels.kinds import LAYOUT
from recsys_embed.kernels.native.records import FEATURE, ROW_LOOKUP, TRANSFORM

VARIANTS = ("plain", "avx2", "avx512")


class Matrix(ctypes.Structure):
    """Rows of floats, and the stride between them in elements."""

    _fields_: ClassVar = [("data", c_void_p), ("stride", c_int64)]


class Mask(ctypes.Structure):
    """Mask of the vectors of a lookup."""

    _fields_: ClassVar = [
        ("batch", c_int64),
        ("fields", c_int64),
        ("width", c_int64),
        ("ids", c_void_p),
        ("sample_stride", c_int64),
        ("feature_stride", c_int64),
        ("ids_are_32", c_int64),
        ("starts", c_void_p),
        ("thresholds", c_void_p),
        ("norm", c_int64),
        ("widths", c_void_p),
        ("widths_stride", c_int64),
        ("fallback", c_void_p),
        ("scales", c_void_p),
        ("blocks", c_void_p),
        ("blocks_are_8", c_int64),
        ("block_count", c_int64),
        ("vectors", Matrix),
        ("out", Matrix),
        ("gradient", Matrix),
        ("of_vectors", Matrix),
        ("of_thresholds", c_void_p),
        ("of_rest", c_void_p),
        ("slopes", c_void_p),
    ]


class Train(ctypes.Structure):
    """Slices of tensor trains, whose products are ``out``, or whose gradients are ``of_columns``."""

    _fields_: ClassVar = [
        ("cores", c_int64),
        ("widths", c_int64 * 4),
        ("ranks", c_int64 * 5),
        ("count", c_int64),
        ("columns", c_void_p),
        ("out", c_void_p),
        ("gradient", c_void_p),
        ("of_columns", c_void_p),
    ]


class Call(ctypes.Structure):
    """One lookup: programs, ids, tables, outputs."""

    _fields_: ClassVar = [
        ("features", c_void_p),
        ("row_lookups", c_void_p),
        ("feature_count", c_int64),
        ("row_lookup_count", c_int64),
        ("ids", c_void_p),
        ("batch", c_int64),
        ("sample_stride", c_int64),
        ("feature_stride", c_int64),
        ("ids_are_32", c_int64),
        ("offsets", c_void_p),
        ("sample_weights", c_void_p),
        ("storages", c_void_p),
        ("storage_widths", c_void_p),
        ("storage_kinds", c_void_p),
        ("storage_bytes", c_void_p),
        ("storage_steps", c_void_p),
        ("storage_count", c_int64),
        ("outputs", c_void_p),
        ("output_count", c_int64),
        ("kept", Matrix),
        ("index", c_void_p),
        ("threads", c_int64),
        ("mask", c_void_p),
    ]


def words_of(record: type[ctypes.Structure]) -> dict[str, int]:
    """Offset of each field in 64-bit words, of which all records consist."""
    return {name: getattr(record, name).offset // 8 for name in (f[0] for f in record._fields_)}


class Stored(ctypes.Structure):
    """How the rows of a storage that trains in few bits are stored."""

    _fields_: ClassVar = [
        ("kind", c_int64),
        ("bytes", c_int64),
        ("seed", c_int64),
        ("stochastic", c_int64),
        ("step", c_double),
        ("step_rate", c_double),
    ]


class StateForm(ctypes.Structure):
    """How elements of a state are stored: in 16 or 8 bits; or, with 0, as floats or integers."""

    _fields_: ClassVar = [("bits", c_int64), ("has_sign", c_int64), ("least", c_int64)]


class Rule(ctypes.Structure):
    """An optimizer's rule and its state for one storage."""

    _fields_: ClassVar = [
        ("number", c_int64),
        ("elements", c_int64),
        ("constants", c_double * 8),
        ("state", c_void_p * 4),
        ("curve", c_void_p),
        ("curve_count", c_int64),
        ("rounded", c_int64),
        ("seed", c_int64),
        ("forms", StateForm * 4),
    ]


class Update(ctypes.Structure):
    """The optimizer step of one storage."""

    _fields_: ClassVar = [
        ("rule", Rule),
        ("decay", c_double),
        ("sizes", c_void_p),
        ("epsilons", c_void_p),
        ("first", c_int64),
        ("step", c_int64),
        ("last", c_void_p),
        ("gradient", c_void_p),
        ("touched", c_void_p),
        ("touched_count", c_void_p),
        ("rows", c_int64),
        ("stored", Stored),
    ]


class Library(NamedTuple):
    """The loaded kernels.

    Args:
        handle: of the shared library.
        variant: instruction set in use.
        threaded: whether they use the threads of torch's runtime, or one thread.
        rules: names of the optimizers' rules, in order of their numbers.
    """

    handle: ctypes.CDLL
    variant: str
    threaded: bool
    rules: tuple[str, ...]


def _file() -> Path | None:
    given = os.environ.get("RECSYS_EMBED_NATIVE")
    if given:
        return Path(given)
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    return found[-1] if found else None


@cache
def library() -> Library | str:
    """The kernels, or the reason why there are none.

    ``RECSYS_EMBED_CPU`` names the instruction set to use, ``RECSYS_EMBED_NATIVE`` another build to load.
    """
    path = _file()
    if path is None:
        return "not built: installing from source with a C++ compiler (g++ or clang++) builds them"
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    other = f"{path.name} was built from other sources; install again"
    if not hasattr(handle, "rse_offsets_fit"):
        return other
    handle.rse_select.restype = c_char_p
    handle.rse_record_sizes.restype = c_int64
    sizes = [handle.rse_record_sizes(c_int64(i)) for i in range(8)]
    records = (Call, Update, Mask, Train, Stored)
    own = [TRANSFORM.itemsize, ROW_LOOKUP.itemsize, FEATURE.itemsize, *map(ctypes.sizeof, records)]
    handle.rse_transform_layout.restype = c_char_p
    if sizes != own or handle.rse_transform_layout() != LAYOUT.encode():
        return other
    handle.rse_rules.restype = c_char_p
    wanted = os.environ.get("RECSYS_EMBED_CPU")
    if wanted is not None and wanted not in VARIANTS:
        return f"RECSYS_EMBED_CPU must be one of {', '.join(VARIANTS)}; got {wanted!r}"
    name = handle.rse_select(None if wanted is None else wanted.encode())
    if name is None:
        return f"RECSYS_EMBED_CPU={wanted}, which this processor or this build does not have"
    handle.rse_forward.argtypes = [c_void_p]
    handle.rse_backward.argtypes = [c_void_p, c_void_p, c_int]
    handle.rse_catch_up.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64]
    handle.rse_update_rows.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64]
    handle.rse_train.argtypes = [c_void_p, c_int64]
    handle.rse_train.restype = c_int
    handle.rse_mask.argtypes = handle.rse_mask_backward.argtypes = [c_void_p, c_int64]
    handle.rse_forward.restype = handle.rse_backward.restype = handle.rse_catch_up.restype = c_int
    handle.rse_update_rows.restype = c_int
    handle.rse_offsets_fit.argtypes = [c_void_p, c_int64, c_int64, c_int64]
    handle.rse_offsets_fit.restype = c_int64
    handle.rse_mask.restype = handle.rse_mask_backward.restype = c_int
    return Library(handle, name.decode(), _share_threads(handle), tuple(handle.rse_rules().decode().split()))


_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    # For children that load the kernels themselves; those that inherit them are told by the kernels' own handler.
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def _share_threads(handle: ctypes.CDLL) -> bool:
    """Pass the kernels the entry points of the OpenMP runtime that torch has loaded; False if there is none.

    A forked process runs them in one thread: OpenMP would wait for threads that only its parent has.
    """
    if _forked:
        return False
    process = ctypes.CDLL(None)
    try:
        entries = [process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads]
    except AttributeError:
        return False
    handle.rse_set_runtime(*(ctypes.cast(e, c_void_p) for e in entries))
    return True


def loaded() -> Library:
    """The kernels.

    Raises:
        BackendError: they cannot run here; says why.
    """
    found = library()
    if isinstance(found, str):
        raise BackendError(f"backend 'native' cannot run: {found}. Use backend 'auto' or 'torch'")
    return found
