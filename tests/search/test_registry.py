"""The registry of searches, from which the command line lists them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.search import DnisSearch, DnisSettings, Search, extract, get_search, list_searches, register_search
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


def test_earlier_names_of_a_searchs_parts_warn() -> None:
    search = SimpleNamespace(full_model=lambda: "model", full_training_seconds=lambda: 2.0)
    for earlier, found in (("plain_model", "model"), ("plain_seconds", 2.0)):
        with pytest.warns(DeprecationWarning, match=f"'{earlier}' is now called 'full_"):
            assert getattr(Search, earlier)(search) == found
    with pytest.warns(DeprecationWarning, match="import it from recsys_embed.search.extract as full_bytes"):
        assert extract.plain_bytes is extract.full_bytes
