"""Arrays of a plan, such as the codes of a learned clustering, in one safetensors file beside the plan's text.

The text describes each array and contains the SHA-256 of the file, so the file is verified before arrays are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys_embed.core.codes import pack, packed_words, unpack
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.utils.settings import Settings, fault, param

DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_IN_FILE = {"uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64"}
_MOST_BITS = 16
_MOST_DIMS = 16
_CHUNK = 1 << 20


@dataclass(frozen=True)
class StoredArray(Settings):
    """Storage format of an array in the file.

    Args:
        dtype: of its elements, a name of ``DTYPES``.
        shape: of the array.
        bits: of each element, 1 to 16, packed by :func:`recsys_embed.core.codes.pack`; None: not packed.
    """

    noun, title = "key of an array", "an array of a plan"
    dtype: str
    shape: tuple[int, ...] = param(MISSING, low=0, below=1 << 48, empty=True)
    bits: int | None = param(None, low=1)

    def conflicts(self) -> list[str]:
        if self.dtype not in DTYPES:
            return [fault("dtype", f"one of {', '.join(DTYPES)}", self.dtype)]
        # Of many dimensions the product takes long, and one of length 0 would hide the others.
        if len(self.shape) > _MOST_DIMS or prod(max(n, 1) for n in self.shape) >= 1 << 48:
            return [fault("shape", f"at most {_MOST_DIMS} lengths whose product is below 2**48", self.shape)]
        wrong = self.bits is not None and self.bits > self.most_bits
        return [fault("bits", f"at most {self.most_bits} of {self.dtype}", self.bits)] if wrong else []

    @classmethod
    def of(cls, values: Tensor) -> StoredArray:
        """The format that stores these integers in the fewest bytes."""
        plain = cls(_NAMES[values.dtype], tuple(values.shape))
        low, high = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
        bits = max(1, high.bit_length())
        if low < 0 or bits > plain.most_bits:
            return plain
        packed = replace(plain, bits=bits)
        return packed if packed.nbytes < plain.nbytes else plain

    @property
    def most_bits(self) -> int:
        """Most bits per element when packed; bits beyond those of the type would be lost."""
        return min(_MOST_BITS, int(torch.iinfo(DTYPES[self.dtype]).max).bit_length())

    def to_dict(self) -> dict[str, Any]:
        packed = {} if self.bits is None else {"bits": self.bits}
        return {"dtype": self.dtype, "shape": list(self.shape), **packed}

    @property
    def in_file(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of the array as stored."""
        if self.bits is None:
            return DTYPES[self.dtype], self.shape
        return torch.int32, (packed_words(prod(self.shape), self.bits),)

    @property
    def nbytes(self) -> int:
        dtype, shape = self.in_file
        return dtype.itemsize * prod(shape)

    def encode(self, values: Tensor) -> Tensor:
        """The array as stored."""
        values = values.detach().cpu().contiguous()
        return values if self.bits is None else pack(values.view(-1), self.bits)

    def decode(self, stored: Tensor) -> Tensor:
        """Inverse of :meth:`encode`."""
        if self.bits is None:
            return stored.view(self.shape)
        out = torch.empty(prod(self.shape), dtype=DTYPES[self.dtype])
        for start in range(0, len(out), _CHUNK):
            places = torch.arange(start, min(start + _CHUNK, len(out)))
            out[start : start + len(places)] = unpack(stored, places, self.bits)
        return out.view(self.shape)


ArrayFormats = Mapping[str, Mapping[str, StoredArray]]


def _header(layout: ArrayFormats) -> bytes:
    """Header of the file; its length is a multiple of 8."""
    at, items = 0, {}
    for feature, arrays in layout.items():
        for index, array in arrays.items():
            dtype, shape = array.in_file
            span = [at, at + array.nbytes]
            items[f"{feature}/{index}"] = {"dtype": _IN_FILE[_NAMES[dtype]], "shape": list(shape), "data_offsets": span}
            at = span[1]
    text = json.dumps(items, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class _Description(Settings):
    """Description of the arrays in a plan's text."""

    noun, title = "key", "arrays of a plan"
    sha256: str
    features: Mapping[str, Any]
    file: str | None = None

    def conflicts(self) -> list[str]:
        wrong = {name: row for name, row in self.features.items() if not isinstance(row, Mapping)}
        return [fault(f"features.{name:.80}", "arrays by index", row) for name, row in wrong.items()]


@dataclass(frozen=True)
class PlanArrays:
    """Arrays by feature and index, or only their description.

    Args:
        layout: format of each array.
        sha256: of the file.
        values: the arrays; None if only their description is known.
        file: from which they were read.
    """

    layout: ArrayFormats
    sha256: str
    values: Mapping[str, Mapping[str, Tensor]] | None = field(default=None, compare=False, repr=False)
    file: Path | None = field(default=None, compare=False)

    @classmethod
    def of(cls, values: Mapping[str, Mapping[str, Tensor]]) -> PlanArrays:
        """From integer tensors by feature and index.

        Raises:
            ConfigError: a tensor of another type.
        """
        faults = [
            f"arrays of a plan are tensors of {', '.join(DTYPES)}; got {getattr(t, 'dtype', t)!r:.80} "
            f"(index {index!r}, feature {feature!r})"
            for feature, row in values.items()
            for index, t in row.items()
            if not isinstance(t, Tensor) or t.dtype not in _NAMES
        ]
        names = [f"{feature}/{index}" for feature, row in values.items() for index in row]
        faults += [
            f"{n!r} names two arrays; rename a feature" for n in sorted({n for n in names if names.count(n) > 1})
        ]
        raise_faults(faults, "arrays of a plan")
        layout = {feature: {i: StoredArray.of(t) for i, t in row.items()} for feature, row in values.items()}
        found = cls(layout, "", {feature: dict(row) for feature, row in values.items()})
        digest = hashlib.sha256()
        for piece in found.pieces():
            digest.update(piece)
        return cls(layout, digest.hexdigest(), found.values)

    def need_values(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The arrays.

        Raises:
            ConfigError: only their description is known.
        """
        if self.values is None:
            raise ConfigError(
                f"the plan's arrays (SHA-256 {self.sha256:.12}...) are not at hand: write the plan with Plan.save and "
                "read it with Plan.load"
            )
        return self.values

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the file, in pieces."""
        yield _header(self.layout)
        for feature, row in (self.values or {}).items():
            for index, values in row.items():
                stored = self.layout[feature][index].encode(values)
                yield stored.numpy().tobytes()

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(_header(self.layout)) + sum(a.nbytes for row in self.layout.values() for a in row.values())

    def to_dict(self) -> dict[str, Any]:
        """The description, JSON-ready."""
        features = {f: {index: a.to_dict() for index, a in row.items()} for f, row in self.layout.items()}
        file = {} if self.file is None else {"file": str(self.file)}
        return {**file, "sha256": self.sha256, "features": features}

    @classmethod
    def from_dict(cls, data: Any, folder: Path | None = None) -> PlanArrays:
        """Inverse of :meth:`to_dict`; also reads the arrays, if the description names a file that can be located.

        Args:
            data: JSON values.
            folder: to which a relative file name refers.

        Raises:
            ConfigError: the description is not valid, or does not match the file.
        """
        given = _Description.from_dict(data)
        layout: dict[str, dict[str, StoredArray]] = {}
        faults = []
        for feature, row in given.features.items():
            layout[feature] = {}
            for index, array in row.items():
                try:
                    layout[feature][index] = StoredArray.from_dict(array)
                except ConfigError as e:
                    faults.append(f"{e} (index {index!r}, feature {feature!r})")
        raise_faults(faults, "arrays of a plan")
        found = cls(layout, given.sha256)
        if given.file is None or (folder is None and not Path(given.file).is_absolute()):
            return found
        return found.read((folder or Path()) / given.file)

    def read(self, path: Path) -> PlanArrays:
        """The same with arrays read from a file.

        Raises:
            ConfigError: the file is missing, or its size or SHA-256 are not those in the plan.
        """
        try:
            size = path.stat().st_size
        except (OSError, ValueError) as e:  # ValueError: not a possible file name
            why = e.strerror if isinstance(e, OSError) else e
            raise ConfigError(f"{str(path)!r:.200}, the arrays of the plan, cannot be read: {why}") from e
        if size != self.nbytes:
            raise ConfigError(f"{path} is damaged or of another plan: {size} bytes where the plan says {self.nbytes}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        header = _header(self.layout)
        if digest != self.sha256:
            raise ConfigError(f"{path} is damaged or of another plan: its SHA-256 is {digest}, not {self.sha256}")
        at = len(header)
        values: dict[str, dict[str, Tensor]] = {}
        for feature, row in self.layout.items():
            values[feature] = {}
            for index, array in row.items():
                dtype, shape = array.in_file
                raw = np.fromfile(path, _NAMES[dtype], prod(shape), offset=at)
                values[feature][index] = array.decode(torch.from_numpy(raw))
                at += array.nbytes
        return PlanArrays(self.layout, self.sha256, values, path.resolve())
