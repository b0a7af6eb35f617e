"""Names, shapes and bytes of the tensors in a file; nothing in it is executed, and values stay on disk until read."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys_embed.errors import CheckpointError
from recsys_embed.utils.files import check_packing
from recsys_embed.utils.strict_json import own_json

_MAX_HEADER = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file; tensors with equal ``key`` are the same bytes, and ``read`` loads the values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: Hashable
    read: Callable[[], Tensor]


def read_torch(path: Path) -> tuple[list[FileTensor], dict[str, Any]]:
    """Tensors of a file of ``torch.save``, and the settings of a training run; nothing in it is executed."""
    payload: Any = None
    for mmap in (True, False):  # files of the format before zip cannot be mapped
        try:
            with warnings.catch_warnings():
                check_packing(path)
                warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read raises
                payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            break
        except pickle.UnpicklingError as e:
            raise CheckpointError(
                f"{path} holds more than tensors, numbers and texts, or is damaged, and loading it would run code; "
                f"save model.state_dict() instead, or load it yourself and pass the module ({str(e).splitlines()[0]})"
            ) from e
        except Exception as e:  # a damaged file is unpickled to anything
            if not mmap:
                raise CheckpointError(f"{path} cannot be read as a file of torch.save: {str(e)[:200]}") from e
    config: dict[str, Any] = {}
    if isinstance(payload, dict) and payload.get("format") == "recsys-embed-checkpoint":
        config = payload["config"] if isinstance(payload.get("config"), dict) else {}
        payload = payload.get("model")
    state = _state_of(payload)
    if state is None:
        raise CheckpointError(f"{path} holds no state dict: expected names with tensors, got {type(payload).__name__}")

    def stored(name: str, t: Tensor) -> FileTensor:
        key = (t.untyped_storage()._cdata, t.storage_offset(), t.numel())
        return FileTensor(name, tuple(t.shape), t.dtype, key, lambda: t)

    return [stored(str(name), t) for name, t in state.items() if isinstance(t, Tensor)], config


def _state_of(payload: Any) -> Mapping[str, Any] | None:
    """The names with tensors: the payload itself, or the member of it that holds most bytes in tensors."""
    if not isinstance(payload, Mapping):
        return None

    def size(value: Any) -> int:
        tensors = value.values() if isinstance(value, Mapping) else ()
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    found = max([payload, *payload.values()], key=size)
    return found if size(found) or (found is payload and not payload) else None


def parse_manifest(path: Path, text: Any) -> dict[str, Any]:
    """The manifest of an export, from the text in its metadata; CheckpointError where it cannot be used."""
    try:
        manifest = own_json(text)
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{path} is damaged: its manifest is no JSON ({e})") from e
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if type(version) is not int or version not in (1, 2):
        raise CheckpointError(f"{path} is an export of a version that this library does not read")
    return manifest


def read_safetensors(path: Path) -> tuple[list[FileTensor], Mapping[str, Any]]:
    """Tensors and metadata of a file, from its header as https://github.com/huggingface/safetensors describes it."""
    size = path.stat().st_size
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError(f"its header would have {length} bytes")
            header = own_json(f.read(length).decode())
        start = 8 + length
        metadata = header.get("__metadata__") or {}
        found = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            first, last = (int(n) for n in entry["data_offsets"])
            if min(shape, default=0) < 0 or not 0 <= first <= last <= size - start:
                raise ValueError(f"tensor {name!r} lies outside the file")
            if last - first != prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name!r} of shape {shape} has {last - first} bytes")
            found.append(
                FileTensor(name, shape, dtype, (first, last), _reader(path, start + first, last - first, dtype, shape))
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {e}") from e
    return found, metadata if isinstance(metadata, dict) else {}


def _reader(path: Path, at: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with path.open("rb") as f:
            f.seek(at)
            data = bytearray(f.read(size))
        return torch.frombuffer(data, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)

    return read
