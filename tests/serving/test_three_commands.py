"""A company's table goes from Parquet files to a file of scores by three commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from recsys_embed.cli import main

ROWS = 8_000
COLUMNS = """
[columns]
click = { kind = "label" }
user = { kind = "categorical" }
item = { kind = "categorical", vocab = "item" }
country = { kind = "categorical" }
member = { kind = "categorical" }
tags = { kind = "list" }
last_items = { kind = "sequence", vocab = "item", max_length = 20 }
price = { kind = "numeric", transform = "log", indicator = true }
ts = { kind = "time", parts = ["hour", "weekday"] }
weight = { kind = "weight" }

[split]
kind = "time"
valid = 0.1
test = 0.2
"""


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files in the order of time."""
    folder, rng = tmp_path_factory.mktemp("company"), np.random.default_rng(0)
    user, item = rng.integers(0, 150, ROWS), rng.integers(0, 200, ROWS)
    seen = rng.integers(0, 200, (ROWS, 4))
    frame = pl.DataFrame(
        {
            "click": rng.random(ROWS) < 0.15 + 0.35 * (user % 2) + 0.35 * (item % 3 == 0),
            "user": [f"user-{u:08d}" for u in user],
            "item": item + 2**60,
            "country": [None if u % 7 == 0 else f"C{u % 30}" for u in user],
            "last_items": [(row[: i % 5] + 2**60).tolist() for i, row in enumerate(seen)],
            "tags": [[f"tag{i % 40}", f"brand{i % 90}"][: 1 + i % 2] for i in item],
            "price": [None if x < 0.05 else float(x) for x in rng.random(ROWS)],
            "member": user % 3 == 0,
            "ts": 1_700_000_000 + np.arange(ROWS) * 30,
            "weight": 0.5 + rng.random(ROWS),
        }
    )
    (folder / "raw").mkdir()
    for number in range(8):
        frame.slice(number * ROWS // 8, ROWS // 8).write_parquet(folder / "raw" / f"part-{number}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("schema", ["written", "inspected"])
@pytest.mark.parametrize("bytes_by", ["ratio", "plan"])
def test_files_to_scores(
    events: Path, tmp_path: Path, schema: str, bytes_by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, toml, data = str(events / "raw" / "*.parquet"), tmp_path / "events.toml", str(tmp_path / "data")
    if schema == "inspected":
        assert main(["data", "inspect", raw]) == 0
        toml.write_text(capsys.readouterr().out)
    else:
        toml.write_text(COLUMNS)
    assert main(["data", "table", raw, data, "--schema", str(toml)]) == 0
    size = ["--ratio", "5"]
    if bytes_by == "plan":
        size = ["--plan", str(tmp_path / "plan.json")]
        budget = ["--budget", "6KiB", "--embedding-dim", "8", "--out", size[1]]
        assert main(["plan", "--data", data, *budget]) == 0
    capsys.readouterr()
    run = ["--out", str(tmp_path / "run"), "--export", str(tmp_path / "m.safetensors"), "--json"]
    settings = ["--model", "din", "--embedding-dim", "8", "--batch-size", "128", "--learning-rate", "0.01"]
    assert main(["train", "--data", data, *settings, "--epochs", "3", *size, *run]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["compression"] > 2
    assert told["test"]["auc"] > 0.7
    out = tmp_path / "scores.parquet"
    assert main(["predict", str(tmp_path / "m.safetensors"), raw, "--out", str(out), "--keep", "user,item,click"]) == 0
    scored = pl.read_parquet(out)
    assert scored["item"].to_list() == pl.read_parquet(raw)["item"].to_list()
    # The rows are in the order of time, so the last ones are those of the test.
    last = scored.tail(told["test"]["samples"])
    assert roc_auc_score(last["click"], last["score"]) == pytest.approx(told["test"]["auc"], abs=1e-6)
