"""Method configurations as data: checked, hashable, JSON and back."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from recsys_embed import FeatureSpec
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.errors import BudgetError, ConfigError, UnknownNameError
from recsys_embed.registry import config_from_dict, get_method, list_methods, register

METHODS = [m.name for m in list_methods()]
SPEC = FeatureSpec("C1", 1000, 8)


def config(method: str, **params: Any) -> MethodConfig:
    return get_method(method).config_cls.sized(SPEC, 1, **params)


@pytest.mark.parametrize("method", METHODS)
def test_configurations_are_frozen_json_values(method: str) -> None:
    one = config(method)
    assert config_from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert len({one, config(method), config(method, seed=1)}) == 2
    with pytest.raises(FrozenInstanceError):
        one.seed = 3  # type: ignore[misc]
    for f in fields(one):
        assert f.metadata["doc"], f"option {f.name} says what it is"


@pytest.mark.parametrize("method", METHODS)
def test_every_option_refuses_what_it_is_not(method: str) -> None:
    one = config(method).to_dict()
    wrongs: tuple[Any, ...] = (float("nan"), {}, object(), b"x", [None], ["x"])
    for f in fields(config(method)):
        for wrong in wrongs:
            with pytest.raises(ConfigError, match=rf"`{f.name}`"):
                config_from_dict({**one, f.name: wrong}).program(SPEC)


@pytest.mark.crossed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", ["0", 1.0, True, None, [0]])
def test_seeds_are_integers(method: str, seed: Any) -> None:
    with pytest.raises(ConfigError, match="`seed` must be an integer"):
        config_from_dict({**config(method).to_dict(), "seed": seed})


@pytest.mark.parametrize("method", METHODS)
def test_unknown_options_name_the_nearest(method: str) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'seed'"):
        config_from_dict({**config(method).to_dict(), "sed": 1})
    with pytest.raises(ConfigError, match=r"[234] faults"):
        config_from_dict({"method": method, "sed": 1, "tabel": 2})


def test_sizes_must_lie_within_the_feature() -> None:
    for wrong in (0, -5, 2**31, 1.5, "3", None, True):
        with pytest.raises(ConfigError, match="`num_buckets` must be an integer"):
            config_from_dict({"method": "hash", "num_buckets": wrong})
    with pytest.raises(ConfigError, match=r"\[1, 1000\]; got 1001.*'C1'"):
        config_from_dict({"method": "hash", "num_buckets": 1001}).program(SPEC)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_gives_the_largest_that_fits(method: str) -> None:
    cls = get_method(method).config_cls
    top = cls.max_size(SPEC)
    sizes = [cls.sized(SPEC, s).footprint(SPEC).serve for s in range(1, min(top, 60) + 1)]
    assert sizes == sorted(sizes), "bytes do not shrink as the size grows"
    for budget in {sizes[0], sizes[len(sizes) // 2], sizes[-1], sizes[-1] + 3}:
        got = cls.for_budget(SPEC, budget).footprint(SPEC).serve
        assert got <= budget
        assert got == max(s for s in sizes if s <= budget) or got > sizes[-1]
    with pytest.raises(BudgetError, match=r"needs at least .*available.*'C1'.*Ways out: 1\. a larger budget; 2\."):
        cls.for_budget(SPEC, sizes[0] - 1)


def test_a_key_names_one_method() -> None:
    hashed = get_method("hash").embedding_cls
    register(hashed, paper="again")
    with pytest.raises(ConfigError, match="already registered by HashEmbedding"):
        register(type("Other", (hashed,), {}), paper="other")
    assert [m.name for m in list_methods()] == METHODS
    with pytest.raises(UnknownNameError, match="did you mean 'full'"):
        get_method("ful")
