"""A run that starts from another's weights trains these on, and only where they are of the same data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recsys_embed as rse
from recsys_embed.cli import main
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.exports.run_model import model_of_run
from recsys_embed.train import TrainConfig, run_training
from recsys_embed.train.warm_start import settings_of_run

pl = pytest.importorskip("polars", reason="tables need polars")
from recsys_embed.data import TableSplit, convert_table, open_dataset  # noqa: E402

TOWERS: dict[str, Any] = {
    "model": "twotower",
    "model_args": {"item_features": ("tags",), "item_lists": {"tags": 2}, "hidden": (8,), "output_dim": 4},
    "loss": "sampled_softmax",
}
CLICKS: dict[str, Any] = {"model": "deepfm", "model_args": {"hidden": [8]}}


def day(number: int, items: range, rows: int = 200) -> Any:
    rng = np.random.default_rng(number)
    item = rng.choice(items, rows)
    return pl.DataFrame(
        {
            "user": rng.integers(0, 20, rows),
            "item": item,
            "tags": [[f"t{i % 3}", f"t{i % 2}"] for i in item],
            "price": rng.normal(5 + number, 2, rows),
            "click": rng.integers(0, 2, rows) if number < 9 else [1] * rows,
        }
    )


SCHEMA: dict[str, Any] = {
    "columns": {
        "user": {"kind": "categorical"},
        "item": {"kind": "categorical"},
        "tags": {"kind": "list"},
        "price": {"kind": "numeric"},
        "click": {"kind": "label"},
    },
    "split": {"kind": "order", "valid": 0, "test": "1/5"},
}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days of one vocabulary, of which the first has items 0 to 19 and the second 10 to 24, and another folder."""
    folder = tmp_path_factory.mktemp("days")
    convert_table(day(1, range(20)), folder / "day1", SCHEMA)
    convert_table(day(2, range(10, 25)), folder / "day2", like=folder / "day1", split=TableSplit("order", valid=0))
    convert_table(day(2, range(5, 22)), folder / "other", SCHEMA)
    return folder


def config(base: dict[str, Any], **changes: Any) -> TrainConfig:
    shared = {"embedding_dim": 4, "batch_size": 32, "learning_rate": 0.01, "keep_best": False}
    return TrainConfig(**{**shared, **base, **changes})


@pytest.mark.parametrize(
    ("base", "method"), [(TOWERS, "full"), (TOWERS, "unified"), (CLICKS, "hash"), (CLICKS, "planned")]
)
def test_it_begins_with_the_weights_of_the_run(days: Path, tmp_path: Path, base: dict[str, Any], method: str) -> None:
    settings = config(base, method=method, **({} if method == "full" else {"ratio": 2}))
    run_training(settings, open_dataset(days / "day1"), folder=tmp_path / "one", show_progress=False)
    before: Any = model_of_run(tmp_path / "one")
    still = settings.replace(learning_rate=1e-30)  # moves nothing
    data = open_dataset(days / "day2")
    model: Any = run_training(still, data, start_from=tmp_path / "one", show_progress=False).model
    old, new = dict(before.named_parameters()), dict(model.named_parameters())
    assert old.keys() == new.keys()
    assert all(torch.equal(old[n], new[n]) for n in old)
    assert torch.equal(before.numeric_mean, model.numeric_mean)
    moved: Any = run_training(settings, data, start_from=tmp_path / "one", show_progress=False).model
    assert not all(torch.equal(old[n], p) for n, p in moved.named_parameters())
    if base is TOWERS:
        both = before.in_catalogue.clone()
        batch = data.read("train", 0, data.rows("train"))
        both[batch.ids[:, 1]] = True
        assert torch.equal(model.in_catalogue, both & ~torch.isin(torch.arange(len(both)), torch.tensor([0])))
        assert torch.equal(model.item_counts, torch.bincount(batch.ids[batch.label == 1, 1], minlength=len(both)))
        # Of items that are not in the new rows the model knows what it knew.
        gone = before.in_catalogue.clone()
        gone[batch.ids[:, 1]] = False
        assert gone.any()
        assert torch.equal(model.items(gone.nonzero().flatten()), before.items(gone.nonzero().flatten()))


def test_the_command_line_goes_on_with_the_settings_of_the_run(days: Path, tmp_path: Path, capsys: Any) -> None:
    first = config(CLICKS, method="planned", ratio=2)
    run_training(first, open_dataset(days / "day1"), folder=tmp_path / "one", show_progress=False)
    train = ["train", "--data", str(days / "day2"), "--start-from", str(tmp_path / "one"), "--json", "--no-tensorboard"]
    out = str(tmp_path / "two")
    assert main([*train, "--out", out, "--epochs", "2", "--export", str(tmp_path / "m.safetensors")]) == 0
    written = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (written["method"], written["ratio"], written["epochs"]) == ("planned", 2, 2)
    assert written["plan"] == settings_of_run(tmp_path / "one")["plan"]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["start_from"].endswith("one/model.pt")
    assert len(rse.load(tmp_path / "m.safetensors").predict(day(3, range(30)))) == 200
    # A third day goes on from the second; a finished run is read again by --resume with the same start only.
    assert main([*train[:4], out, *train[5:], "--out", str(tmp_path / "three")]) == 0
    assert main([*train, "--out", out, "--epochs", "2", "--resume"]) == 0
    capsys.readouterr()
    assert main([*train[:3], "--out", out, "--config", f"{out}/config.json", "--resume"]) != 0
    assert "start_from: checkpoint" in capsys.readouterr().err


def test_weights_of_something_else_are_refused(days: Path, tmp_path: Path, capsys: Any) -> None:
    settings = config(CLICKS, method="hash", ratio=2)
    run_training(settings, open_dataset(days / "day1"), folder=tmp_path / "one", show_progress=False)
    start: dict[str, Any] = {"start_from": tmp_path / "one", "show_progress": False}
    with pytest.raises(ConfigError, match="is another conversion than the one that the run was trained on"):
        run_training(settings, open_dataset(days / "other"), **start)
    (tmp_path / "one" / "run.json").unlink()
    with pytest.raises(ConfigError, match="of other features or vocabularies than the data"):
        run_training(settings, open_dataset(days / "other"), **start)
    with pytest.raises(ConfigError, match=r"`ratio` is 3\.0; there it was 2\.0 \(a run that starts from"):
        run_training(settings.replace(ratio=3.0), open_dataset(days / "day2"), **start)
    with pytest.raises(ConfigError, match=r"holds no model\.pt"):
        run_training(settings, open_dataset(days / "day2"), start_from=tmp_path, show_progress=False)
    (tmp_path / "model.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="damaged"):
        run_training(settings, open_dataset(days / "day2"), start_from=tmp_path, show_progress=False)
    convert_table(day(2, range(10, 25)), tmp_path / "all", like=days / "day1")
    with pytest.raises(ConfigError, match="--split order"):
        run_training(settings, open_dataset(tmp_path / "all"), **start)
