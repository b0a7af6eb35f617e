"""Indexes: arrays besides the tables, by which a lookup finds the row of an id.

An index declares its typed arrays, their initial contents and those after an assignment, and how to detect damage.
Arrays of one name are concatenated over all features, so that lookups of any number of features read a fixed number of
buffers.

A new index and the transform that reads it take one file; the torch backend, checkpoints, plans, exports and reports
then support them. For the compiled kernels the transform's ``encoded`` returns a kind: add it to ``KINDS`` in
``kernels/kinds.py``, generate the header again, and add a case to ``ops/cpu/transforms.inl`` and to
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
        name: of its buffer, and its key in a state dict.
        dtype: one of ``INDEX_DTYPES``; smaller numbers can be packed into these.
        length: number of elements, the same for all arrays of an index.
    """

    name: str
    dtype: torch.dtype
    length: int


class IndexArrays(NamedTuple):
    """The index buffers of a module.

    Args:
        held: by name of the :class:`IndexArray`.
        longest: elements of the longest array that is searched.
    """

    held: Mapping[str, Tensor]
    longest: int = 0


class Index(ABC):
    """Base of indexes: arrays that lookups of one feature read besides tables. Subclasses are frozen dataclasses.

    Attributes:
        name: unique in its program.
        size: number of ids.
    """

    name: str
    size: int

    @property
    @abstractmethod
    def arrays(self) -> tuple[IndexArray, ...]:
        """The arrays to store; none if rows follow from ids alone."""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.length * a.dtype.itemsize for a in self.arrays)

    @property
    def searched(self) -> int:
        """Elements for a binary search; 0 if lookups do not search."""
        return 0

    @abstractmethod
    def faults(self) -> list[str]:
        """Faults of the description, one sentence each."""

    @abstractmethod
    def initial(self, device: torch.device) -> dict[str, Tensor]:
        """Initial arrays by name, for ids numbered by descending frequency."""

    @property
    def by_frequency(self) -> bool:
        """Whether :meth:`ranked` fills the arrays, which needs counts of ids."""
        return False

    def ranked(self, ids: Tensor) -> dict[str, Tensor]:
        """The arrays by name, given all ids in order of descending frequency."""
        raise NotImplementedError(f"{type(self).__name__} does not go by frequency")

    @abstractmethod
    def packed(self, value: Tensor) -> dict[str, Tensor]:
        """The arrays by name for a ``value`` from ``assign_`` or a plan.

        Raises:
            ConfigError: the value is of another shape or range; says what the index takes.
        """

    @abstractmethod
    def value(self, at: int = 0, arrays: IndexArrays | None = None) -> Tensor:
        """Inverse of :meth:`packed`.

        Args:
            at: offset of the index in ``arrays``.
            arrays: of the module; not needed if :attr:`arrays` is empty.
        """

    @abstractmethod
    def damage(self, held: Mapping[str, Tensor]) -> str | None:
        """The reason why arrays from a file are not valid for this index, or None; lookups would read beyond tables.

        Args:
            held: by name, each of the length that :attr:`arrays` states.
        """

    def _own(self, name: str, at: int, arrays: IndexArrays | None) -> Tensor:
        """This index's part of a buffer."""
        if arrays is None:
            raise RuntimeError(f"index {self.name!r} was asked for its values without the module's arrays")
        length = next(a.length for a in self.arrays if a.name == name)
        return arrays.held[name][at : at + length]
