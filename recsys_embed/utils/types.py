"""Types of arguments and values that any module may name; :mod:`recsys_embed.typing` offers them to users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# -- plain values ---------------------------------------------------------------------------------------------------

JSON: TypeAlias = dict[str, Any]
"""A JSON object, made for the caller; its values are whatever JSON holds."""

JSONMapping: TypeAlias = Mapping[str, Any]
"""A JSON object that is only read."""

Option: TypeAlias = Any
"""A value of ``**options``: its type stands where the option is declared, and is checked there when it is given."""

Budget: TypeAlias = int | str
"""Bytes, or text such as ``"64MiB"``."""


class SupportsArray(Protocol):
    """What numpy makes an array of without being told how: arrays, tensors, columns of data frames."""

    def __array__(self) -> NDArray[Any]: ...


# -- ids ------------------------------------------------------------------------------------------------------------

IdValue: TypeAlias = str | bytes | int | float | np.integer | None
"""One id as data holds it: text, an integer, or None or NaN where the field is empty."""

IdValues: TypeAlias = "Tensor | SupportsArray | IdValue | Sequence[IdValues]"
"""Ids as data holds them: one, (nested) sequences of equal length, an array, or a tensor of integers."""

FeatureIds: TypeAlias = "IdValues | tuple[IdValues, Tensor]"
"""Ids of one feature, ``[B]`` or ``[B, L]``, or its bags as ``(values, offsets)``."""


class JaggedIds(Protocol):
    """What is read of a KeyedJaggedTensor, so that torchrec need not be installed."""

    def keys(self) -> list[str]: ...

    def values(self) -> Tensor: ...

    def offsets(self) -> Tensor: ...

    def weights_or_none(self) -> Tensor | None: ...

    def variable_stride_per_key(self) -> bool: ...


class BagIds(NamedTuple):
    """Ids of all features of a batch of B rows, as bags: bag ``f * B + b`` holds those of feature f of row b.

    Args:
        values: int32 or int64 ``[n]``, bag after bag.
        offsets: int64 ``[features * B + 1]``: where each bag begins; ends with n.
    """

    values: Tensor
    offsets: Tensor


Ids: TypeAlias = Tensor | Mapping[str, FeatureIds] | JaggedIds | BagIds
"""Ids of all features: ``[B, F]``, ``[n]`` beside offsets, by feature, bags, or a KeyedJaggedTensor."""

# -- how often ids occur --------------------------------------------------------------------------------------------

Counts: TypeAlias = SupportsArray | Sequence[float]
"""How often each id of one feature occurs: ``[num_embeddings]``, a tensor, an array or a list."""

# -- graphs ---------------------------------------------------------------------------------------------------------

DynamicShapes: TypeAlias = dict[str, Any] | tuple[Any, ...] | list[Any] | None
"""Dimensions that vary, nested as the inputs of the model are: what ``torch.export.export`` takes under this name."""

# -- transforms -----------------------------------------------------------------------------------------------------

Signature: TypeAlias = tuple[Any, ...]
"""What fixes the arithmetic of a transform, hashable; those of equal signatures run as one."""

Parameter: TypeAlias = int | Tensor
"""An integer of one transform, or those of several as a tensor that broadcasts with the ids."""

# -- tables ---------------------------------------------------------------------------------------------------------


class ArrowTable(Protocol):
    """A table in memory that hands over Arrow data: frames of polars and pandas, tables of pyarrow."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


class LazyTable(Protocol):
    """What is read of a lazy frame of polars, so that polars need not be installed."""

    def collect_schema(self) -> object: ...


TableLike: TypeAlias = "str | Path | Sequence[str | Path] | ArrowTable | LazyTable | Mapping[str, Sequence[object]]"
"""A table of rows: files, globs or folders, a frame in memory, or its columns by name."""

RowsLike: TypeAlias = "TableLike | Sequence[Mapping[str, object]]"
"""Rows: a table, or a list of rows by column."""
