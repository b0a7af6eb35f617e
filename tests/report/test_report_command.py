"""``recsys-embed report``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.cli import main

pytest.importorskip("typer")

SCHEMA = Schema([FeatureSpec("C1", 5000, 16), FeatureSpec("C2", 300, 16)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA.to_dict()))
    (tmp_path / "plan.json").write_text(Plan.uniform(SCHEMA, "hash", budget="64KiB").to_json())
    torch.save(rse.EmbeddingCollection(SCHEMA).state_dict(), tmp_path / "state.pt")
    (tmp_path / "shop.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Embedding(10**6, 512), nn.Linear(2, 2))\n"
    )
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = main(["report", *args])
    out, err = capsys.readouterr()
    return status, out, err


def test_table_of_a_schema(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "schema.json", "--optimizer", "adam", "--precision", "int8", "--batch-size", "128")
    assert (status, err) == (0, "")
    assert "schema.json: 2 embedding tables" in out
    assert "of a batch of 128" in out
    assert max(map(len, out.splitlines())) <= 100


def test_json_of_a_plan_with_its_schema(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "plan.json", "--schema", "schema.json", "--json")
    data = json.loads(out)
    assert status == 0
    assert data["totals"]["serve"] <= 64 * 1024
    assert {t["method"] for t in data["tables"]} == {"hash"}


def test_files_are_written_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "state.pt", "--html", "out/a.html", "--markdown", "out/a.md", "--json")
    assert status == 0
    assert json.loads(out)["totals"]["serve"] == 5300 * 64
    assert (folder / "out/a.html").read_text().startswith("<!doctype html>")
    assert (folder / "out/a.md").read_text().startswith("# Memory report")
    assert run(capsys, "state.pt", "--html", "b.html")[2] == "written: b.html\n"


def test_model_of_somebody_else_that_takes_no_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--model-factory", "shop:make", "--meta", "--optimizer", "adam")
    assert status == 0
    assert "Sequential: 1 embedding table, 1.91 GiB to serve, 7.63 GiB to train" in out


def test_data_folder_and_a_plan_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("polars")
    from recsys_embed.data import make_synthetic, open_dataset

    make_synthetic(tmp_path / "data", rows=1000, seed=2)
    schema = open_dataset(tmp_path / "data").schema(16)
    (tmp_path / "plan.json").write_text(Plan.uniform(schema, "hash", budget="64KiB").to_json())
    status, out, _ = run(capsys, str(tmp_path / "plan.json"), "--data", str(tmp_path / "data"))
    assert status == 0
    assert "Frequencies" in out
    status, out, _ = run(capsys, str(tmp_path / "data"), "--embedding-dim", "4", "--json")
    assert json.loads(out)["tables"][0]["width"] == 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give a SOURCE or --model-factory"),
        (("a.pt", "--model-factory", "shop:make"), "give a SOURCE or --model-factory"),
        (("schema.json", "--meta"), "--meta is about --model-factory"),
        (("nope.pt",), "there is nothing at nope.pt"),
        (("plan.json",), "is a plan, which needs the features"),
        (("schema.json", "--optimizer", "adm"), "did you mean 'adam'"),
        (("schema.json", "--precision", "int9"), "did you mean 'int8'"),
        (("schema.json", "--batch-size", "0"), "`batch_size` must be"),
        (("--model-factory", "shop:mak"), "did you mean 'make'"),
        (("schema.json", "--data", "nope"), "nope"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str
) -> None:
    if "--data" in args:
        pytest.importorskip("polars")
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err.startswith("recsys-embed: error: ")
    assert len(err.splitlines()) == 1
    assert words in err
