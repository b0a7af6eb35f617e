"""Embedding tables of recommender models, made small, fast and deployable.

Importing needs torch and numpy only; everything else loads at first use.
"""

from typing import Any as _Any

from recsys_embed import methods as _methods  # noqa: F401  (importing registers them)
from recsys_embed.collection import EmbeddingCollection
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.hashing import string_ids
from recsys_embed.memory import Footprint
from recsys_embed.optim import SGD, Adagrad, Adam, RowwiseAdagrad
from recsys_embed.plan import Plan
from recsys_embed.registry import MethodInfo, get_method, list_methods, make_embedding, register

__version__ = "0.1.0"

__all__ = [
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
    "Schema",
    "get_method",
    "list_methods",
    "make_embedding",
    "register",
    "string_ids",
]


def __dir__() -> list[str]:
    classes = [cls.__name__ for m in list_methods() for cls in (m.embedding_cls, m.config_cls)]
    return sorted({*globals(), *classes})


def __getattr__(name: str) -> _Any:
    """Classes of registered methods by name, so that registering a method is all it takes to export it."""
    for method in list_methods():
        for cls in (method.embedding_cls, method.config_cls):
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'recsys_embed' has no attribute {name!r}")
