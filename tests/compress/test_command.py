"""recsys-embed compress: the table, the compressed state, and one line for whatever is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed.cli import main
from recsys_embed.compress import compress_
from recsys_embed.errors import ConfigError
from recsys_embed.report.memory import memory_report
from recsys_embed.train.config import read_settings

UNREADABLE = [
    ("{", "line 1 column 2"),
    (
        '{"version": 1, "features": {"C1": {"method": "full"}, "C1": {"method": "hash"}}}',
        "key 'C1' occurs more than once",
    ),
    ('{"version": NaN}', "NaN is not JSON"),
    ("[" * 100_000, "it is nested too deeply"),
]
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.ModuleDict({"C1": nn.Embedding(100, 8), "C2": nn.Embedding(40, 8), "head": nn.Linear(8, 1)})
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = f"shop_{tmp_path.name.replace('-', '_')}"  # a name of its own: modules stay imported between tests
    (tmp_path / f"{name}.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    model = load(name)
    plan = rse.Plan.uniform(rse.Schema.from_model(model), "hash", budget="2KiB", full_below=50)
    Path("plan.json").write_text(plan.to_json())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    torch.save(model.state_dict(), "trained.pt")
    return tmp_path / name


def load(name: str) -> Any:
    return __import__(name).build()


def run(place: Path, *args: str) -> int:
    return main(["compress", "--model-factory", f"{place.name}:build", "--plan", "plan.json", *args])


def test_from_a_trained_state_to_a_compressed_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--state", "trained.pt", "--out", "small.pt") == 0
    out = capsys.readouterr().out
    assert "C1" in out
    assert "hash" in out
    assert "state: small.pt" in out
    plan = rse.Plan.from_dict(json.loads(Path("plan.json").read_text()))
    by_hand = load(place.name)
    by_hand.load_state_dict(torch.load("trained.pt"))
    compress_(by_hand, plan)
    again = load(place.name)
    compress_(again, plan, init="fresh")
    again.load_state_dict(torch.load("small.pt"))
    for key, value in by_hand.state_dict().items():
        if not key.endswith("_extra_state"):  # names the initial distribution too
            assert torch.equal(value, again.state_dict()[key]), key


def test_dry_run_as_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--dry-run", "--json", "--init", "fresh") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] is True
    assert [t["method"] for t in found["tables"]] == ["hash", "full"]
    assert sorted(p.name for p in place.parent.glob("*.pt")) == ["trained.pt"]


def test_counts_of_a_data_folder_weigh_the_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("polars")
    from recsys_embed.data import make_synthetic, open_dataset

    make_synthetic("data", rows=2000, seed=0)
    sizes = {f.name: f.num_embeddings for f in open_dataset("data").schema(8)}
    name = place.name + "_sized"
    lines = ", ".join(f'"{n}": nn.Embedding({sizes[n]}, 8)' for n in ("C1", "C2"))
    text = f"from torch import nn\ndef build():\n    return nn.ModuleDict({{'deep': nn.ModuleDict({{{lines}}})}})"
    (place.parent / f"{name}.py").write_text(text)
    assert main(["plan", "--model-factory", f"{name}:build", "--stats", "data", "--budget", "2KiB", "--json"]) == 0
    plan = rse.Plan.from_dict(json.loads(capsys.readouterr().out))
    assert set(plan) == {"deep/C1", "deep/C2"}
    plan = rse.Plan({n: rse.HashConfig(num_buckets=2) for n in ("deep/C1", "deep.C2")})
    Path("plan.json").write_text(json.dumps(plan.to_dict()))
    assert run(place.parent / name, "--counts", "data", "--json") == 0
    weighted = json.loads(capsys.readouterr().out)
    assert all(0 < t["relative_error"] < 1 for t in weighted["tables"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--state", "gone.pt"], "there is no file gone.pt"),
        (["--state", "plan.json"], "is not a state dict of this model"),
        (["--dry-run", "--out", "x.pt"], "--dry-run writes nothing"),
        (["--init", "warm"], "`init` must be 'dense' or 'fresh'"),
        (["--exclude", "C9"], "pattern 'C9' matches no table"),
        (["--exclude", "C1"], "the plan names 'C1'"),
    ],
)
def test_mistakes_are_one_line(place: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert run(place, *args) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not Path("x.pt").exists()


@pytest.mark.parametrize(("text", "said"), UNREADABLE)
def test_a_plan_that_is_none(place: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    Path("plan.json").write_text(text)
    assert run(place) == 2
    err = capsys.readouterr().err
    assert "plan.json is not valid JSON" in err
    assert said in err
    for read in (read_settings, memory_report):
        with pytest.raises(ConfigError, match=re.escape(said)):
            read(Path("plan.json"))
