"""From the arguments of a drop-in module to its configuration: given, sized by a budget, or made from options."""

from __future__ import annotations

import inspect
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.errors import ConfigError, unknown_name
from recsys_embed.features import FeatureSpec
from recsys_embed.utils.types import Budget


def choose_config(
    constructor: type,
    name: str,
    config_cls: type[MethodConfig],
    spec: FeatureSpec,
    config: MethodConfig | None,
    budget: Budget | None,
    options: dict[str, Any],
    itemsize: int,
) -> MethodConfig:
    """The configuration of a drop-in module.

    Args:
        constructor: the class that takes the arguments; an option that is nearly one of these is told so.
        name: of the module's class, for messages.
        options: of the method.
        itemsize: bytes of an element, which a budget counts by.

    Raises:
        ConfigError: a configuration and a budget or options are given, or the configuration is of another method.
        UnknownNameError: an option that neither the method nor the constructor has.
    """
    if config is not None and (budget is not None or options):
        raise ConfigError(f"{name} takes either `config`, or `budget` and options; got both")
    if config is not None:
        if not isinstance(config, config_cls):
            raise ConfigError(f"{name} takes a {config_cls.__name__}; got {type(config).__name__}")
        return config
    arguments = [*inspect.signature(constructor).parameters][2:-1] if options else []
    known = [f.name for f in fields(config_cls)]
    for key in options:
        if key not in known and get_close_matches(key, arguments, cutoff=0.8):
            raise unknown_name(f"option of {name}", key, arguments + known)
    if budget is None:
        return config_cls.from_params(options)
    return config_cls.for_budget(spec, budget, itemsize=itemsize, **options)
