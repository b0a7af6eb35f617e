"""Searches over retrieval models: compared by NDCG of the catalogue, retrained and served like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed.errors import ConfigError
from recsys_embed.models import RetrievalModel, build_model
from recsys_embed.plan import Plan
from recsys_embed.search import CandidateEvaluator, OptembedLayer, Supernet, get_search, run_search
from recsys_embed.search.layers import table_numbers
from recsys_embed.search.studies.results import best_under, rows_of
from recsys_embed.search.studies.settings import StudySettings
from recsys_embed.search.studies.study import MethodStudy
from recsys_embed.train import TrainConfig, evaluate
from recsys_embed.train.catalogue import learn_items
from tests.tiers import slow_but
from tests.train.events import ARGS, Events

CONFIG = TrainConfig(
    model="twotower", model_args=ARGS, loss="sampled_softmax", loss_args={"negatives": 7}, batch_size=100, epochs=2,
    embedding_dim=4, learning_rate=0.01, top_k=(5,), embedding_weight_decay=1e-3, ratio=1.3, threads=1,
)  # fmt: skip
SASREC = {"model": "sasrec", "model_args": {"item": "item", "history": "history"}, "loss": "bpr", "loss_args": {}}
SETTINGS = {
    "optembed": {"generations": 2, "population": 4, "mutations": 2, "crossovers": 2},
    "dnis": {"blocks": 2},
    "pep": {"check_every": 1, "threshold_lr": 1.0},
}


@pytest.mark.parametrize("model", ["twotower", "sasrec"])
@pytest.mark.parametrize("kind", slow_but(SETTINGS, "dnis"))
@pytest.mark.filterwarnings("ignore:model 'sasrec' reads")
def test_a_search_of_rows_and_widths(kind: str, model: str, tmp_path: Path) -> None:
    cls = get_search(kind)
    config = CONFIG if model == "twotower" else CONFIG.replace(**SASREC)
    settings = cls.settings_cls.from_dict(SETTINGS[kind])
    outcome = run_search(cls, config, Events(), settings, folder=tmp_path / "run", show_progress=False)
    assert kind in {outcome.plan[name].method for name in outcome.plan} | {"pep"}
    assert outcome.plan["item"] == outcome.plan["history"]
    assert outcome.footprint.serve <= outcome.full_bytes / 1.3
    test = outcome.result.test
    assert f"NDCG@5 {test.ndcg[5]:.4f}" in (tmp_path / "run" / "report.md").read_text()
    assert test.ndcg[5] > 0.1
    batch = next(iter(Events().batches("test", 50, shuffle=False)))
    rse.export(outcome.model, tmp_path / "m.safetensors")
    served = rse.load(tmp_path / "m.safetensors")
    ids, scores = served.recommend(batch.dense, batch.inputs, k=3)
    wanted = outcome.model.recommend(batch.dense, batch.inputs, k=3)
    assert torch.equal(ids, wanted[0])
    assert torch.equal(scores, wanted[1])
    again = run_search(cls, config, Events(), settings, folder=tmp_path / "run", show_progress=False)
    assert again.plan == outcome.plan
    assert again.result.test == test


@pytest.mark.filterwarnings("ignore:model 'sasrec' reads")
def test_candidates_are_ranked_by_the_metrics_of_their_masked_tables() -> None:
    """The oracle is a model whose tables are masked by hand, ranked by `evaluate`."""
    data = Events()
    schema = data.schema(4).with_init("normal:0.5")
    fields = table_numbers(schema)
    torch.manual_seed(1)
    built = build_model("sasrec", schema, Plan.full(schema), num_dense=1, **SASREC["model_args"])
    assert isinstance(built, RetrievalModel)
    learn_items(built, data)
    net = Supernet(built, OptembedLayer(max(fields) + 1, 4, field_of=fields)).eval()
    with torch.no_grad():
        net.layer.thresholds.fill_(1.0)
    config = CONFIG.replace(**SASREC)
    candidates = [(4,) * 5, (4, 2, 4, 4, 4), (4, 1, 1, 1, 1)]
    got = CandidateEvaluator(net, data, config).scores(candidates)
    plain = build_model("sasrec", schema, Plan.full(schema), num_dense=1, **SASREC["model_args"])
    plain.load_state_dict({k: v for k, v in built.state_dict().items() if "search_layer" not in k})
    for candidate, score in zip(candidates, got, strict=True):
        with torch.no_grad():
            for number, spec in enumerate(schema.first_readers):
                table, whole = plain.vectors.table(f"{spec.table_name}.weight"), net.table(spec.name)
                kept = (whole.abs().sum(1, keepdim=True) > 1) & (torch.arange(4) < candidate[number])
                table.copy_(whole * kept)
        found = evaluate(plain, data, "valid", loss="bpr", top_k=(5,))
        assert score == pytest.approx(found.ndcg[5], abs=1e-6)
    assert len(set(got)) == 3


def test_the_layer_trains_by_its_own_steps_alone() -> None:
    """A retrieval model holds the layer, whose parameters are not for the model's own optimizer."""
    schema = Events().schema(4)
    fields = table_numbers(schema)
    model = build_model("twotower", schema, Plan.full(schema), num_dense=1, **ARGS)
    before = {id(p) for p in model.trainable()}
    net = Supernet(model, OptembedLayer(max(fields) + 1, 4, field_of=fields, oov=True))
    assert {id(p) for p in model.trainable()} == before
    assert any(k.startswith("search_layer.thresholds") for k in model.state_dict())
    assert net.layer in list(model.modules())


def test_a_study_of_methods_goes_by_ndcg(tmp_path: Path) -> None:
    config = CONFIG.replace(ratio=None, epochs=1)
    settings = StudySettings(trials=3, budgets=("60%",), methods=("hash", "freqcut"), groups=1, sampler="random")
    study = MethodStudy(config, Events(), settings, str(tmp_path / "s.journal"))
    assert study.settings.objectives == ("ndcg", "bytes")
    assert study.work() == 3
    rows = [r for r in rows_of(study) if r["state"] == "complete"]
    assert all(0 < r["ndcg"] < 1 for r in rows)
    assert best_under(rows, 10**9, study.quality)["ndcg"] == max(r["ndcg"] for r in rows)
    with pytest.raises(ConfigError, match=r"compared by ndcg; got objectives auc, bytes: name ndcg first"):
        MethodStudy(config, Events(), StudySettings(objectives=("auc", "bytes")), str(tmp_path / "t.journal"))


def test_recalibration_is_refused_where_it_cannot_be_done(monkeypatch: Any) -> None:
    monkeypatch.setattr("recsys_embed.search.evaluate.batch_norms", lambda net: [torch.nn.BatchNorm1d(3)])
    schema = Events().schema(4)
    fields = table_numbers(schema)
    model = build_model("twotower", schema, Plan.full(schema), num_dense=1, **ARGS)
    net = Supernet(model, OptembedLayer(max(fields) + 1, 4, field_of=fields))
    with pytest.raises(ConfigError, match=r"search.recalibrate=0"):
        CandidateEvaluator(net, Events(), CONFIG, recalibrate=3)
