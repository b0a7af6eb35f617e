"""Indexes: arrays that a module stores beside its tables, from which a lookup finds the row of an id.

An index says which typed arrays it needs, what they hold at first and after an assignment, and how damage shows. Arrays
of one name of all features stand end to end in one buffer, so that lookups of any number of features read a fixed
number of buffers.

An index and the transform that reads it need a file of their own; the torch backend, checkpoints, plans, exports and
reports then have them. For the compiled kernels the transform's ``encoded`` names a kind: add it to ``KINDS`` in
``kernels/kinds.py`` and write the header anew, and give it a case in ``ops/cpu/transforms.inl`` and in
``kernels/triton/ids.py``. :mod:`recsys_embed.core.codes` is an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class IndexArray(NamedTuple):
    """One array of an index.

    Args:
        name: of the buffer that holds it, and of its key in a state dict.
        dtype: one of ``INDEX_DTYPES``; numbers of fewer bits are packed into these.
        length: number of elements, the same for all arrays of an index.
    """

    name: str
    dtype: torch.dtype
    length: int


class IndexArrays(NamedTuple):
    """The buffers of a module that lookups read.

    Args:
        held: by the name that :class:`IndexArray` gives.
        longest: elements of the longest array that a lookup searches.
    """

    held: Mapping[str, Tensor]
    longest: int = 0


class Index(ABC):
    """What lookups of one feature read beside tables. Subclasses are frozen dataclasses.

    Attributes:
        name: unique in its program.
        size: number of ids.
    """

    name: str
    size: int

    @property
    @abstractmethod
    def arrays(self) -> tuple[IndexArray, ...]:
        """What has to be stored; nothing where ids alone say which row they read."""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.length * a.dtype.itemsize for a in self.arrays)

    @property
    def searched(self) -> int:
        """Elements that a binary search runs over, 0 where a lookup does not search."""
        return 0

    @abstractmethod
    def faults(self) -> list[str]:
        """What is wrong with the description, in words."""

    @abstractmethod
    def initial(self, device: torch.device) -> dict[str, Tensor]:
        """The arrays by name before anything is assigned, ids being numbered by falling frequency."""

    @property
    def by_frequency(self) -> bool:
        """Whether :meth:`ranked` fills the arrays, so that counts of ids are asked for."""
        return False

    def ranked(self, ids: Tensor) -> dict[str, Tensor]:
        """The arrays by name, given all ids from the most frequent on."""
        raise NotImplementedError(f"{type(self).__name__} does not go by frequency")

    @abstractmethod
    def packed(self, value: Tensor) -> dict[str, Tensor]:
        """The arrays by name that hold ``value``, which ``assign_`` or a plan gives.

        Raises:
            ConfigError: the value is of another shape or range; says what the index takes.
        """

    @abstractmethod
    def value(self, at: int = 0, arrays: IndexArrays | None = None) -> Tensor:
        """Inverse of :meth:`packed`.

        Args:
            at: where the index begins in ``arrays``.
            arrays: of the module; not needed where :attr:`arrays` is empty.
        """

    @abstractmethod
    def damage(self, held: Mapping[str, Tensor]) -> str | None:
        """What keeps arrays of a file from being those of this index, in words; lookups would read beyond tables.

        Args:
            held: by name, each of the length that :attr:`arrays` states.
        """

    def _own(self, name: str, at: int, arrays: IndexArrays | None) -> Tensor:
        """The index's part of a buffer."""
        if arrays is None:
            raise RuntimeError(f"index {self.name!r} was asked for its values without the module's arrays")
        length = next(a.length for a in self.arrays if a.name == name)
        return arrays.held[name][at : at + length]
