"""``recsys-embed export``: from a run folder to a file with its AUC before and after, and back to a module."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from recsys_embed.cli import main
from recsys_embed.data import open_dataset
from recsys_embed.exports import load
from recsys_embed.train import TrainConfig, evaluate, run_training


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set ``data`` and a trained run ``run``."""
    folder = tmp_path_factory.mktemp("command")
    assert main(["data", "synthetic", str(folder / "data"), "--rows", "3000", "--json"]) == 0
    config = TrainConfig(model="fm", method="hash", ratio=4, embedding_dim=8, steps=4, batch_size=512, threads=1)
    run_training(config, open_dataset(folder / "data"), folder=folder / "run", show_progress=False)
    return folder


def test_a_run_becomes_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "m.safetensors"
    assert (
        main(["export", str(run / "run"), "--out", str(out), "--precision", "int8", "--data", str(run / "data")]) == 0
    )
    text = capsys.readouterr().out
    assert "at int8" in text
    assert "test AUC: " in text
    assert main(["export", "--verify", str(out)]) == 0
    assert "m.safetensors: whole; " in capsys.readouterr().out


def test_the_numbers_are_those_of_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "n.safetensors"
    options = ["--precision", "int4", "--data", str(run / "data"), "--split", "valid", "--json"]
    assert main(["export", str(run / "run" / "model.pt"), "--out", str(out), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    metrics = evaluate(load(out), open_dataset(run / "data"), "valid")
    assert metrics is not None
    assert report["metric"] == {"name": "valid AUC", "before": report["metric"]["before"], "after": metrics.auc}
    assert abs(report["metric"]["before"] - report["metric"]["after"]) < 0.02
    assert report["bytes"] == out.stat().st_size
    assert main(["export", "--verify", str(out), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["bytes"] == report["bytes"]
    assert verified["manifest"]["metric"]["after"] == metrics.auc


def test_a_file_is_converted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run / "fp32.safetensors", run / "int8.safetensors"
    assert main(["export", str(run / "run"), "--out", str(first)]) == 0
    assert main(["export", str(first), "--out", str(second), "--precision", "int8", "--no-prune"]) == 0
    assert main(["export", str(run / "run"), "--out", str(run / "direct"), "--precision", "int8", "--no-prune"]) == 0
    assert second.read_bytes() == (run / "direct").read_bytes()
    capsys.readouterr()


def test_a_model_of_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model-factory", "torch.nn:Identity", "--out", str(tmp_path / "f"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needs_skeleton"]
    into = load(tmp_path / "f", into=torch.nn.Identity())
    assert isinstance(into, torch.nn.Identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a SOURCE or --model-factory"),
        (["x", "--model-factory", "a:b", "--out", "f"], "give a SOURCE or --model-factory"),
        (["{run}"], "--out model.safetensors"),
        (["{run}", "--out", "{out}", "--precision", "int9"], "unknown precision 'int9'; did you mean 'int8'?"),
        (["{run}", "--out", "{out}", "--search", "best"], "unknown search 'best'"),
        (["{run}", "--out", "{out}", "--data", "{data}", "--split", "tset"], "--split must be one of "),
        (["{data}", "--out", "{out}"], "holds no model.pt"),
        (["absent", "--out", "{out}"], "absent does not exist"),
        (["{data}/schema.json", "--out", "{out}"], "is not an exported file"),
        (["--verify", "absent"], "no exported file at absent"),
        (["{run}", "--verify", "x"], "--verify only checks a file"),
    ],
)
def test_faults_are_one_line(run: Path, arguments, message, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    places = {"run": run / "run", "data": run / "data", "out": tmp_path / "f"}
    capsys.readouterr()
    assert main(["export", *(a.format(**places) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("label", "text"), [("", "no labels"), ("0\t", "are of one class"), ("1\t", "are of one class")]
)
def test_rows_that_cannot_measure_are_refused_before_anything_is_written(
    label: str, text: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = label + "\t".join(["3"] * 13 + ["0000000a"] * 26) + "\n"
    (tmp_path / "in.tsv").write_text(row * 40)
    assert main(["data", "criteo", str(tmp_path / "in.tsv"), str(tmp_path / "data"), "--json"]) == 0
    out = tmp_path / "m.safetensors"
    # Alone, a model does not know what data it was trained on.
    alone = shutil.copy(run / "run" / "model.pt", tmp_path)
    args = ["export", str(alone), "--out", str(out), "--data", str(tmp_path / "data"), "--no-encoders"]
    assert main(args) == 2
    assert text in capsys.readouterr().err
    assert not out.exists()
