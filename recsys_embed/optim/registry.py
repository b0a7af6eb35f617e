"""The update rules the library knows: one name stands for a rule in settings, plans, reports and the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from recsys_embed.errors import ConfigError
from recsys_embed.optim.base import FusedOptimizer
from recsys_embed.utils.plugins import RULES, load_plugins, unknown_plugin_name
from recsys_embed.utils.types import Option

_RULES: dict[str, type[FusedOptimizer]] = {}
Rule = TypeVar("Rule", bound=type[FusedOptimizer])


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Class decorator that makes a rule known as ``name`` wherever one is named.

    Args:
        name: e.g. ``"adam"``; ``"none"`` and ``"dense_adam"`` mean no rule.

    Raises:
        ConfigError: the name is taken by another class, or the class is no :class:`FusedOptimizer`.

    >>> from dataclasses import dataclass
    >>> from recsys_embed.optim import make_rule, register_rule, SGD
    >>> @register_rule("signsgd")
    ... @dataclass(frozen=True)
    ... class SignSGD(SGD):
    ...     def update(self, weight, grad, state, lr, step):
    ...         return weight.sub(grad.sign(), alpha=lr)
    >>> make_rule("signsgd", lr=0.1)
    SignSGD(lr=0.1, weight_decay=0.0, rows='touched')
    """

    def add(cls: Rule) -> Rule:
        if not (isinstance(cls, type) and issubclass(cls, FusedOptimizer)):
            raise ConfigError(f"a rule is a subclass of recsys_embed.optim.FusedOptimizer; got {cls!r:.80}")
        if not (isinstance(name, str) and name.isidentifier()):
            raise ConfigError(f"a rule is named by a word such as 'adam'; got {name!r:.80} for {cls.__name__}")
        if name in ("none", "dense_adam"):
            raise ConfigError(f"{name!r} means that no rule steps the tables; choose another name for {cls.__name__}")
        odd = {k: v for k, v in cls.state.items() if v not in ("row", "element", "step")}
        if odd:
            raise ConfigError(f"state of {cls.__name__} is kept per 'row', 'element' or 'step'; got {odd}")
        known = _RULES.get(name)
        # A module that is loaded anew brings its own class again.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"rule {name!r} is already registered by {known.__name__}")
        _RULES[name] = cls
        return cls

    return add


def list_rules() -> list[str]:
    """Names of all rules, sorted.

    >>> list_rules()[:2]
    ['adagrad', 'adam']
    """
    load_plugins(RULES)
    return sorted(_RULES)


def make_rule(name: str, /, **options: Option) -> FusedOptimizer:
    """The rule of that name.

    Args:
        options: its arguments.

    Raises:
        UnknownNameError: no such rule; names the nearest.
        ConfigError: an option that the rule lacks, or out of range.

    >>> make_rule("adagrad", lr=0.1).eps
    1e-10
    """
    if name not in _RULES:
        load_plugins(RULES)
    if name not in _RULES:
        raise unknown_plugin_name("optimizer", name, _RULES, RULES)
    try:
        return _RULES[name](**options)
    except TypeError as e:
        raise ConfigError(f"options of optimizer {name!r}: {e}") from e


def rule_name(optimizer: FusedOptimizer) -> str | None:
    """Name of the optimizer's own class; None if it is not registered, whatever it derives from.

    >>> from recsys_embed.optim import Adam
    >>> rule_name(Adam())
    'adam'
    """
    return next((name for name, cls in _RULES.items() if cls is type(optimizer)), None)
