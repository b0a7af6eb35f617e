"""PEP meets its budget with something left, or says why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.search import PepSettings, run_search
from recsys_embed.search.pep import PepSearch
from tests.train.toy import ToyData, toy_config

CONFIG = toy_config(embedding_weight_decay=1e-3, epochs=2, batch_size=256)


def search(folder: Path, *, budget: int | None = None, **settings):
    config = CONFIG.replace(budget=budget, model="dnn") if budget else CONFIG.replace(ratio=2.0)
    return run_search(PepSearch, config, ToyData(), PepSettings(**settings), folder=folder)


def test_thresholds_that_rise_fast_are_counted_often_enough_to_leave_something(tmp_path):
    found = search(tmp_path, threshold_init=-6.0, check_every=20)
    assert 2 <= found.full_bytes / found.footprint.serve < 3


def test_thresholds_that_jump_over_every_weight_are_refused(tmp_path):
    with pytest.raises(BudgetError, match=r"pruned everything at once: .* were left .* a `threshold_lr` below 9"):
        search(tmp_path, threshold_lr=9.0, check_every=20)
    assert not (tmp_path / "snapshot.json").exists()


def test_a_budget_that_nothing_meets_is_refused_before_training(tmp_path):
    with pytest.raises(BudgetError, match=r"even with nothing kept, the features take \d+ B; \d+ B are available"):
        search(tmp_path, budget=8)
    assert not (tmp_path / "thresholds").exists()


@pytest.mark.parametrize("value", [3, "23", [0.5], [True]])
def test_snapshots_are_numbers(value):
    with pytest.raises(ConfigError, match="`snapshots` must be a list of finite numbers >= 1"):
        PepSettings.from_dict({"snapshots": value})
