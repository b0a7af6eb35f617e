"""Everything that an extension is written with: methods, transforms, update rules, models, searches and data sources.

These names are stable: one that changes is accepted under its earlier name, with a DeprecationWarning, for one version.
What other modules hold besides may change without notice. Importing needs torch and numpy only. Types of arguments that
many functions share (ids, statistics, budgets) are in :mod:`recsys_embed.typing`.

**A method** is a frozen dataclass derived from :class:`MethodConfig`, whose options are declared with :func:`param` and
which describes its lookup as a :class:`LookupProgram` of :class:`Table` and :class:`RowLookup`; a subclass of
:class:`CompressedEmbedding` that names it; and a call of :func:`register`. The contract that it keeps is
:func:`recsys_embed.testing.check_embedding`.

>>> from dataclasses import MISSING, dataclass
>>> from typing import ClassVar
>>> from recsys_embed.extend import *
>>> @dataclass(frozen=True, kw_only=True)
... class FoldConfig(MethodConfig):
...     method: ClassVar[str] = "fold"
...     num_rows: int = param(MISSING, "rows of the table", low=1)
...
...     def build_program(self, spec):
...         table = Table("weight", self.num_rows, spec.embedding_dim, Initializer.plain(spec))
...         return LookupProgram((table,), (RowLookup("weight", MixedRadixDigit(mod=self.num_rows)),))
...
...     @classmethod
...     def sized(cls, spec, size, **params):
...         return cls.from_params({**params, "num_rows": size})
>>> class FoldEmbedding(CompressedEmbedding):
...     '''Ids fold onto rows by their remainder.
...
...     >>> FoldEmbedding(1000, 16, num_rows=10).output_dim
...     16
...     '''
...
...     config_cls = FoldConfig
>>> FoldEmbedding(1000, 16, budget="4KiB").footprint().serve  # `register` makes it known by its key
4096

**A transform** from ids to rows derives from :class:`Transform`, and what it stores from :class:`Index`; **a
head**, what comes after the gather of rows, from :class:`Head`; **an update rule** from :class:`FusedOptimizer` with
:func:`register_rule`, **a model** from :class:`CTRModel` with :func:`register_model`, **a search** from
:class:`Search` with :func:`register_search`. **A data source** offers the members of :class:`DataSource`;
:class:`RowSource` derives them from rows read by number.

**A distribution** of its own names the modules that register by entry points of the groups ``recsys_embed.methods``,
``recsys_embed.models``, ``recsys_embed.rules`` and ``recsys_embed.searches``, see :mod:`recsys_embed.utils.plugins`.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

from recsys_embed.core import hashing
from recsys_embed.core.codes import Codes
from recsys_embed.core.footprint import Footprint
from recsys_embed.core.heads import Contraction, Head, PerClassNetwork, PooledCombination, Projection
from recsys_embed.core.id_sets import IdSet
from recsys_embed.core.index import Index, IndexArray, IndexArrays
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import Initializer, LookupProgram, RowLookup, Table, Weight
from recsys_embed.core.transforms import Hash, MixedRadixDigit, Murmur, RankInSet, Sharing, Transform
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.fit import fit_tables, importance_of, principal_axes
from recsys_embed.errors import BudgetError, ConfigError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import FusedOptimizer, register_rule, sum_duplicates
from recsys_embed.registry import MethodInfo, register
from recsys_embed.utils.settings import Settings, param

if TYPE_CHECKING:
    from recsys_embed.data.data_source import DataSource
    from recsys_embed.data.rows import RowSource
    from recsys_embed.models.base import CTRModel, ModelSpec
    from recsys_embed.models.base import register as register_model
    from recsys_embed.models.retrieval import RetrievalModel
    from recsys_embed.planning.curves import FrequencyCurve
    from recsys_embed.search.base import Search
    from recsys_embed.search.registry import register_search
    from recsys_embed.testing import check_backend, check_embedding, check_model

# Names that load at first use: their modules, and what these call them.
_LAZY = {
    "CTRModel": ("models.base", "CTRModel"),
    "DataSource": ("data.data_source", "DataSource"),
    "FrequencyCurve": ("planning.curves", "FrequencyCurve"),
    "ModelSpec": ("models.base", "ModelSpec"),
    "RetrievalModel": ("models.retrieval", "RetrievalModel"),
    "RowSource": ("data.rows", "RowSource"),
    "Search": ("search.base", "Search"),
    "check_backend": ("testing", "check_backend"),
    "check_embedding": ("testing", "check_embedding"),
    "check_model": ("testing", "check_model"),
    "register_model": ("models.base", "register"),
    "register_search": ("search.registry", "register_search"),
}

__all__ = [
    "BudgetError",
    "CTRModel",
    "Codes",
    "CompressedEmbedding",
    "ConfigError",
    "Contraction",
    "DataSource",
    "FeatureSpec",
    "Footprint",
    "FrequencyCurve",
    "FusedOptimizer",
    "Hash",
    "Head",
    "IdSet",
    "Index",
    "IndexArray",
    "IndexArrays",
    "Initializer",
    "LookupProgram",
    "MethodConfig",
    "MethodInfo",
    "MixedRadixDigit",
    "ModelSpec",
    "Murmur",
    "PerClassNetwork",
    "PooledCombination",
    "Projection",
    "RankInSet",
    "RetrievalModel",
    "RowLookup",
    "RowSource",
    "Schema",
    "Search",
    "Settings",
    "Sharing",
    "Table",
    "Transform",
    "Weight",
    "check_backend",
    "check_embedding",
    "check_model",
    "fit_tables",
    "hashing",
    "importance_of",
    "param",
    "principal_axes",
    "raise_faults",
    "register",
    "register_model",
    "register_rule",
    "register_search",
    "sum_duplicates",
    "unknown_name",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def __getattr__(name: str) -> _Any:
    """Names that load at first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'recsys_embed.extend' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(_import_module(f"recsys_embed.{module}"), attribute)
