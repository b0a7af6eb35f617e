"""Registry of searches: one key names a search in run folders, plans and the command line."""

from __future__ import annotations

from typing import TypeVar

from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.search.base import Search
from recsys_embed.utils.plugins import SEARCHES, load_plugins, unknown_plugin_name

_SEARCHES: dict[str, type[Search]] = {}
S = TypeVar("S", bound=type[Search])


def register_search(cls: S) -> S:
    """Class decorator: make a search known by its ``method``, also as ``recsys-embed search METHOD``.

    Raises:
        ConfigError: the key is taken by another class, or the class lacks what :class:`Search` asks for.
    """
    if not (isinstance(cls, type) and issubclass(cls, Search)):
        raise ConfigError(f"a search is a subclass of recsys_embed.search.Search; got {cls!r:.80}")
    wanted = {"method": str, "summary": str, "settings_cls": type}
    faults = [f"`{k}` must be a {t.__name__}; got {getattr(cls, k, None)!r:.80}" for k, t in wanted.items()
              if not isinstance(getattr(cls, k, None), t)]  # fmt: skip
    faults += [f"`{name}` must be defined" for name in sorted(cls.__abstractmethods__)]
    raise_faults(faults, f"registering {cls.__name__}")
    known = _SEARCHES.setdefault(cls.method, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"search {cls.method!r} is already registered by {known.__name__}")
    _SEARCHES[cls.method] = cls
    return cls


def list_searches() -> list[type[Search]]:
    """All searches in order of registration.

    >>> import recsys_embed.search
    >>> sorted(search.method for search in list_searches())
    ['dnis', 'optembed', 'pep']
    """
    load_plugins(SEARCHES)
    return list(_SEARCHES.values())


def get_search(name: str) -> type[Search]:
    """The search of that key; an unknown key names the nearest one."""
    if name not in _SEARCHES:
        load_plugins(SEARCHES)
    if name not in _SEARCHES:
        raise unknown_plugin_name("search", name, _SEARCHES, SEARCHES)
    return _SEARCHES[name]
