"""`recsys-embed search` end to end: from a data folder to a plan that trains, reports and is on disk what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recsys_embed.cli import main
from recsys_embed.data import make_synthetic, open_dataset
from recsys_embed.plan import Plan
from tests.tiers import slow_but

FAST = ["--batch-size", "256", "--embedding-dim", "4", "--epochs", "1", "--set", "model_args.hidden=[8]"]
CASES = {
    "optembed": ["--ratio", "2", "--set", "search.generations=2", "--set", "search.population=4",
                 "--set", "search.pull=0.1"],
    "dnis": ["--ratio", "8", "--set", "search.blocks=3"],
    "pep": ["--ratio", "4", "--set", "search.snapshots=[2.0]", "--set", "batch_size=32"],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("synthetic")
    make_synthetic(folder, rows=4000, seed=1)
    return str(folder)


@pytest.mark.parametrize("method", slow_but(CASES, "dnis"))
def test_a_search_leaves_a_folder_whose_plan_is_like_any_other(method: str, data: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    args = ["search", method, "--data", data, "--model", "deepfm", "--out", str(out), *FAST, *CASES[method]]
    assert main([*args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {p.name for p in out.iterdir()} >= {
        "plan.json", "report.json", "report.md", "curves.json", "curves.png", "model.pt", "search.json"
    }  # fmt: skip
    assert report["footprint"]["serve"] <= report["full_bytes"] / float(CASES[method][1])
    assert report["cost_in_trainings"] > 0
    assert set(report["stage_seconds"]) >= {"retrain"}
    assert "| C1 |" in (out / "report.md").read_text()
    # What is reported is what is stored.
    saved = torch.load(out / "model.pt", weights_only=True)["model"]
    held = {k: v for k, v in saved.items() if k.startswith(("embedding.", "linear.")) and "_extra_state" not in k}
    assert sum(v.nbytes for v in held.values()) == report["footprint"]["serve"]
    plan = Plan.from_dict(json.loads((out / "plan.json").read_text()))
    methods = {plan[name].method for name in plan}
    assert methods <= {method, "full", "pep"}
    assert method in methods
    # It trains like any other plan, into as many bytes.
    again = [
        "train",
        "--data",
        data,
        "--model",
        "deepfm",
        "--plan",
        str(out / "plan.json"),
        "--out",
        str(tmp_path / "t"),
    ]
    assert main([*again, *FAST, "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    vectors = plan.footprint(open_dataset(data).schema(4)).serve
    assert vectors < trained["footprint"]["serve"] <= vectors * 1.3
    assert main(args) == 0
    assert "test: AUC" in capsys.readouterr().out, "a finished search says its result again"


def test_bad_requests_end_with_one_line(data: str, tmp_path: Path, capsys) -> None:
    for number, (more, message) in enumerate(
        (
            (["--set", "search.generation=3"], "did you mean 'generations'"),
            (["--set", "search.rows=some"], "`rows` must be one of field, row, none"),
            (["--budget", "1KiB"], "available"),
            (["--set", "embedding_weight_decay=0.0"], "rows are pruned because weight decay"),
            (["--set", "method=hash"], "starts from full tables"),
        )
    ):
        out = tmp_path / str(number)
        args = ["search", "optembed", "--data", data, "--model", "fm", "--out", str(out), *FAST[:6], *more]
        assert main(args) == 2, more
        assert message in capsys.readouterr().err
