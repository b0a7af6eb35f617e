"""The encoders of a data folder as JSON and arrays, the form in which an exported file holds them; needs numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from recsys_embed.errors import ConfigError
from recsys_embed.features import MAX_ROWS
from recsys_embed.utils.settings import FilePart, fault, param
from recsys_embed.utils.types import JSONMapping

PREFIX = "encoders/"
"""Of the names of their tensors."""
VERSION = 1
Output = Literal["probability", "value"]
Form = Literal["single", "list", "sequence"]
ValueType = Literal["string", "integer", "unsigned", "bool", "date", "time", "edges"]
_PARTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "string": {"hashes": ("I32",), "ids": ("I32",), "ends": ("I32", "I64"), "text": ("U8",)},
    "edges": {"edges": ("F64",)},
}
_INTEGERS: Mapping[str, tuple[str, ...]] = {"keys": ("I32", "I64"), "ids": ("I32",)}


@dataclass(frozen=True)
class StoredVocabulary(FilePart):
    """What a file says of a vocabulary.

    Args:
        number: of the vocabulary in the file.
        name: of the vocabulary.
        type: of its values; ``"edges"``: buckets of numbers.
        size: rows of the table.
        missing_id: id of a missing value, 0 where it has none of its own.
    """

    name: str
    type: ValueType
    number: int = param(MISSING, low=0, below=1 << 31)
    size: int = param(MISSING, low=1, high=MAX_ROWS)
    missing_id: int = param(0, low=0, high=MAX_ROWS)

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Its arrays by the last part of their names, and the types that each may have."""
        return _PARTS.get(self.type, _INTEGERS)

    def array(self, part: str) -> str:
        """The name of one of its arrays."""
        return f"{PREFIX}{self.number}.{part}"


@dataclass(frozen=True)
class _About(FilePart):
    kind: Literal["table", "criteo"]
    output: Output
    version: int
    features: tuple[Mapping[str, Any], ...]
    vocabularies: Mapping[str, Any]
    dense: tuple[str, ...] = param((), empty=True)
    columns: tuple[Mapping[str, Any], ...] = param((), empty=True)
    options: Mapping[str, Any] | None = None
    source: Mapping[str, Any] | None = None
    preset: str | None = None

    def conflicts(self) -> list[str]:
        if self.version != VERSION:
            return [fault("version", f"{VERSION}, which this library reads", self.version)]
        wrong = [f for f in self.features if not isinstance(f.get("name"), str) or f.get("form") not in get_args(Form)]
        want = f"objects with `name` and `form`, one of {', '.join(get_args(Form))}"
        return [fault("features", want, wrong[0])] if wrong else []


@dataclass(frozen=True)
class StoredEncoders:
    """Encoders in the form of a file.

    Args:
        about: JSON: ``kind`` (``"table"`` or ``"criteo"``), ``output`` (what a score is), ``features`` and ``dense`` in
            the order of a batch, ``columns`` with what each learned, ``vocabularies`` by their names in a data folder.
        arrays: of the vocabularies, by name.
    """

    about: JSONMapping
    arrays: Mapping[str, NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    @cached_property
    def vocabularies(self) -> dict[str, StoredVocabulary]:
        """The vocabularies by their names in a data folder."""
        return dict(stored_vocabularies(self.about))

    def replace(self, **about: Any) -> StoredEncoders:
        """The same with other values of ``about``."""
        return StoredEncoders({**self.about, **about}, self.arrays)


def stored_vocabularies(about: JSONMapping) -> Iterator[tuple[str, StoredVocabulary]]:
    """The vocabularies that ``about`` tells of."""
    for file, item in about["vocabularies"].items():
        yield file, StoredVocabulary.read(item, f"encoders, vocabulary {file!r:.80}")


def check_about(about: Any, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> set[str]:
    """Check what a file says of its encoders against its tensors, before anything is built of it.

    Args:
        about: of the file.
        shapes: type and shape of every tensor of the file by name.

    Returns:
        Names of the encoders' tensors.

    Raises:
        ConfigError: anything that does not fit.
    """
    top = _About.read(about, "manifest, encoders")
    names: set[str] = set()
    for file, item in stored_vocabularies({"vocabularies": top.vocabularies}):
        where = f"manifest, vocabulary {file!r:.80}"
        lengths = {}
        for part, types in item.parts.items():
            name = item.array(part)
            kind, shape = shapes.get(name, ("nothing", ()))
            if kind not in types or len(shape) != 1 or name in names:
                raise ConfigError(f"{name!r} must be one {' or '.join(types)} [n]; got {kind} {list(shape)} ({where})")
            names.add(name)
            if part != "text":
                lengths[part] = shape[0]
        if len(set(lengths.values())) > 1 or max(lengths.values()) >= item.size + (item.type == "edges"):
            raise ConfigError(f"its arrays hold {lengths} values of {item.size} ids ({where})")
    return names


def as_arrays(values: Mapping[str, NDArray[Any]], item: StoredVocabulary) -> dict[str, NDArray[Any]]:
    """Arrays of a vocabulary under their names in a file."""
    return {item.array(part): np.ascontiguousarray(array) for part, array in values.items()}
