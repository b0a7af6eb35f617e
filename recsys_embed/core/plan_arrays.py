"""Arrays that a plan carries beside its text, as the codes of a learned clustering, in one file that safetensors reads.

The plan's text describes each array and holds the SHA-256 of the whole file, so the file is checked before anything of
it is taken into memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys_embed.core.codes import pack, packed_words, unpack
from recsys_embed.errors import ConfigError, raise_faults

DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_IN_FILE = {"uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64"}
_MOST_BITS = 16
_CHUNK = 1 << 20


@dataclass(frozen=True)
class StoredArray:
    """How an array lies in the file.

    Args:
        dtype: of its elements, a name of ``DTYPES``.
        shape: of the array.
        bits: of each element, 1 to 16, packed as :func:`recsys_embed.core.codes.pack` does; None: stored as they are.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: int | None = None

    @classmethod
    def of(cls, values: Tensor) -> StoredArray:
        """The smallest way to store some integers."""
        plain = cls(_NAMES[values.dtype], tuple(values.shape))
        low, high = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
        packed = replace(plain, bits=max(1, high.bit_length()))
        fits = low >= 0 and packed.bits is not None and packed.bits <= _MOST_BITS
        return packed if fits and packed.nbytes < plain.nbytes else plain

    @classmethod
    def from_dict(cls, data: Any) -> StoredArray:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: it does not describe an array.
        """
        given = dict(data) if isinstance(data, Mapping) else {}
        dtype, shape, bits = given.pop("dtype", None), given.pop("shape", None), given.pop("bits", None)
        sizes = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
        known = isinstance(dtype, str) and dtype in DTYPES
        # More bits than the type has would be cut off.
        most = min(_MOST_BITS, int(torch.iinfo(DTYPES[dtype]).max).bit_length()) if known else _MOST_BITS
        packed = bits is None or (type(bits) is int and 1 <= bits <= most)
        if given or not known or not sizes or not packed:
            raise ConfigError(
                f"an array of a plan has a `dtype` ({', '.join(DTYPES)}), a `shape` and, where it is packed, `bits` "
                f"from 1 to {most}; got {data!r:.120}"
            )
        return cls(str(dtype), tuple(shape or ()), bits)

    def to_dict(self) -> dict[str, Any]:
        packed = {} if self.bits is None else {"bits": self.bits}
        return {"dtype": self.dtype, "shape": list(self.shape), **packed}

    @property
    def in_file(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of what the file holds."""
        if self.bits is None:
            return DTYPES[self.dtype], self.shape
        return torch.int32, (packed_words(prod(self.shape), self.bits),)

    @property
    def nbytes(self) -> int:
        dtype, shape = self.in_file
        return dtype.itemsize * prod(shape)

    def encode(self, values: Tensor) -> Tensor:
        """What the file holds of an array."""
        values = values.detach().cpu().contiguous()
        return values if self.bits is None else pack(values.view(-1), self.bits)

    def decode(self, stored: Tensor) -> Tensor:
        """Inverse of :meth:`encode`."""
        if self.bits is None:
            return stored.view(self.shape)
        places = torch.arange(prod(self.shape)).split(_CHUNK)
        values = [unpack(stored, part, self.bits).to(DTYPES[self.dtype]) for part in places]
        return torch.cat(values).view(self.shape)


Layout = Mapping[str, Mapping[str, StoredArray]]


def _header(layout: Layout) -> bytes:
    """What the file begins with; its length is a multiple of 8."""
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
class PlanArrays:
    """Arrays by feature and index, or their description alone.

    Args:
        layout: how each is stored.
        sha256: of the file that holds them.
        values: the arrays; None where only their description is at hand.
        file: that they were read from.
    """

    layout: Layout
    sha256: str
    values: Mapping[str, Mapping[str, Tensor]] | None = field(default=None, compare=False, repr=False)
    file: Path | None = field(default=None, compare=False)

    @classmethod
    def of(cls, values: Mapping[str, Mapping[str, Tensor]]) -> PlanArrays:
        """Of integer tensors by feature and index.

        Raises:
            ConfigError: one of another type.
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
            ConfigError: only their description is at hand.
        """
        if self.values is None:
            raise ConfigError(
                f"the plan's arrays (SHA-256 {self.sha256:.12}...) are not at hand: write the plan with Plan.save and "
                "read it with Plan.load"
            )
        return self.values

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the file, piece by piece."""
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
        """The description as JSON values."""
        features = {f: {index: a.to_dict() for index, a in row.items()} for f, row in self.layout.items()}
        file = {} if self.file is None else {"file": str(self.file)}
        return {**file, "sha256": self.sha256, "features": features}

    @classmethod
    def from_dict(cls, data: Any, folder: Path | None = None) -> PlanArrays:
        """Inverse of :meth:`to_dict`, with the arrays where the description names their file and it can be found.

        Args:
            data: JSON values.
            folder: that a relative name of the file goes by.

        Raises:
            ConfigError: no such description, or another file than it describes.
        """
        given: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {}
        features, digest, file = given.pop("features", None), given.pop("sha256", None), given.pop("file", None)
        rows = isinstance(features, Mapping) and all(isinstance(row, Mapping) for row in features.values())
        if given or not rows or not isinstance(digest, str) or not isinstance(file, str | None):
            raise ConfigError(f"`arrays` of a plan have a `sha256`, `features` and a `file`; got {data!r:.120}")
        layout = {f: {i: StoredArray.from_dict(a) for i, a in row.items()} for f, row in (features or {}).items()}
        found = cls(layout, digest)
        if file is None or (folder is None and not Path(file).is_absolute()):
            return found
        return found.read((folder or Path()) / file)

    def read(self, path: Path) -> PlanArrays:
        """The same with the arrays of a file.

        Raises:
            ConfigError: the file is missing, of another size or with other bytes than the plan says.
        """
        try:
            size = path.stat().st_size
        except (OSError, ValueError) as e:  # of a name that no file can have, the latter
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
