"""The registry of searches, from which the command line lists them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.search import DnisSearch, DnisSettings, Search, get_search, list_searches, register_search
from recsys_embed.search import registry as searches


def test_searches_are_checked_when_they_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "_SEARCHES", dict(searches._SEARCHES))
    with pytest.raises(ConfigError, match="a search is a subclass of"):
        register_search(DnisSettings)  # type: ignore[type-var]

    @dataclass
    class Bare(Search):
        method = "bare"

    with pytest.raises(ConfigError, match=r"(?s)`summary` must be a str.*`settings_cls`.*`check` must be defined"):
        register_search(Bare)

    class Other(DnisSearch):
        pass

    with pytest.raises(ConfigError, match="search 'dnis' is already registered by DnisSearch"):
        register_search(Other)
    Other.method = "other"
    assert register_search(Other) is get_search("other") is list_searches()[-1]
    with pytest.raises(UnknownNameError, match="unknown search 'dnsi'; did you mean 'dnis'"):
        get_search("dnsi")
