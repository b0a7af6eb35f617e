"""Searches from the command line on a table of one's own: a list, a sequence, a shared vocabulary, real labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import recsys_embed as rse
from recsys_embed.cli import main
from recsys_embed.data import open_dataset
from recsys_embed.exports import verify
from recsys_embed.plan import Plan
from tests.tiers import slow_but

ROWS = 4000
SCHEMA = """
[columns.rating]
kind = "label"
task = "real"

[columns.user]
kind = "categorical"

[columns.item]
kind = "categorical"
vocab = "item"

[columns.tags]
kind = "list"

[columns.last_items]
kind = "sequence"
vocab = "item"
max_length = 5

[columns.price]
kind = "numeric"

[split]
kind = "random"
valid = 0.2
test = 0.2
"""
FAST = ["--batch-size", "128", "--learning-rate", "0.02", "--embedding-dim", "4", "--set", "model_args.hidden=[8]"]
CASES = {
    "optembed": ["--set", "search.generations=2", "--set", "search.population=4", "--set", "search.pull=0.1"],
    "dnis": ["--set", "search.blocks=3"],
    "pep": ["--set", "batch_size=32", "--set", "search.threshold_lr=0.3"],
}


def rows() -> pl.DataFrame:
    """Ratings follow the user, the item, and whether the last items hold its neighbour."""
    g = np.random.default_rng(0)
    user, item = g.integers(0, 60, ROWS), g.integers(0, 80, ROWS)
    lengths = g.integers(0, 7, ROWS)
    past = [[f"i{n}" for n in g.integers(0, 80, k)] for k in lengths]
    tags = [[f"t{n}" for n in g.integers(0, 9, k % 3)] for k in lengths]
    near = np.array([f"i{(i + 1) % 80}" in p for i, p in zip(item, past, strict=True)])
    rating = 3 + np.sin(user) + np.cos(item) + near + g.normal(0, 0.3, ROWS)
    return pl.DataFrame(
        {
            "rating": rating,
            "user": [f"u{n}" for n in user],
            "item": [f"i{n}" for n in item],
            "tags": tags,
            "last_items": past,
            "price": [None if n % 17 == 0 else float(n) for n in item],
        }
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ratings")
    rows().write_parquet(folder / "rows.parquet")
    (folder / "ratings.toml").write_text(SCHEMA)
    made = [
        "data",
        "table",
        str(folder / "rows.parquet"),
        str(folder / "data"),
        "--schema",
        str(folder / "ratings.toml"),
    ]
    assert main(made) == 0
    # The same with labels of 0 and 1.
    rows().with_columns(rating=(pl.col("rating") > 3).cast(pl.Int8)).write_parquet(folder / "clicks.parquet")
    (folder / "clicks.toml").write_text(SCHEMA.replace('task = "real"\n', ""))
    clicks = ["data", "table", str(folder / "clicks.parquet"), str(folder / "clicks")]
    assert main([*clicks, "--schema", str(folder / "clicks.toml")]) == 0
    return folder


@pytest.mark.parametrize("model", slow_but(["dnn", "din"], "din"))
@pytest.mark.parametrize("method", slow_but(CASES, "dnis"))
def test_a_search_on_ratings(method: str, model: str, table: Path, tmp_path: Path, capsys: Any) -> None:
    out, data = tmp_path / "run", str(table / "data")
    epochs = "6" if method == "pep" else "2"
    args = ["search", method, "--data", data, "--model", model, "--out", str(out), "--ratio", "1.5", "--epochs", epochs]
    args += [*FAST, "--set", "loss=squared_error", *CASES[method]]
    assert main([*args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["footprint"]["serve"] <= report["full_bytes"] / 1.5
    assert report["test"]["rmse"] < 1.5
    page = (out / "report.md").read_text()
    assert f"- test: RMSE {report['test']['rmse']:.4f}" in page
    assert "| last_items | " in page
    assert "reads the table of item" in page
    plan = Plan.from_dict(json.loads((out / "plan.json").read_text()))
    assert plan["item"] == plan["last_items"]
    assert method in {plan[name].method for name in plan}
    # What is found serves raw rows, as any run does.
    capsys.readouterr()
    assert main(["export", str(out), "--data", data, "--out", str(tmp_path / "m.safetensors")]) == 0
    assert f"test RMSE: {report['test']['rmse']:.6f}" in capsys.readouterr().out
    assert main(["export", str(out), "--out", str(tmp_path / "m.safetensors")]) == 0  # with the encoders of its data
    scores = rse.load(tmp_path / "m.safetensors").predict(rows()[:50])
    assert scores.shape == (50,)
    assert np.isfinite(scores).all()
    verify(tmp_path / "m.safetensors")
    # It trains like any other plan.
    again = ["train", "--data", data, "--model", model, "--plan", str(out / "plan.json"), "--epochs", "1", *FAST]
    assert main([*again, "--set", "loss=squared_error", "--out", str(tmp_path / "again")]) == 0


@pytest.mark.slow
def test_a_study_on_ratings_goes_by_their_error(table: Path, tmp_path: Path, capsys: Any) -> None:
    args = ["search", "methods", "--data", str(table / "data"), "--model", "dnn", "--out", str(tmp_path / "study")]
    args += [*FAST, "--epochs", "1", "--trials", "3", "--methods", "hash,freqcut", "--set", "search.groups=1"]
    assert main([*args, "--budgets", "60%", "--set", "loss=squared_error"]) == 0
    shown = capsys.readouterr().out
    assert "| trial | validation RMSE |" in shown
    found = json.loads((tmp_path / "study" / "results.json").read_text())
    done = [t for t in found["trials"] if t["state"] == "complete"]
    assert found["quality"] == {"key": "rmse", "label": "RMSE", "rises": False}
    assert min(t["rmse"] for t in done) in [t["rmse"] for t in found["front"]]
    assert "auc" not in done[0]
    picked = ["search", "pick", str(tmp_path / "study"), "--under", "1MiB"]
    assert main(picked) == 0
    best = min(done, key=lambda t: (t["rmse"], t["bytes"]))
    told = capsys.readouterr().out
    assert f"trial {best['trial']}," in told
    assert " test: RMSE " in told


@pytest.mark.slow
def test_clicks_of_such_a_table_are_searched_too(table: Path, tmp_path: Path, capsys: Any) -> None:
    args = ["search", "dnis", "--data", str(table / "clicks"), "--model", "deepfm", "--out", str(tmp_path / "run")]
    assert main([*args, "--ratio", "1.5", "--epochs", "1", *FAST, *CASES["dnis"]]) == 0
    shown = capsys.readouterr().out
    assert "test: AUC 0." in shown


def test_labels_that_the_loss_does_not_take_and_missing_splits_are_refused(
    table: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["search", "dnis", "--data", str(table / "data"), "--out", str(tmp_path / "a")]) == 2
    assert "loss='squared_error'" in capsys.readouterr().err
    (table / "few.toml").write_text(SCHEMA.replace("valid = 0.2", "valid = 0"))
    made = ["data", "table", str(table / "rows.parquet"), str(tmp_path / "few"), "--schema", str(table / "few.toml")]
    assert main(made) == 0
    assert "valid" not in open_dataset(tmp_path / "few").splits or open_dataset(tmp_path / "few").splits["valid"] == 0
    for kind in ("optembed", "methods"):
        args = ["search", kind, "--data", str(tmp_path / "few"), "--out", str(tmp_path / kind), "--set"]
        assert main([*args, "loss=squared_error"]) == 2
        assert "convert it with --valid 1/12" in capsys.readouterr().err


@pytest.mark.slow
def test_raw_ids_are_refused_and_sized_by_a_study(table: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "raw.toml").write_text(SCHEMA.replace('vocab = "item"', 'vocab = "item"\nids = "raw"'))
    made = ["data", "table", str(table / "rows.parquet"), str(tmp_path / "raw"), "--schema", str(tmp_path / "raw.toml")]
    assert main(made) == 0
    args = ["--data", str(tmp_path / "raw"), "--model", "dnn", *FAST, "--epochs", "1", "--set", "loss=squared_error"]
    assert main(["search", "dnis", *args, "--out", str(tmp_path / "a")]) == 2
    assert not (tmp_path / "a").exists()
    assert "item, last_items have raw 64-bit ids, which have no rows to choose from" in capsys.readouterr().err
    study = ["search", "methods", *args, "--out", str(tmp_path / "b"), "--trials", "1", "--budgets", "50%"]
    assert main(study) == 0
    assert "RMSE" in capsys.readouterr().out
