"""Embedding tables of recommender models, made small, fast and deployable.

Importing needs torch and numpy only; everything else loads at first use.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

from recsys_embed import _moved
from recsys_embed import methods as _methods  # noqa: F401  (importing registers them)
from recsys_embed._version import __version__ as __version__
from recsys_embed.collection import EmbeddingCollection
from recsys_embed.core.footprint import Footprint
from recsys_embed.core.hashing import string_ids
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import FTRL, SGD, Adagrad, Adam, RowwiseAdagrad, RowwiseRMSprop
from recsys_embed.plan import Plan
from recsys_embed.registry import MethodInfo, get_method, list_methods, make_embedding, register, registered_methods

if TYPE_CHECKING:
    from recsys_embed.compress import compress_, materialize_
    from recsys_embed.exports import export, load
    from recsys_embed.planning import plan_for_budget
    from recsys_embed.report.memory import memory_report

_moved.install()

# Public names that load at first use, and the modules that hold them.
_LAZY = {
    "compress_": "compress",
    "export": "exports",
    "load": "exports",
    "materialize_": "compress",
    "memory_report": "report.memory",
    "plan_for_budget": "planning",
}

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "Adam",
    "EmbeddingCollection",
    "FeatureSpec",
    "Footprint",
    "MethodInfo",
    "Plan",
    "RecsysEmbedError",
    "RowwiseAdagrad",
    "RowwiseRMSprop",
    "Schema",
    "compress_",
    "export",
    "get_method",
    "list_methods",
    "load",
    "make_embedding",
    "materialize_",
    "memory_report",
    "plan_for_budget",
    "register",
    "string_ids",
]


def __dir__() -> list[str]:
    classes = [cls.__name__ for m in list_methods() for cls in (m.embedding_cls, m.config_cls)]
    return sorted({*globals(), *_LAZY, *classes})


def __getattr__(name: str) -> _Any:
    """Names that load at first use, and the classes of registered methods: registering one is all it takes."""
    if name in _LAZY:
        return getattr(_import_module(f"{__name__}.{_LAZY[name]}"), name)
    for methods in (registered_methods, list_methods):  # plugins are imported where nothing else has the name
        for method in () if name.startswith("_") else methods():
            for cls in (method.embedding_cls, method.config_cls):
                if cls.__name__ == name:
                    return cls
    raise AttributeError(f"module 'recsys_embed' has no attribute {name!r}")
