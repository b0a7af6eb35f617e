"""Types of the arguments that many public functions share; what each form means is said where it is taken.

Importing needs torch and numpy only; nothing here is looked at when a function is called.

>>> from recsys_embed.typing import Budget, Statistics
>>> def halved(budget: Budget, stats: Statistics) -> int: ...
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from recsys_embed.utils.types import (
    JSON,
    BagIds,
    Budget,
    Counts,
    DynamicShapes,
    FeatureIds,
    Ids,
    IdValue,
    IdValues,
    JaggedIds,
    JSONMapping,
    Option,
    Parameter,
    Signature,
    SupportsArray,
    TableLike,
)

if TYPE_CHECKING:
    from torch import nn

    from recsys_embed.features import Schema
    from recsys_embed.optim import FusedOptimizer
    from recsys_embed.planning.curves import FrequencyCurve

__all__ = [
    "JSON",
    "BagIds",
    "Budget",
    "CountedData",
    "Counts",
    "DynamicShapes",
    "EvidenceSource",
    "FeatureIds",
    "FrequencySource",
    "HasCurve",
    "IdValue",
    "IdValues",
    "Ids",
    "JSONMapping",
    "JaggedIds",
    "Methods",
    "ModelOrSchema",
    "OptimizerSpec",
    "Option",
    "Parameter",
    "Signature",
    "Statistics",
    "SupportsArray",
    "TableLike",
    "UpdateRule",
]

# -- how often ids occur --------------------------------------------------------------------------------------------


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
