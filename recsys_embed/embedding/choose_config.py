"""From the arguments of a drop-in module to its configuration: given, sized by a budget, or made from options."""

from __future__ import annotations

import inspect
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.errors import ConfigError, unknown_name
from recsys_embed.features import FeatureSpec
from recsys_embed.typing import Budget

if TYPE_CHECKING:
    from recsys_embed.embedding.compressed_embedding import CompressedEmbedding


def choose_config(
    base: type[CompressedEmbedding],
    cls: type[CompressedEmbedding],
    spec: FeatureSpec,
    config: MethodConfig | None,
    budget: Budget | None,
    options: dict[str, Any],
    itemsize: int,
) -> MethodConfig:
    """The configuration of a module of class ``cls``.

    Args:
        base: the class whose constructor takes the arguments; an option that is nearly one of these is told so.
        options: of the method.
        itemsize: bytes of an element, which a budget counts by.

    Raises:
        ConfigError: a configuration and a budget or options are given, or the configuration is of another method.
        UnknownNameError: an option that neither the method nor the constructor has.
    """
    if config is not None and (budget is not None or options):
        raise ConfigError(f"{cls.__name__} takes either `config`, or `budget` and options; got both")
    if config is not None:
        if not isinstance(config, cls.config_cls):
            raise ConfigError(f"{cls.__name__} takes a {cls.config_cls.__name__}; got {type(config).__name__}")
        return config
    arguments = [*inspect.signature(base).parameters][2:-1] if options else []
    known = [f.name for f in fields(cls.config_cls)]
    for key in options:
        if key not in known and get_close_matches(key, arguments, cutoff=0.8):
            raise unknown_name(f"option of {cls.__name__}", key, arguments + known)
    if budget is None:
        return cls.config_cls.from_params(options)
    return cls.config_cls.for_budget(spec, budget, itemsize=itemsize, **options)
