"""Searches read rows that missed steps without a sweep over whole tables at every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from recsys_embed.collection.fused_tables import FusedTables
from recsys_embed.search import CandidateEvaluator, DnisSettings, OptembedSearch, OptembedSettings
from recsys_embed.search.bilevel import BilevelTrainer
from recsys_embed.search.dnis import DnisSearch
from recsys_embed.search.folder import SearchFolder
from recsys_embed.search.supernet import OptembedTrainer, Supernet
from tests.train.toy import ToyData, toy_config

CONFIG = toy_config(embedding_weight_decay=1e-2, embedding_init="normal:0.1")


@contextmanager
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Tables of which all rows catch up."""
    found: list[str] = []
    catch_up = FusedTables.catch_up_

    def counted(self: FusedTables) -> FusedTables:
        if self._has_missed_steps:
            found.extend(self.storages)
        return catch_up(self)

    with monkeypatch.context() as patch:
        patch.setattr(FusedTables, "catch_up_", counted)
        yield found


def dnis_trainer(backend: str) -> BilevelTrainer:
    config = CONFIG.replace(backend=backend)
    search = DnisSearch(config, ToyData(), DnisSettings(blocks=2), SearchFolder(None, {}))
    options = {"upper": "valid", "alpha_lr": 0.05, "l1": 1e-3, "second_order": False, "show_progress": False}
    return BilevelTrainer(search.build(), search.data, config, **options)


def step_through_an_epoch(trainer: BilevelTrainer | OptembedTrainer) -> None:
    torch.manual_seed(0)
    trainer.net.train()
    for batch in trainer._epoch(0, 0):
        trainer._clock = 0.0
        trainer._step(batch)
    assert trainer.state.step == 16


@contextmanager
def evaluated(net: Supernet) -> Iterator[None]:
    net.eval()
    try:
        yield
    finally:
        net.train()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_selection_moves_without_sweeps_and_as_with_them(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swept, lazy = dnis_trainer(backend), dnis_trainer(backend)
    monkeypatch.setattr(swept.net, "network_evaluated", lambda: evaluated(swept.net))
    with sweeps(monkeypatch) as found:
        step_through_an_epoch(swept)
        assert len(found) >= 2 * 16, "whoever evaluates collections sweeps them"
    with sweeps(monkeypatch) as found:
        step_through_an_epoch(lazy)
        assert found == []
    assert all(m.training for m in lazy.net.modules())
    wanted, got = swept.net.state_dict(), lazy.net.state_dict()
    assert got["layer.alpha"].unique().numel() > 4
    for name, values in wanted.items():
        assert torch.equal(got[name], values), name


def test_a_supernet_trains_and_is_evaluated_without_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ToyData()
    search = OptembedSearch(CONFIG, data, OptembedSettings(), SearchFolder(None, {}))
    net = search.build()
    trainer = OptembedTrainer(net, data, CONFIG, threshold_lr=0.1, pull=1e-3, show_progress=False)
    with sweeps(monkeypatch) as found:
        step_through_an_epoch(trainer)
        assert found == []
        evaluator = CandidateEvaluator(net, data, recalibrate=2, batch_size=128)
        assert len(found) == 2, "vectors and first-order weights, once"
        evaluator.auc([(4, 4, 4, 4), (1, 2, 3, 4)])
        evaluator.auc([(1, 1, 1, 1)])
        assert len(found) == 2
