"""Searches as wholes: OptEmbed's variants, and budgets that turn out too small once the supernet is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys_embed.errors import BudgetError, CheckpointError
from recsys_embed.search import DnisSettings, OptembedSettings, run_search
from recsys_embed.search.dnis import DnisSearch
from recsys_embed.search.optembed import OptembedSearch
from recsys_embed.train.loop import Trainer
from tests.train.toy import ToyData, toy_config

CONFIG = toy_config(embedding_weight_decay=1e-3, epochs=2, batch_size=256)
QUICK = {"generations": 3, "population": 4, "mutations": 2, "crossovers": 2}
WIDTH = CONFIG.embedding_dim


def optembed(folder: Path, config=CONFIG, **settings):
    return run_search(OptembedSearch, config, ToyData(), OptembedSettings(**QUICK, **settings), folder=folder)


def widths_and_rows(outcome) -> dict[str, tuple[int, int]]:
    plan, schema = outcome.plan, ToyData().schema(WIDTH)
    whole = {s.name: (WIDTH, s.num_ids) for s in schema}
    return {n: whole[n] if plan[n].method == "full" else (plan[n].dim, plan[n].num_kept) for n in plan}


@pytest.mark.parametrize("rows", ["field", "row"])
def test_rows_only_keeps_all_columns_and_evolves_nothing(rows, tmp_path):
    found = widths_and_rows(optembed(tmp_path, dims=False, rows=rows, pull=1.0))
    assert {width for width, _ in found.values()} == {WIDTH}
    assert found["C2"][1] < 300, "rare rows die"
    assert not (tmp_path / "evolution.json").exists()


def test_dims_only_keeps_all_rows_and_needs_no_decay(tmp_path):
    config = CONFIG.replace(embedding_weight_decay=0.0, ratio=2.0)
    outcome = optembed(tmp_path, config, rows="none")
    found = widths_and_rows(outcome)
    assert [rows for _, rows in found.values()] == list(ToyData.cards)
    assert min(width for width, _ in found.values()) < WIDTH
    assert outcome.footprint.serve <= outcome.full_bytes / 2


@pytest.mark.parametrize(("kind", "settings", "budget"), [
    (OptembedSearch, OptembedSettings(**QUICK), 700), (DnisSearch, DnisSettings(blocks=2), 8)
])  # fmt: skip
def test_a_larger_budget_goes_on_from_what_was_trained(kind, settings, budget, tmp_path, monkeypatch):
    config = CONFIG.replace(model="dnn")

    def search(folder: str, **limit):
        return run_search(kind, config.replace(**limit), ToyData(), settings, folder=tmp_path / folder)

    with pytest.raises(BudgetError, match="larger budget"):
        search("a", budget=budget)
    # As of an evolution that was stopped: what fitted the old budget.
    (tmp_path / "a" / "evolution.json").write_text('{"generation": 3, "ends": [1], "scores": [[[1, 1, 1, 1], 9.0]]}')
    step = Trainer._step

    def only_retrain(self, batch):
        assert not any(stage in self.label for stage in kind.stages[:-1]), "trained again"
        return step(self, batch)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "_step", only_retrain)
        found = search("a", ratio=2.0)
    assert found.plan == search("b", ratio=2.0).plan
    with pytest.raises(CheckpointError, match=r"- budget: \d+ there, \d+ now"):
        search("a", ratio=3.0)
