"""Checks of ids before any kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from recsys_embed.core import hashing
from recsys_embed.errors import ConfigError, IdRangeError
from recsys_embed.features import FeatureSpec
from recsys_embed.kernels.native.offsets import known_to_fit
from recsys_embed.kernels.recording import refused_when_run, tracing, unmapped
from recsys_embed.utils.types import IdValues

_ID_TYPES = (torch.int64, torch.int32)
_LAYOUTS = (torch.strided, torch.jagged)


def check_id_dtype(ids: object, where: str) -> Tensor:
    """``ids``, checked to be a tensor of int32 or int64.

    Args:
        where: name of the feature; empty for a whole collection.

    Raises:
        ConfigError: they are anything else.
    """
    if isinstance(ids, Tensor) and ids.dtype in _ID_TYPES and ids.layout in _LAYOUTS:
        return ids
    at = f"feature {where!r}" if where else "a collection's features"
    if not isinstance(ids, Tensor):
        raise ConfigError(f"ids must be a tensor of int32 or int64; got {type(ids).__name__} ({at})")
    if ids.dtype in _ID_TYPES:
        raise ConfigError(f"ids must be dense, or bags of values and offsets; got layout {ids.layout} ({at})")
    raise ConfigError(f"ids must be int32 or int64; got {ids.dtype} ({at})")


def given_ids(values: IdValues, spec: FeatureSpec, hashes: bool, near: nn.Module) -> IdValues:
    """Ids of one feature as users give them: for a method that hashes, also strings and numpy arrays, as a tensor.

    Other types are returned unchanged, and :func:`check_id_dtype` reports them.

    Args:
        near: the module whose tables are read, on the device of the result.

    Raises:
        ConfigError: strings for a feature whose ids are indices.
    """
    if isinstance(values, Tensor) and values.dtype != torch.uint64:
        return values
    if hasattr(values, "__array__") and not isinstance(values, Tensor):
        values = np.asarray(values)
    texts = _has_texts(values)
    if texts and (not hashes or spec.unseen not in (None, "hash")):
        why = f"with `unseen` {spec.unseen!r} it takes" if hashes else "its method takes"
        raise ConfigError(
            f"got strings for feature {spec.name!r}, but {why} indices into [0, {spec.num_embeddings}). Use a hashing "
            "method without another `unseen`, which takes strings as recsys_embed.string_ids makes them ids; or number "
            "them by a vocabulary first"
        )
    known = texts or isinstance(values, (np.ndarray, Tensor)) or (isinstance(values, list) and not values)
    return hashing.string_ids(values).to(_device(near)) if hashes and known else values


def _device(module: nn.Module) -> torch.device:
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _has_texts(values: object) -> bool:
    if isinstance(values, (list, tuple)):
        return any(_has_texts(v) for v in values)
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "USTO"
    return isinstance(values, (str, bytes))


def check_offsets(offsets: object, count: int, where: str, closed: bool = False) -> Tensor:
    """``offsets`` as int64, checked to start at 0, never decrease, and end at ``count`` or below.

    Values are checked on the CPU only: on a GPU the check would wait for the device.

    Args:
        offsets: int32 or int64, 1-D.
        closed: the last offset must be ``count``; without, it may be less, as in torch.

    Raises:
        ConfigError: of another type or shape, decreasing, or beyond the ids.
    """
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int64, torch.int32):
        got = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise ConfigError(f"offsets must be a tensor of int32 or int64; got {got} ({where})")
    if offsets.dim() != 1 or offsets.numel() < int(closed):
        raise ConfigError(f"offsets must be 1-D with at least one entry; got shape {tuple(offsets.shape)} ({where})")
    offsets = offsets.long()
    if known_to_fit(offsets, count, closed):
        return offsets
    if tracing():
        ends = offsets[-1:] != count if closed else offsets[-1:] > count
        return refused_when_run(offsets, torch.cat([offsets[:1] != 0, ends, offsets.diff() < 0]))
    if offsets.numel() and offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(unmapped(offsets[0]).aminmax()[0]), int(unmapped(offsets[-1]).aminmax()[1])
        fits = last == count if closed else last <= count
        if first != 0 or not fits or bool(unmapped(offsets.diff() < 0).any()):
            falls = ", falling in between" if first == 0 and fits else ""
            raise ConfigError(
                f"offsets must rise from 0 to the number of ids, {count}; got {first} to {last}{falls} ({where})"
            )
    return offsets


def jagged_parts(nested: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Values ``[n]`` and offsets ``[components + 1]`` of a jagged nested tensor.

    Raises:
        ConfigError: it has another layout or more dimensions, or leaves gaps between its components.
    """
    if nested.layout != torch.jagged or nested.dim() != 2 or nested._lengths is not None:  # type: ignore[attr-defined]
        raise ConfigError(
            f"a nested tensor must have layout=torch.jagged, two dimensions and no gaps (feature {where!r}); give its "
            "ids as values with offsets"
        )
    return nested.values(), nested.offsets()  # type: ignore[attr-defined]


def bag_mode(mode: str, offsets: Tensor) -> str:
    """The mode to pool with: ``"sum"`` if there is no bag, because torch's ``max`` then crashes the process."""
    return mode if offsets.numel() else "sum"


def check_id_range(ids: Tensor, size: int, where: str) -> None:
    """Raise unless all ids lie in ``[0, size)``.

    On a GPU, and while tracing, the check is an asynchronous assertion, which does not synchronise.

    Raises:
        IdRangeError: names the smallest and largest id.
    """
    if ids.numel() == 0:
        return
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        smallest, largest = unmapped(ids).aminmax()
        low, high = int(smallest), int(largest)
        if low < 0 or high >= size:
            raise IdRangeError(
                f"ids must be in [0, {size}); got values from {low} to {high} (feature {where!r}). Where ids "
                "never seen may come, say what becomes of them: `unseen` 'hash', 'oov' or 'zero'"
            )
    elif ids.device.type != "meta":
        torch._assert_async(((ids >= 0) & (ids < size)).all(), f"ids of feature {where!r} must be in [0, {size})")


def check_feature_ids(ids: Tensor, limits: Tensor, names: Sequence[str], feature: Tensor | None = None) -> None:
    """Raise unless every id is below the limit of its feature; a limit of -1 allows any id.

    Args:
        ids: int64 ``[B, F]``, or ``[n]`` with ``feature [n]``, the feature of each id.
        limits: int64 ``[F]``.

    Raises:
        IdRangeError: names the first feature at fault and its smallest and largest id.
    """
    # The number of ids may be unknown to a compiled model.
    if ids.device.type == "meta" or (not torch.compiler.is_compiling() and ids.numel() == 0):
        return
    bound = limits if feature is None else limits[feature]
    bad = ((ids < 0) | (ids >= bound)) & (bound >= 0)
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~bad.any(), "an id lies outside the range its feature declares")
    elif bool(unmapped(bad).any()):
        if unmapped(bad) is not bad:
            raise IdRangeError(f"an id lies outside the range that its feature declares (one of {', '.join(names)})")
        first = int(bad.any(0).nonzero().min() if feature is None else feature[bad].min())
        check_id_range(ids[:, first] if feature is None else ids[feature == first], int(limits[first]), names[first])
