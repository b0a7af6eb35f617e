"""Transforms: functions from ids to rows of a table.

They map int64 ids to int64 rows in exact arithmetic. Their parameters are Python integers for one feature, or tensors
for all features of a collection, with one implementation for both. The planner, reports and searches only use the
properties that a transform declares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recsys_embed.core import hashing
from recsys_embed.core.id_sets import IdSet, positions
from recsys_embed.core.index import Index, IndexArrays
from recsys_embed.utils.deprecated import renamed_fields
from recsys_embed.utils.types import Parameter, Signature


class Sharing(NamedTuple):
    """How the ids of a feature, numbered by descending frequency, share the rows of a table.

    Args:
        private: ids ``[start, stop)`` with a row of their own.
        absent: ids ``[start, stop)`` without a row.
        rows: number of rows that all other ids share; 0: they have no row.
        key: transforms of equal keys agree on which ids share a row.
        even: ids are distributed evenly over the shared rows by arithmetic; else by hashing.
    """

    private: tuple[int, int] = (0, 0)
    absent: tuple[int, int] = (0, 0)
    rows: int = 0
    key: Hashable = None
    even: bool = False


class Transform(ABC):
    """Maps ids to rows. ``signature`` identifies the arithmetic, ``parameters`` are its integers."""

    def __init_subclass__(cls) -> None:
        # A subclass may map ids differently from its base, so kernels must not take it for the base.
        if "map" in cls.__dict__ and "encoded" not in cls.__dict__:
            cls.encoded = Transform.encoded  # type: ignore[method-assign]
        if "map" in cls.__dict__ and "reach" not in cls.__dict__:
            cls.reach = Transform.reach  # type: ignore[method-assign]

    @abstractmethod
    def signature(self) -> Signature:
        """Hashable; transforms of equal signatures only differ in their parameters and run as one operation."""

    @abstractmethod
    def parameters(self) -> tuple[int, ...]:
        """The integers that :meth:`map` takes."""

    @staticmethod
    @abstractmethod
    def map(
        signature: Signature,
        ids: Tensor,
        params: Sequence[Parameter],
        at: Parameter = 0,
        arrays: IndexArrays | None = None,
    ) -> Tensor:
        """Rows of ``ids``; each parameter is an integer or a tensor that broadcasts with ``ids``.

        ``at`` is the offset of the transform's index in ``arrays``.
        """

    def rows(self, ids: Tensor, at: int = 0, arrays: IndexArrays | None = None) -> Tensor:
        """Rows of ``ids`` (int64, any shape): int64, same shape; -1 where the id has no row."""
        return self.map(self.signature(), ids, self.parameters(), at, arrays)

    @property
    def may_be_absent(self) -> bool:
        return False

    @property
    def needs(self) -> Index | None:
        """The index in which the transform looks ids up, if any."""
        return None

    @property
    def reads(self) -> str | None:
        """Name of the index whose arrays the transform reads, if any."""
        return self.needs.name if self.needs is not None and self.needs.arrays else None

    @property
    def by_frequency(self) -> bool:
        """Whether frequent ids are treated differently from others."""
        return self.needs is not None and self.needs.by_frequency

    def encoded(self) -> tuple[str, dict[str, int]] | None:
        """Kind and fields of the transform in :mod:`recsys_embed.kernels.kinds`; None if kernels do not have it."""
        return None

    def reach(self, ids: int) -> int | None:
        """Rows that the table needs for ids in ``[0, ids)``; None if unknown: then every lookup is checked."""
        return None

    def sharing(self, ids: int, rows: int) -> Sharing:
        """How ``ids`` ids share the ``rows`` of the table, for the planner and for collision estimates.

        By default every id has its own row if there are enough rows; else ids are hashed over all rows.
        """
        if rows >= ids:
            return Sharing(private=(0, ids))
        return Sharing(rows=rows, key=(type(self), self.signature(), self.parameters()))

    def owners(self, ids: int, at: int = 0, arrays: IndexArrays | None = None) -> Tensor | None:
        """Ids with their own row, in the order of these rows, which are the table's first: int64; None if unknown.

        Args:
            ids: number of ids.
            at: offset of the transform's index in ``arrays``.
            arrays: of the module; the result is on their device, by default on the CPU.
        """
        return None


@dataclass(frozen=True)
class MixedRadixDigit(Transform):
    """``(x // div) % mod``, a digit of a mixed-radix number; ``mod=0`` keeps the whole quotient.

    ``affine = (a, b, p)`` first replaces x by ``(a*x + b) % p``: a bijection of [0, p) for a prime p and 0 < a < p.
    """

    div: int = 1
    mod: int = 0
    affine: tuple[int, int, int] | None = None

    def signature(self) -> Signature:
        return (MixedRadixDigit, self.affine is not None, self.div != 1, self.mod != 0)

    def parameters(self) -> tuple[int, ...]:
        return (self.div, self.mod, *(self.affine or (1, 0, 1)))

    @staticmethod
    def map(
        signature: Signature,
        ids: Tensor,
        params: Sequence[Parameter],
        at: Parameter = 0,
        arrays: IndexArrays | None = None,
    ) -> Tensor:
        _, has_affine, has_div, has_mod = signature
        div, mod, a, b, p = params
        if has_affine:
            ids = (ids * a + b) % p
        if has_div:
            # Not torch.div, which ONNX export translates to a float32 division.
            ids = ids // div
        return ids % mod if has_mod else ids

    def encoded(self) -> tuple[str, dict[str, int]]:
        if self.affine is None and self.div == 1 and self.mod == 0:
            return "identity", {}
        a, b, p = self.affine or (1, 0, 1)
        fields = {"div": self.div, "mod": self.mod, "affine": self.affine is not None, "a": a, "b": b, "p": p}
        return "digit", fields

    def reach(self, ids: int) -> int | None:
        quotients = -(-(self.affine[2] if self.affine else ids) // self.div)
        return min(self.mod or quotients, quotients)

    def sharing(self, ids: int, rows: int) -> Sharing:
        quotients = -(-ids // self.div)
        reached = min(self.mod or quotients, quotients)
        if reached >= ids:
            return Sharing(private=(0, ids))
        return Sharing(rows=reached, key=(self.div, self.mod), even=True)

    def owners(self, ids: int, at: int = 0, arrays: IndexArrays | None = None) -> Tensor | None:
        return torch.arange(ids) if self == MixedRadixDigit() else None


@renamed_fields(head="num_frequent", head_absent="frequent_absent")
@dataclass(frozen=True)
class Hash(Transform):
    """``num_frequent + offset + stride * h(x)``, h uniform in [0, size); ids in [0, num_frequent) map to themselves.

    With ``frequent_absent`` the ids in [0, num_frequent) have no row at all.
    """

    salt: int
    size: int
    stride: int = 1
    offset: int = 0
    num_frequent: int = 0
    frequent_absent: bool = False

    def signature(self) -> Signature:
        return (Hash, self.num_frequent > 0, self.frequent_absent)

    def parameters(self) -> tuple[int, ...]:
        return (self.salt, self.size, self.stride, self.num_frequent + self.offset, self.num_frequent)

    @staticmethod
    def map(
        signature: Signature,
        ids: Tensor,
        params: Sequence[Parameter],
        at: Parameter = 0,
        arrays: IndexArrays | None = None,
    ) -> Tensor:
        _, has_frequent, absent = signature
        salt, size, stride, offset, num_frequent = params
        rows = hashing.hash_rows(ids, salt, size) * stride + offset
        if has_frequent:
            private = (ids >= 0) & (ids < num_frequent)
            rows = torch.where(private, -1 if absent else ids, rows)
        return rows

    @property
    def may_be_absent(self) -> bool:
        return self.num_frequent > 0 and self.frequent_absent

    @property
    def by_frequency(self) -> bool:
        return self.num_frequent > 0

    def encoded(self) -> tuple[str, dict[str, int]]:
        fields = dict(zip(("salt", "size", "stride", "offset", "num_frequent"), self.parameters(), strict=True))
        return "hash", {**fields, "absent": self.frequent_absent}

    def reach(self, ids: int) -> int | None:
        return (self.size - 1) * self.stride + self.num_frequent + self.offset + 1

    def sharing(self, ids: int, rows: int) -> Sharing:
        frequent, none = (0, self.num_frequent), (0, 0)
        private, absent = (none, frequent) if self.frequent_absent else (frequent, none)
        return Sharing(private, absent, self.size, ("hash", self.salt, self.size))


@dataclass(frozen=True)
class Murmur(Transform):
    """Word ``word`` of thinc's four 32-bit hash keys, modulo ``size``."""

    seed: int
    word: int
    size: int

    def signature(self) -> Signature:
        return (Murmur, self.word)

    def parameters(self) -> tuple[int, ...]:
        return (self.seed, self.size)

    @staticmethod
    def map(
        signature: Signature,
        ids: Tensor,
        params: Sequence[Parameter],
        at: Parameter = 0,
        arrays: IndexArrays | None = None,
    ) -> Tensor:
        return hashing.murmur3_words(ids, params[0])[..., signature[1]] % params[1]

    def encoded(self) -> tuple[str, dict[str, int]]:
        return "murmur", {"salt": self.seed, "size": self.size, "word": self.word}

    def reach(self, ids: int) -> int | None:
        return self.size

    def sharing(self, ids: int, rows: int) -> Sharing:
        return Sharing(rows=self.size, key=("murmur", self.seed, self.word))


@dataclass(frozen=True)
class RankInSet(Transform):
    """Rank of an id in the set ``index``; other ids hash to ``count + [0, rest)``, or have no row (rest 0)."""

    index: IdSet
    rest: int = 0
    salt: int = 0

    def signature(self) -> Signature:
        return (RankInSet, self.index.form, self.rest > 0)

    def parameters(self) -> tuple[int, ...]:
        return (self.index.start, self.index.count, self.index.size, self.rest, self.salt)

    @staticmethod
    def map(
        signature: Signature,
        ids: Tensor,
        params: Sequence[Parameter],
        at: Parameter = 0,
        arrays: IndexArrays | None = None,
    ) -> Tensor:
        _, form, has_rest = signature
        start, count, size, rest, salt = params
        place = positions(form, ids, (start, count, size), at, arrays)
        if not has_rest:
            return place
        return torch.where(place < 0, count + hashing.hash_rows(ids, salt, rest), place)

    @property
    def may_be_absent(self) -> bool:
        return self.rest == 0

    @property
    def needs(self) -> IdSet:
        return self.index

    def encoded(self) -> tuple[str, dict[str, int]]:
        index = self.index
        fields = {"start": index.start, "count": index.count, "size": index.size, "rest": self.rest, "salt": self.salt}
        return index.form, fields

    def reach(self, ids: int) -> int | None:
        return self.index.count + self.rest

    def sharing(self, ids: int, rows: int) -> Sharing:
        private = (self.index.start, self.index.start + self.index.count)
        return Sharing(private, rows=self.rest, key=("hash", self.salt, self.rest))

    def owners(self, ids: int, at: int = 0, arrays: IndexArrays | None = None) -> Tensor | None:
        return self.index.value(at, arrays)
