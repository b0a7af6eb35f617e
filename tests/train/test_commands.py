"""The commands train and compare end to end on a small synthetic folder."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import recsys_embed.cli.compare as compare_command
from recsys_embed.cli import main
from recsys_embed.cli._settings import train_config
from recsys_embed.data import convert_table, make_synthetic
from recsys_embed.registry import list_methods
from recsys_embed.report.comparison import rich_table
from recsys_embed.train.compare import Summary

FAST = ["--batch-size", "256", "--embedding-dim", "4", "--set", "model_args.hidden=[8]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("synthetic")
    make_synthetic(folder, rows=3000, seed=1)
    return str(folder)


def test_train_writes_a_run_and_refuses_to_overwrite_it(data: str, tmp_path: Path, capsys) -> None:
    args = ["train", "--data", data, "--out", str(tmp_path / "run"), "--method", "hash", "--ratio", "4", *FAST]
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["test"]["auc"] <= 1
    assert result["compression"] >= 4
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"config.json", "run.json", "result.json", "model.pt"}
    assert main(args) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*args, "--resume"]) == 0
    assert "test: AUC" in capsys.readouterr().out


def test_a_config_file_and_its_faults(data: str, tmp_path: Path, capsys) -> None:
    config = tmp_path / "c.toml"
    config.write_text("epoch = 1\n")
    assert main(["train", "--data", data, "--config", str(config), "--out", str(tmp_path / "r")]) == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_options_win_over_the_file_and_assignments_over_both() -> None:
    settings = {"epochs": 1, "batch_size": 64, "learning_rate": 0.1}
    options = {"epochs": 2, "batch_size": 128, "learning_rate": None}
    found = train_config(settings, options, ["batch_size=256"])
    assert (found.epochs, found.batch_size, found.learning_rate) == (2, 256, 0.1)


def test_compare_prints_one_table_and_writes_its_files(data: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "cmp"
    args = ["compare", "--data", data, "--models", "fm,lr", "--methods", "hash,unified", "--ratios", "4", *FAST[:4]]
    assert main([*args, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "attainable" in text
    assert text.count("full") >= 2
    results = json.loads((out / "results.json").read_text())
    assert len(results["rows"]) == 6
    assert results["environment"]["versions"]["torch"]
    assert {p.name for p in out.iterdir()} >= {"results.json", "table.md", "pareto.png", "rows", "run.json"}
    assert main([*args, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == results["rows"]


def test_compare_from_text_and_with_a_budget(data: str, tmp_path: Path, capsys) -> None:
    text = next(Path(data).glob("*.tsv*"))
    args = ["compare", "--input", str(text), "--models", "dnn", "--methods", "hash", "--budget", "24KiB", *FAST]
    assert main([*args, "--out", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["size"] for r in rows] == ["", "24KiB"]
    assert rows[1]["footprint"]["serve"] <= 24 * 1024


@pytest.mark.slow
def test_the_demo_suits_every_model(data: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(compare_command, "DEMO_ROWS", 2000)
    args = ["compare", "--demo", "--models", "lr", "--ratio", "2", "--epochs", "1", "--out", str(tmp_path), "--json"]
    assert main(args) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["method"] for r in results["rows"]] == [m.name for m in list_methods() if m.config_cls.plannable]
    assert results["data"]["truth"]["attainable"]["test"]["auc"] > 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "one of --data"),
        (["--demo", "--data", "x"], "one of --data"),
        (["--demo", "--methods", "hsah"], "did you mean 'hash'"),
        (["--demo", "--ratios", "a"], "numbers separated by commas"),
        (["--demo", "--set", "seed=3"], "varies between rows"),
    ],
)
def test_bad_requests_end_with_one_line(args: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["compare", "--out", str(tmp_path / "x"), *args]) == 2
    assert message in capsys.readouterr().err


def test_the_bar_draws_on_a_terminal_that_does_not_know_its_size() -> None:
    leader, follower = pty.openpty()
    code = "from recsys_embed.train.run_log import progress_bar; b = progress_bar(3, 'label'); b.update(1); b.close()"
    subprocess.run([sys.executable, "-c", code], stderr=follower, stdout=follower, check=True, timeout=60)
    assert b"label" in os.read(leader, 10_000)
    os.close(leader)
    os.close(follower)


def test_the_table_of_one_model_and_seed_fits_80_columns() -> None:
    from rich.console import Console

    line = Summary(
        "deepfm", "compositional", "20x", "ok", "", 1, auc=0.75, logloss=0.5, auc_gain=-0.01, compression=20.0,
        samples_per_s=123_456.0,
    )  # fmt: skip
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(rich_table([line]))
    text = console.export_text()
    assert all(part in text for part in ("compositional", "0.7500", "-0.0100", "20.0x", "123,456", "pression"))
    assert max(len(row.rstrip()) for row in text.splitlines()) <= 80


def _table(out: Path, label: dict[str, str], ids: str) -> str:
    events = {"click": [i * 7 % 5 % 2 for i in range(300)], "user": [i * 7 % 5 for i in range(300)]}
    events["price"] = [i % 9 for i in range(300)]
    user = {"kind": "categorical", "ids": ids}
    convert_table(events, out, {"columns": {"click": {"kind": "label", **label}, "user": user}})
    return str(out)


def test_compare_of_raw_ids_has_no_full_table_to_measure_against(tmp_path: Path, capsys) -> None:
    data = _table(tmp_path / "data", {}, "raw")
    args = ["compare", "--data", data, "--model", "lr", "--ratios", "2", "--batch-size", "32", "--epochs", "1"]
    assert main([*args, "--methods", "hash", "--out", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["summary"]
    assert [(s["method"], s["auc_gain"]) for s in found] == [("hash", None)]
    assert 0 <= found[0]["auc"] <= 1
    assert main([*args, "--methods", "hash,memcom", "--out", str(tmp_path / "b")]) == 2
    assert "method 'memcom' needs vocabulary indices, and user have raw 64-bit ids" in capsys.readouterr().err


def test_compare_of_real_labels_tells_rmse(tmp_path: Path, capsys) -> None:
    data = _table(tmp_path / "data", {"task": "real", "column": "price"}, "vocab")
    args = ["compare", "--data", data, "--model", "lr", "--methods", "hash", "--ratios", "2", "--batch-size", "32"]
    assert main([*args, "--epochs", "1", "--set", "loss=squared_error", "--out", str(tmp_path / "run")]) == 0
    assert "RMSE" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for line, row in zip(results["summary"], results["rows"], strict=True):
        assert line["ranking"] == {"rmse": row["test"]["rmse"]}
    assert "dRMSE vs full" in (tmp_path / "run" / "table.md").read_text()
    assert main(["data", "stats", data]) == 0
    assert "train: 220 rows, mean label 3.9545" in capsys.readouterr().out
