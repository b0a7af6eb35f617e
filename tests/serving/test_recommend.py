"""Raw rows are recommended, by name, the items that the model finds for the rows of the data folder."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tables import BIG

import recsys_embed as rse
from recsys_embed.cli import main
from recsys_embed.data import convert_table, open_dataset
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.exports.run_model import model_of_run
from recsys_embed.models import RetrievalModel, build_model
from recsys_embed.train import TrainConfig, run_training
from recsys_embed.typing import BagIds

RNG = np.random.default_rng(0)
NAMES: dict[str, list[Any]] = {
    "string": [f"film {i} é" for i in range(20)],
    "big": [BIG + 7 * i for i in range(20)],
    "unsigned": [2**64 - 2 - i for i in range(20)],
    "date": [dt.date(1969, 12, 20) + dt.timedelta(i) for i in range(20)],
    "time": [dt.datetime(2024, 1, 1, 0, 0, i, 5) for i in range(20)],
}


def events(names: list[Any], rows: int = 300) -> pl.DataFrame:
    item = RNG.integers(0, len(names), rows)
    history = [[names[i] for i in RNG.integers(0, len(names), n)] for n in RNG.integers(0, 6, rows)]
    return pl.DataFrame(
        {
            "user": [f"u{i % 30}" for i in range(rows)],
            "item": pl.Series([names[i] for i in item]),
            "kind": [f"k{i % 3}" for i in item],
            "seen": history,
            "age": RNG.integers(18, 70, rows).astype(float),
            "price": item * 0.5,
        }
    )


SCHEMA: dict[str, Any] = {
    "columns": {
        "user": {"kind": "categorical"},
        "item": {"kind": "categorical", "vocab": "item"},
        "kind": {"kind": "categorical"},
        "seen": {"kind": "sequence", "vocab": "item", "max_length": 3},
        "age": {"kind": "numeric"},
        "price": {"kind": "numeric"},
    },
    "split": {"kind": "order", "valid": 0, "test": "1/5"},
}
TOWERS = {"item": "item", "item_features": ["kind"], "item_numeric": [1], "hidden": [8], "output_dim": 4}


def served(folder: Path, names: list[Any], key: str = "twotower") -> tuple[RetrievalModel, Any, pl.DataFrame]:
    """A model of a table, loaded from its file, its data folder, and the test rows."""
    table = events(names)
    convert_table(table, folder / "data", SCHEMA)
    data = open_dataset(folder / "data")
    args = TOWERS if key == "twotower" else {"max_length": 3, "blocks": 1}
    config = TrainConfig(model=key, model_args=args, loss="sampled_softmax", embedding_dim=8, batch_size=64, steps=5)
    outcome = run_training(config, data, folder=folder / "run", show_progress=False)
    rse.export(outcome.model, folder / "model.safetensors", encoders=data)
    loaded: Any = rse.load(folder / "model.safetensors")
    return loaded, data, table.tail(data.rows("test"))


@pytest.mark.parametrize("kind", NAMES)
def test_raw_rows_get_what_the_model_finds_on_the_folder(kind: str, tmp_path: Path) -> None:
    model, data, rows = served(tmp_path, NAMES[kind])
    batch = next(iter(data.batches("test", 1000, shuffle=False)))
    wanted, scores = model.recommend(batch.dense, batch.inputs, 5)
    # The names of ids, by what the folder made of the very rows.
    named = dict(zip(batch.ids[:, 1].tolist(), rows["item"].to_list(), strict=True))
    vocabulary = pl.read_parquet(next(data.path.glob("vocab/item*.parquet")))
    named |= dict(zip(vocabulary["id"].to_list(), vocabulary["value"].to_list(), strict=True))
    without = rows.drop("item", "kind", "price")
    for given in (rows, without, without.to_dicts(), without.lazy()):
        found = model.recommend(given, k=5)
        assert found.items.tolist() == [[named[i] for i in row] for row in wanted.tolist()]
        assert np.array_equal(found.scores, scores.numpy())
        assert found.scores.dtype == np.float32


def test_items_are_left_out_and_new_values_are_as_for_predict(tmp_path: Path) -> None:
    names = NAMES["string"]
    model, _, rows = served(tmp_path, names)
    users = rows.select("user", "seen", "age").with_columns(mine=pl.lit(names[3]))
    found = model.recommend(users, k=30, exclude=["seen", "mine"], batch_size=7)
    in_catalogue = int(model.in_catalogue.sum())
    for row, items, scores in zip(users.to_dicts(), found.items, found.scores, strict=True):
        out = {*row["seen"], names[3]} & {*names}
        # Histories are cut to the newest 3 as inputs, and excluded whole.
        assert set(items) - {None} == {*names} - out
        assert len(names) == in_catalogue
        assert np.isneginf(scores).tolist() == [item is None for item in items]
    strange = [{"user": "nobody", "seen": ["no film"], "age": None}, {"user": None, "seen": None, "age": None}]
    some = model.recommend(strange, k=2, exclude="seen")
    again = model.recommend([{**strange[0], "user": "zoe", "seen": ["another"]}], k=2)
    assert some.items.shape == (2, 2)
    assert some.items[0].tolist() == again.items[0].tolist()
    assert model.recommend([], k=3).items.shape == (0, 3)


def test_sasrec_needs_the_history_alone(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="reads item, seen"):
        model, data, rows = served(tmp_path, NAMES["string"], "sasrec")
    batch = next(iter(data.batches("test", 1000, shuffle=False)))
    wanted, scores = model.recommend(batch.dense, batch.inputs, 4)
    found = model.recommend(rows.select("seen"), k=4)
    assert np.array_equal(found.scores, scores.numpy())
    ids = model.scorer.encoder.encoders[1].known
    assert found.items.tolist() == [ids.values_of(row).to_list() for row in wanted.numpy()]


def test_items_to_leave_out_as_text(tmp_path: Path, capsys: Any) -> None:
    """Digits as names, histories as delimited text, read from CSV: all that a row names is left out, cut or not."""
    table = events([f"0{i}" for i in range(12)])
    text = table.with_columns(pl.col("seen").list.join("|")).drop("kind", "price")
    text.write_csv(tmp_path / "all.csv")
    columns = {**SCHEMA["columns"], "seen": {**SCHEMA["columns"]["seen"], "separator": "|"}}
    columns = {name: columns[name] for name in text.columns}
    reader = {"types": {"item": "string"}}
    convert_table(tmp_path / "all.csv", tmp_path / "data", {**SCHEMA, "columns": columns, "source": reader})
    data = open_dataset(tmp_path / "data")
    config = TrainConfig(model="twotower", model_args={"hidden": [4], "output_dim": 4}, loss="bpr", embedding_dim=4)
    rse.export(run_training(config, data, show_progress=False).model, tmp_path / "m.safetensors", encoders=data)
    users = text.select("user", "seen", "age", pl.Series("last", [f"0{i % 12}" for i in range(len(text))]))
    users.write_csv(tmp_path / "users.csv")
    args = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "users.csv"), "--top", "12"]
    out = tmp_path / "top.parquet"
    assert main([*args, "--exclude", "seen,last", "--out", str(out)]) == 0, capsys.readouterr().err
    found = pl.read_parquet(out).group_by("row", maintain_order=True).agg("item")
    everything = {f"0{i}" for i in range(12)}
    wanted = [everything - {*(seen or "").split("|"), last} for seen, last in users.select("seen", "last").iter_rows()]
    assert [set(items) for items in found["item"]] == wanted


def test_files_of_recommendations(tmp_path: Path, capsys: Any) -> None:
    names = NAMES["big"]
    model, _, rows = served(tmp_path, names)
    rows.select("user", "seen", "age").write_parquet(tmp_path / "rows.parquet")
    args = ["predict", str(tmp_path / "model.safetensors"), str(tmp_path / "rows.parquet"), "--top", "18"]
    for ending in (".parquet", ".csv"):
        out = tmp_path / f"top{ending}"
        assert main([*args, "--out", str(out), "--keep", "user", "--exclude", "seen", "--batch-size", "16"]) == 0
        assert f"{out}: 60 rows, the best 18 items of each" in capsys.readouterr().out
        written = pl.read_parquet(out) if ending == ".parquet" else pl.read_csv(out)
        wanted = model.recommend(rows, k=18, exclude="seen", batch_size=16)
        assert written.columns == ["user", "row", "rank", "item", "score"]
        there = wanted.items != None  # noqa: E711
        assert written["item"].to_list() == wanted.items[there].tolist()
        assert written["row"].to_list() == np.nonzero(there)[0].tolist()
        assert written["rank"].to_list() == (np.nonzero(there)[1] + 1).tolist()
        assert written["user"].to_list() == rows["user"].gather(np.nonzero(there)[0]).to_list()
        np.testing.assert_allclose(written["score"], wanted.scores[there], rtol=1e-6)
    assert main([*args, "--out", str(tmp_path / "x.parquet"), "--keep", "item"]) != 0
    error = capsys.readouterr().err
    assert "no column 'item' to keep" in error
    assert "column 'item' cannot be kept" in error


def test_what_cannot_be_recommended_is_refused(tmp_path: Path, capsys: Any) -> None:
    model, data, rows = served(tmp_path, NAMES["string"])
    users = rows.select("user", "seen", "age")
    with pytest.raises(ConfigError, match="column 'user' is missing"):
        model.recommend(users.drop("user"), k=2)
    with pytest.raises(ConfigError, match="column 'nothing' is missing"):
        model.recommend(users, k=2, exclude="nothing")
    with pytest.raises(ConfigError, match="column 'day' as categorical: it learned values of type string"):
        model.recommend(users.with_columns(day=dt.date(2024, 1, 1)), k=2, exclude="day")
    with pytest.raises(DataError, match="row 1, column age: infinite"):
        model.recommend(users.with_columns(age=pl.lit(float("inf"))), k=2)
    with pytest.raises(ConfigError, match=rf"`k` is {10**12}, and .* k={len(model.in_catalogue)} finds all"):
        model.recommend(users, k=10**12)
    with pytest.raises(ConfigError, match="raw rows come without ids"):
        model.recommend(users, torch.zeros(1, 1))  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="numeric values need ids"):
        model.recommend(torch.zeros(1, 1))  # type: ignore[call-overload]
    outside: Any = model_of_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="it does not hold what turns raw rows into them"):
        outside.recommend(users, k=2)
    ids = BagIds(torch.tensor([3]), torch.tensor([0, 1]))
    batch = next(iter(data.batches("test", 1, shuffle=False)))
    assert 3 not in model.recommend(batch.dense, batch.inputs, 30, ids)[0]
    out = ["--out", str(tmp_path / "o.parquet")]
    rows.write_parquet(tmp_path / "r.parquet")
    args = ["predict", str(tmp_path / "model.safetensors"), str(tmp_path / "r.parquet"), *out]
    assert main([*args, "--exclude", "seen"]) != 0
    assert "--exclude goes with --top" in capsys.readouterr().err
    assert main([*args, "--top", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top"] == 3
    # Of columns that hold no item to leave out it is told; and no memory is held for items that there are not.
    assert main([*args, "--top", str(10**12), "--exclude", "age", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unknown"] == ["age"]
    assert len(pl.read_parquet(tmp_path / "o.parquet")) == len(rows) * int(model.in_catalogue.sum())


def test_models_and_items_without_names_are_refused(tmp_path: Path, capsys: Any) -> None:
    table = events(NAMES["string"])
    columns = {"user": {"kind": "categorical"}, "age": {"kind": "numeric", "buckets": 4}}
    convert_table(table, tmp_path / "data", {"columns": columns, "split": SCHEMA["split"]})
    data = open_dataset(tmp_path / "data")
    schema = data.schema(4)
    towers: Any = build_model("twotower", schema, rse.Plan.full(schema), num_dense=0, item="age", hidden=(4,))
    rse.export(towers, tmp_path / "towers.safetensors", encoders=data)
    buckets: Any = rse.load(tmp_path / "towers.safetensors")
    with pytest.raises(ConfigError, match="feature 'age' is no category, so that its ids have no names"):
        buckets.recommend(table, k=2)
    buckets.scorer.stored = buckets.scorer.stored.replace(kind="criteo")
    with pytest.raises(ConfigError, match="Criteo's columns have no names of items"):
        buckets.recommend(table, k=2)
    clicks = build_model("dnn", schema, rse.Plan.full(schema), num_dense=0, hidden=(4,))
    rse.export(clicks, tmp_path / "clicks.safetensors", encoders=data)
    table.select("user", "age").write_parquet(tmp_path / "rows.parquet")
    args = [str(tmp_path / "clicks.safetensors"), str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "o.csv")]
    assert main(["predict", *args, "--top", "2"]) != 0
    assert "--top is of retrieval models (twotower, sasrec)" in capsys.readouterr().err
