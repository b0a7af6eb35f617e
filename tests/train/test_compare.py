"""Comparisons: what is equal between rows, what is kept, and what the table says."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.optim import unfused_parameters
from recsys_embed.report.comparison import cells, markdown_table, reasons
from recsys_embed.report.pareto import plot_pareto
from recsys_embed.train import Interrupted
from recsys_embed.train import compare as compare_module
from recsys_embed.train.build import model_from_config, trained_footprint
from recsys_embed.train.compare import Comparison, run_comparison, summarise
from recsys_embed.train.loop import Trainer
from recsys_embed.train.plans import plans_for
from tests.train.test_loop import SignallingData
from tests.train.toy import ToyData, toy_config


def small(**changes) -> Comparison:
    options = {"models": ("deepfm",), "methods": ("hash",), "ratios": (3.0,), "seeds": 2, "train": toy_config(epochs=1)}
    return Comparison(**{**options, **changes})


def test_rows_are_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_comparison(small(), ToyData(), tmp_path)
    assert [(r["method"], r["seed"]) for r in first] == [("full", 0), ("hash", 0), ("full", 1), ("hash", 1)]

    def forbidden(*args, **kwargs):
        raise RuntimeError("trained again")

    monkeypatch.setattr(compare_module, "run_training", forbidden)
    again = run_comparison(small(), ToyData(), tmp_path)
    assert json.loads(json.dumps(first)) == again


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    comparison = small()
    whole = run_comparison(comparison, ToyData(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_comparison(comparison, SignallingData(16 + 10), tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "rows").glob("*.json"))) == 1
    with pytest.raises(Interrupted):
        run_comparison(comparison, SignallingData(5), tmp_path / "parts")
    log = next((tmp_path / "parts" / "rows").glob("*/log.jsonl")).read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [5, 10, 15], "a single pass goes on too"
    resumed = run_comparison(comparison, ToyData(), tmp_path / "parts")
    assert [r["test"] for r in resumed] == [r["test"] for r in whole]
    assert not [p for p in (tmp_path / "parts" / "rows").iterdir() if p.is_dir()]


def test_other_settings_in_the_same_folder_are_refused_but_more_rows_are_welcome(tmp_path: Path) -> None:
    run_comparison(small(), ToyData(), tmp_path)
    with pytest.raises(ConfigError, match=r"made with other settings .*batch_size"):
        run_comparison(small(train=toy_config(epochs=1, batch_size=64)), ToyData(), tmp_path)
    other = ToyData()
    other.cards = (50, 20, 301, 7)
    with pytest.raises(ConfigError, match=r"made with other settings \(data\)"):
        run_comparison(small(), other, tmp_path)
    more = run_comparison(small(ratios=(3.0, 5.0)), ToyData(), tmp_path)
    assert len(more) == 6


@pytest.mark.parametrize("text", ['{"model": "fm', "[]", "{}"])
def test_a_damaged_row_is_named(text: str, tmp_path: Path) -> None:
    comparison = small()
    path = tmp_path / "rows" / f"{next(iter(comparison.cases())).key}.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not a row of a comparison; remove it"):
        run_comparison(comparison, ToyData(), tmp_path)


@pytest.mark.parametrize("wrong", [{"models": 3}, {"methods": "hash"}, {"ratios": ("x",)}, {"seeds": "x"}])
def test_settings_of_another_type_are_named(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(wrong))}` must be"):
        small(**wrong)


def test_impossible_rows_say_why(tmp_path: Path) -> None:
    train = toy_config(epochs=1, model_args={})
    comparison = small(models=("fm",), methods=("lowdim", "hash"), ratios=(100.0,), seeds=1, train=train)
    rows = run_comparison(comparison, ToyData(), tmp_path)
    by = {r["method"]: r for r in rows}
    assert by["full"]["status"] == "ok"
    assert by["lowdim"]["status"] == "infeasible"
    assert "needs at least" in by["lowdim"]["reason"]
    lines = summarise(rows)
    assert "infeasible" in markdown_table(lines)
    assert any("needs at least" in r for r in reasons(lines))


def test_order_and_dense_start_are_the_same_for_all_methods() -> None:
    data = ToyData()
    full, hashed = (
        model_from_config(toy_config(**c, seed=4), data.schema(4), data.num_dense)
        for c in ({}, {"method": "hash", "ratio": 3.0})
    )
    a, b = full.state_dict(), hashed.state_dict()
    dense = [k for k in a if not k.startswith(("embedding.", "linear."))]
    assert len(dense) > 5
    assert all(torch.equal(a[k], b[k]) for k in dense)


@pytest.mark.parametrize("model", ["lr", "fm", "dnn", "deepfm"])
@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_budgets_cover_both_collections(model: str, ratio: float) -> None:
    data = ToyData()
    config = toy_config(model=model, model_args={}, method="hash", ratio=ratio)
    schema = data.schema(4)
    built = model_from_config(config, schema, data.num_dense)
    width = {"lr": 1, "fm": 5, "dnn": 4, "deepfm": 5}[model]
    full_bytes = 4 * width * sum(f.num_embeddings for f in schema)
    assert plans_for(schema, config).full_bytes == full_bytes
    assert built.footprint().serve <= full_bytes / ratio
    assert built.footprint().serve >= 0.9 * full_bytes / ratio
    if model in ("fm", "deepfm"):
        assert built.linear.footprint().serve <= full_bytes / ratio / 5


@pytest.mark.parametrize("method", ["full", "lowdim"])
@pytest.mark.parametrize("optimizer", ["dense_adam", "adam", "rowwise_adagrad"])
def test_training_bytes_are_those_held_after_a_step(method: str, optimizer: str) -> None:
    data = ToyData(rows=256)
    config = toy_config(method=method, embedding_optimizer=optimizer, steps=1, ratio=None if method == "full" else 2.0)
    model = model_from_config(config, data.schema(4), data.num_dense)
    stated = trained_footprint(model)
    trainer = Trainer(model, data, config)
    trainer.run()
    held = 0
    for coll in model.collections().values():
        held += sum(t.nbytes for t in coll.optimizer_state_dict()["state"].values())
        moments = [trainer.optimizer.state[p] for p in unfused_parameters(coll)]
        held += sum(m[key].nbytes for m in moments for key in ("exp_avg", "exp_avg_sq"))
    assert stated.optimizer == held > 0


def test_summary_is_the_plain_mean_and_pairs_seeds() -> None:
    def row(method: str, seed: int, auc: float) -> dict:
        return {
            "model": "fm",
            "method": method,
            "size": "" if method == "full" else "4x",
            "seed": seed,
            "status": "ok",
            "reason": "",
            "test": {"auc": auc, "logloss": 1 - auc},
            "footprint": {"weights": 2**20, "index": 0, "optimizer": 2**20, "gradient": 0},
            "compression": 4.0,
            "samples_per_s": 1000.0 + seed,
        }

    aucs = {"full": [0.80, 0.70, 0.75], "hash": [0.79, 0.68, 0.74]}
    rows = [row(m, s, a) for m, values in aucs.items() for s, a in enumerate(values)]
    full, hashed = summarise(rows)
    assert full.auc == pytest.approx(0.75)
    assert full.auc_sd == pytest.approx(statistics.stdev(aucs["full"]))
    gains = [h - f for f, h in zip(aucs["full"], aucs["hash"], strict=True)]
    assert hashed.auc_gain == pytest.approx(statistics.fmean(gains))
    assert hashed.auc_gain_sd == pytest.approx(statistics.stdev(gains))
    assert cells(hashed) == (
        *("fm", "hash", "4x", "0.7367 ± 0.0551", "0.2633 ± 0.0551", "-0.0133 ± 0.0058"),
        *("1.000", "2.000", "4.0x", "1,001"),
    )


def test_a_diverged_row_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    comparison = small(seeds=1, train=toy_config(epochs=1, learning_rate=1e38))
    rows = run_comparison(comparison, ToyData(), tmp_path)
    assert {r["status"] for r in rows} == {"diverged"}
    assert all("learning_rate" in r["reason"] for r in rows)


def test_faults_of_a_comparison_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)models.*ratios.*seeds.*`seed` varies"):
        Comparison(models=(), seeds=0, ratios=(0.5,), train=toy_config(seed=3))
    with pytest.raises(UnknownNameError, match="did you mean 'hash'"):
        Comparison(methods=("hsah",))
    with pytest.raises(UnknownNameError, match="method in `method_args` 'hsh'; did you mean 'hash'"):
        Comparison(method_args={"hsh": {"sign": True}})
    with pytest.raises(ConfigError, match="of 'full' would change"):
        Comparison(methods=("full", "hash"), method_args={"full": {"precision": "int8"}})


def test_a_misspelt_option_of_a_method_stops_the_comparison_and_leaves_no_row(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="'sing'; did you mean 'sign'"):
        run_comparison(small(seeds=1, method_args={"hash": {"sing": True}}), ToyData(), tmp_path)
    assert [p.name for p in (tmp_path / "rows").glob("*.json")] == ["deepfm-full-seed-0.json"]


def test_each_model_takes_the_shared_settings_it_knows() -> None:
    comparison = small(models=("fm", "dcn", "dnn"), model_args={"dcn": {"cross_layers": 2}}, methods=(), seeds=1)
    args = {c.config.model: c.config.model_args for c in comparison.cases()}
    assert args["fm"] == {}
    assert args["dnn"] == {"hidden": [16, 8], "dropout": 0.1}
    assert args["dcn"] == {"hidden": [16, 8], "dropout": 0.1, "cross_layers": 2}
    with pytest.raises(UnknownNameError, match="hyperparameter of the models 'hidden'"):
        small(models=("fm",))
    with pytest.raises(UnknownNameError, match="hyperparameter of model 'dnn' 'cross_layers'"):
        small(models=("dnn",), model_args={"dnn": {"cross_layers": 2}})


def test_plot(tmp_path: Path) -> None:
    rows = run_comparison(small(), ToyData(), tmp_path)
    path = plot_pareto(summarise(rows), tmp_path / "p.png")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plot_pareto([], tmp_path / "none.png") is None


def test_rows_of_other_data_are_not_reused(tmp_path: Path) -> None:
    comparison = Comparison(methods=(), train=toy_config(epochs=1))
    run_comparison(comparison, ToyData(seed=0), tmp_path)
    with pytest.raises(ConfigError, match=r"other settings \(data\)"):
        run_comparison(comparison, ToyData(seed=1), tmp_path)
