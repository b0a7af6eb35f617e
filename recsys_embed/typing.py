"""Types of the arguments that many public functions share; what each form means is said where it is taken.

Importing needs torch and numpy only; nothing here is looked at when a function is called.

>>> from recsys_embed.typing import Budget, Statistics
>>> def halved(budget: Budget, stats: Statistics) -> int: ...
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from recsys_embed.features import Schema
    from recsys_embed.optim import FusedOptimizer
    from recsys_embed.planning.curves import FrequencyCurve

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


Ids: TypeAlias = Tensor | Mapping[str, FeatureIds] | JaggedIds
"""Ids of all features: ``[B, F]``, ``[n]`` beside offsets, by feature, or a KeyedJaggedTensor."""

# -- how often ids occur --------------------------------------------------------------------------------------------

Counts: TypeAlias = SupportsArray | Sequence[float]
"""How often each id of one feature occurs: ``[num_embeddings]``, a tensor, an array or a list."""


class HasCurve(Protocol):
    """What knows a curve of frequencies."""

    @property
    def curve(self) -> FrequencyCurve: ...


class CountedData(Protocol):
    """What statistics need of a data set; see :class:`recsys_embed.data.DataSource`."""

    @property
    def stats(self) -> JSONMapping | None: ...

    def schema(self, embedding_dim: int) -> Schema: ...

    def counts(self, feature: str) -> Tensor | None: ...


FrequencySource: TypeAlias = "Counts | tuple[Counts, Counts] | FrequencyCurve | HasCurve"
"""Of one feature: counts per id, ``(ids, counts)``, or a curve."""

Statistics: TypeAlias = Mapping[str, FrequencySource] | CountedData | Path | str
"""By feature, or as the content of a ``stats.json``; an opened data set; or the path of a data folder."""

# -- what is trained and planned ------------------------------------------------------------------------------------

ModelOrSchema: TypeAlias = "Schema | nn.Module"
"""The features, or a model whose embedding tables are the features."""

UpdateRule: TypeAlias = "FusedOptimizer | str"
"""A fused optimizer, or its name."""

OptimizerSpec: TypeAlias = "FusedOptimizer | torch.optim.Optimizer | type[torch.optim.Optimizer] | str"
"""A fused optimizer; an optimizer of torch, or its class; or the name of one."""

Methods: TypeAlias = str | Collection[str] | Mapping[str, JSONMapping | None]
"""Names of methods, or names with options."""

EvidenceSource: TypeAlias = Iterable[JSONMapping] | Path | str
"""Rows of a comparison, or the folder or file that holds them."""

# -- graphs ---------------------------------------------------------------------------------------------------------

DynamicShapes: TypeAlias = dict[str, Any] | tuple[Any, ...] | list[Any] | None
"""Dimensions that vary, nested as the inputs of the model are: what ``torch.export.export`` takes under this name."""

# -- transforms -----------------------------------------------------------------------------------------------------

Signature: TypeAlias = tuple[Any, ...]
"""What fixes the arithmetic of a transform, hashable; those of equal signatures run as one."""

Parameter: TypeAlias = int | Tensor
"""An integer of one transform, or those of several as a tensor that broadcasts with the ids."""
