"""Candidates are evaluated as the masked model itself would be, from one reading of the data."""

from __future__ import annotations

import pytest
import torch

from recsys_embed.errors import ConfigError, DataError
from recsys_embed.models import build_model
from recsys_embed.plan import Plan
from recsys_embed.search import CandidateEvaluator, OptembedLayer, Supernet
from recsys_embed.train import evaluate
from tests.train.toy import ToyData

CANDIDATES = [(4, 4, 4, 4), (1, 2, 3, 4), (2, 1, 1, 1), (1, 1, 1, 1)]


class CountingData(ToyData):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.passes: list[str] = []

    def batches(self, split, batch_size, **options):
        self.passes.append(split)
        return super().batches(split, batch_size, **options)


def net_of(data: ToyData, **hparams) -> Supernet:
    schema = data.schema(4).with_init("normal:1")
    torch.manual_seed(0)
    model = build_model("deepfm", schema, Plan.full(schema), num_dense=3, hidden=(8,), **hparams)
    layer = OptembedLayer(4, 4)
    with torch.no_grad():
        layer.thresholds.fill_(2.5)
    return Supernet(model, layer)


def alone(net: Supernet, data: ToyData, candidate) -> float:
    net.layer.widths = torch.tensor(candidate)
    try:
        return evaluate(net, data, "valid").auc
    finally:
        net.layer.widths = None


def test_together_as_alone_in_one_pass() -> None:
    data = CountingData()
    net = net_of(data)
    wanted = [alone(net, data, c) for c in CANDIDATES]
    data.passes.clear()
    got = CandidateEvaluator(net, data, batch_size=300).auc(CANDIDATES)
    assert got == pytest.approx(wanted, abs=1e-6)
    assert len({round(a, 6) for a in got}) > 1
    assert data.passes == ["valid"]
    assert alone(net, data, CANDIDATES[1]) == wanted[1], "the supernet is as it was"


def test_some_rows_only() -> None:
    data = ToyData()
    evaluator = CandidateEvaluator(net_of(data), data, rows=333, batch_size=100)
    assert {m.samples for m in evaluator.metrics(CANDIDATES)} == {333}


def test_statistics_of_batches_are_taken_anew_per_candidate_and_put_back() -> None:
    data = CountingData()
    net = net_of(data, batch_norm=True).train()
    for batch in data.batches("train", 256):
        net(batch.dense, batch.ids)
    net.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    data.passes.clear()
    got = CandidateEvaluator(net, data, recalibrate=3, batch_size=256).auc(CANDIDATES)
    assert data.passes == ["train", "valid"]
    after = net.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    norm = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d))
    for candidate, auc in zip(CANDIDATES, got, strict=True):
        net.layer.widths = torch.tensor(candidate)
        seen = []
        handle = norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        for number, batch in enumerate(data.batches("train", 256, shuffle=True, seed=0)):
            if number < 3:
                net(batch.dense, batch.ids)
        handle.remove()
        with torch.no_grad():
            norm.running_mean = torch.stack([x.mean(0) for x in seen]).mean(0)
            norm.running_var = torch.stack([x.var(0) for x in seen]).mean(0)
        assert auc == pytest.approx(alone(net, data, candidate), abs=1e-5)
        norm.running_mean, norm.running_var = before_of(before, "running_mean"), before_of(before, "running_var")


def before_of(state, name):
    return next(v.clone() for k, v in state.items() if k.endswith(name))


def test_rows_that_cannot_tell_candidates_apart_are_refused() -> None:
    data = ToyData(valid=False)
    with pytest.raises(ConfigError, match="needs a split 'valid'"):
        CandidateEvaluator(net_of(data), data)
    data = ToyData()
    data.parts["valid"] = data.parts["valid"]._replace(label=torch.zeros(1000))
    with pytest.raises(DataError, match="one class"):
        CandidateEvaluator(net_of(data), data).auc(CANDIDATES)
