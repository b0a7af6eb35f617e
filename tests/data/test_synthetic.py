"""Synthetic rows: reproducible, of Criteo's form, and with a truth that holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import contents
from sklearn.metrics import log_loss, roc_auc_score

from recsys_embed.cli import main
from recsys_embed.data import make_synthetic, open_dataset
from recsys_embed.data.criteo import synthetic
from recsys_embed.data.criteo.explain import GoodRow, read_line
from recsys_embed.data.criteo.layout import LineLayout
from recsys_embed.data.criteo.planted import PlantedModel, sigmoid
from recsys_embed.errors import ConfigError

ROWS = 12_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "out"
    make_synthetic(out, ROWS, 7)
    return out


def test_same_seed_same_bytes_in_pieces_of_any_size(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "_CHUNK", 777)
    make_synthetic(tmp_path / "again", ROWS, 7)
    one, two = contents(made, schema=False), contents(tmp_path / "again", schema=False)
    assert one == two
    make_synthetic(tmp_path / "other", ROWS, 8, text_only=True)
    assert (tmp_path / "other" / "synthetic.tsv").read_bytes() != one["synthetic.tsv"]


def test_text_is_what_the_model_says(made: Path) -> None:
    lines = (made / "synthetic.tsv").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == ROWS
    model = PlantedModel(7, json.loads((made / "truth.json").read_text())["plan"]["scale"])
    model.calibrate()
    want = model.rows(0, 300)
    for k in range(300):
        row = read_line(lines[k], LineLayout(), k)
        assert isinstance(row, GoodRow)
        assert row.label == int(want.labels[k])
        assert list(row.ints) == [
            None if m else int(v) for v, m in zip(want.ints[:, k], want.ints_missing[:, k], strict=True)
        ]
        assert list(row.cats) == [
            None if m else int(v) for v, m in zip(want.cats[:, k], want.cats_missing[:, k], strict=True)
        ]
    assert min(v for raw in lines for v in [read_line(raw, LineLayout(), 1).ints[1]]) < 0  # type: ignore[union-attr]


def test_truth_is_the_planted_probability(made: Path) -> None:
    truth = json.loads((made / "truth.json").read_text())
    chance = pl.read_parquet(made / "truth.parquet")["probability"].to_numpy()
    data = open_dataset(made)
    assert data.truth == truth
    labels = {s: data.load(s).label.numpy() for s in data.splits}
    rows = {"train": slice(0, 8800), "valid": slice(8800, 10000), "test": slice(10000, 12000)}
    for name, which in rows.items():
        best = truth["attainable"][name]
        assert best["auc"] == pytest.approx(roc_auc_score(labels[name], chance[which]), abs=1e-6)
        assert best["logloss"] == pytest.approx(log_loss(labels[name], chance[which].astype(np.float64)), abs=1e-5)
    assert truth["attainable"]["all"]["auc"] > 0.75
    assert truth["click_rate"] == pytest.approx(0.25, abs=0.02)


def test_probabilities_are_calibrated() -> None:
    rows = PlantedModel(3, 0.0002)
    rows.calibrate()
    made = rows.rows(0, 60_000)
    chance = sigmoid(made.logits)
    for low in np.arange(0, 0.9, 0.15):
        group = (chance >= low) & (chance < low + 0.15)
        spread = 4 * np.sqrt(chance[group].mean() / group.sum())
        assert abs(made.labels[group].mean() - chance[group].mean()) < spread + 1e-3


def test_hashes_are_distinct_and_shares_follow_zipf() -> None:
    model = PlantedModel(1, 0.01)
    card = model.cardinality("C3")
    assert card == 101312
    assert len(np.unique(model.hashes("C3", np.arange(card)))) == card
    counts = np.bincount(model.ranks("C3", 0, 200_000), minlength=card + 1)
    assert counts[card] / 200_000 == pytest.approx(0.035, abs=0.003)
    # Which rows are empty has nothing to do with the id they would have had.
    first = (2**-0.05 - 1) / ((card + 1) ** -0.05 - 1)
    assert counts[0] / 200_000 == pytest.approx(0.965 * first, abs=0.004)
    # A bounded Zipf law of exponent 1.05: ten times the rank, 10**-1.05 of the count.
    assert counts[90:110].mean() / counts[9:11].mean() == pytest.approx(10**-1.05, rel=0.2)


def test_settings_in_the_way(made: Path, tmp_path: Path) -> None:
    assert make_synthetic(made, ROWS, 7).already_done
    with pytest.raises(ConfigError, match=r"seed: 7 -> 9"):
        make_synthetic(made, ROWS, 9)
    with pytest.raises(ConfigError, match=r"3 faults[\s\S]*rows[\s\S]*seed[\s\S]*scale"):
        make_synthetic(tmp_path, 1, -1, scale=2)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "s")
    assert main(["data", "synthetic", out, "--rows", "2000", "--seed", "3", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["rows"] == 2000
    assert {"all", "train", "valid", "test"} == set(made["attainable"])
    again = str(tmp_path / "c")
    text = str(tmp_path / "s" / "synthetic.tsv")
    assert (
        main(["data", "criteo", text, again, "--ids", "raw", "--test", "1/4", "--max-memory", "1000MiB", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == {"train": 1300, "valid": 200, "test": 500}
    assert main(["data", "stats", again]) == 0
    shown = capsys.readouterr().out
    assert "C26" in shown
    assert "train: 1,300 rows" in shown
    assert main(["data", "stats", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fields"]["C1"]["distinct"] == 100
    assert main(["data", "criteo", text, again]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["data", "criteo", text, str(tmp_path / "x"), "--test", "7"]) == 2
    assert "`test` must be in [0, 1)" in capsys.readouterr().err
    assert main(["data", "criteo", text]) == 2
    assert "INPUT" in capsys.readouterr().err
