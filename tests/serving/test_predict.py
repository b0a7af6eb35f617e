"""Files of rows to files of scores, what is refused, and models of every method."""

from __future__ import annotations

import datetime as dt
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tables import model_of, written
from test_parity import EVENTS, SCHEMA, scores

import recsys_embed as rse
from recsys_embed.cli import main
from recsys_embed.data import TableSchema, convert_table, open_dataset, score_files
from recsys_embed.data.serving import score as score_module
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.models import list_models
from recsys_embed.train import TrainConfig, run_training

ROOT = os.environ.get("RECSYS_EMBED_DATA", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, and an exported model of it."""
    made = tmp_path_factory.mktemp("predict")
    convert_table(EVENTS, made / "data", SCHEMA)
    written(made, open_dataset(made / "data"))
    return made


def test_files_of_scores(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(score_module, "_CHUNK_ROWS", 7)
    for i, part in enumerate((EVENTS.head(25), EVENTS.slice(25))):
        part.write_parquet(tmp_path / f"rows-{i}.parquet")
    model: Any = rse.load(folder / "model.safetensors")
    for ending in (".parquet", ".csv"):
        out = tmp_path / f"scores{ending}"
        args = ["predict", str(folder / "model.safetensors"), str(tmp_path / "rows-*.parquet"), "--out", str(out)]
        assert main([*args, "--keep", "user,zip", "--batch-size", "5"]) == 0
        found = pl.read_parquet(out) if ending == ".parquet" else pl.read_csv(out, schema_overrides={"zip": pl.String})
        assert found.columns == ["user", "zip", "score"]
        assert found["user"].to_list() == EVENTS["user"].to_list()
        assert found["zip"].to_list() == EVENTS["zip"].to_list()
        wanted = model.predict(EVENTS, batch_size=5)
        assert ending == ".csv" or np.array_equal(found["score"].to_numpy(), wanted)
        np.testing.assert_allclose(found["score"], wanted, rtol=1e-5)
        said = capsys.readouterr().out
        assert "columns that were not used: click" in said
        assert "knows no value" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "rows-0.parquet", "rows-1.parquet", "scores.csv", "scores.parquet",
    ]  # fmt: skip


def test_columns_of_which_no_value_is_known_are_told(folder: Path, tmp_path: Path, capsys: Any) -> None:
    EVENTS.with_columns(zip=pl.lit("none"), tags=pl.lit("x|y")).write_csv(tmp_path / "rows.csv")
    args = ["predict", str(folder / "model.safetensors"), str(tmp_path / "rows.csv"), "--out", str(tmp_path / "s.csv")]
    assert main(args) == 0
    assert "the model knows no value of these columns: zip, tags; are they written" in capsys.readouterr().out
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unknown"] == ["zip", "tags"]


def test_a_query_is_scored_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "_CHUNK_ROWS", 7)
    model: Any = rse.load(folder / "model.safetensors")
    scorer = model.scorer
    table = scorer.encoder.open(EVENTS.lazy())
    report = score_files(scorer.encoder, scorer.score(model), table, tmp_path / "s.parquet", 5, keep=["user"])
    found = pl.read_parquet(tmp_path / "s.parquet")
    assert report.rows == len(found) == len(EVENTS)
    assert np.array_equal(found["score"].to_numpy(), model.predict(EVENTS, batch_size=5))
    assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]


def test_no_place_for_temporary_files_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryDirectory", None)
    model: Any = rse.load(folder / "model.safetensors")
    assert len(model.predict(EVENTS)) == len(EVENTS)


def test_rows_are_not_replaced_and_scores_not_read(folder: Path, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "in" / "rows.parquet"
    rows.parent.mkdir()
    EVENTS.write_parquet(rows)
    before = rows.read_bytes()
    (tmp_path / "link.parquet").symlink_to(rows)
    for given, out, told in (
        (rows, rows, "is one of the files of rows and would be replaced"),
        (tmp_path / "link.parquet", rows, "is one of the files of rows"),
        (rows.parent, rows.parent / "scores.parquet", "whose files are read as rows: write it elsewhere"),
        (tmp_path, rows.parent / "deep" / "scores.csv", "whose files are read as rows"),
        (tmp_path / "*" / "r*.parquet", rows.parent / "r2.parquet", "whose files are read as rows"),
    ):
        assert main(["predict", str(folder / "model.safetensors"), str(given), "--out", str(out)]) == 2
        assert told in capsys.readouterr().err
    assert rows.read_bytes() == before
    assert [p.name for p in rows.parent.iterdir()] == ["rows.parquet"]
    # What a folder's reader leaves out may lie in it.
    beside = rows.parent / "_scores" / "s.parquet"
    assert main(["predict", str(folder / "model.safetensors"), str(rows.parent), "--out", str(beside)]) == 0
    assert len(pl.read_parquet(beside)) == len(EVENTS)
    args = ["predict", str(folder / "model.safetensors"), str(rows), "--out", str(tmp_path / "s.csv")]
    (tmp_path / "s.csv.quarantine.jsonl").write_text("of before")
    assert main(args) == 0
    assert (tmp_path / "s.csv.quarantine.jsonl").read_text() == "of before"
    assert main([*args, "--on-bad-row", "quarantine"]) == 0
    assert not (tmp_path / "s.csv.quarantine.jsonl").exists()


def test_why_a_folder_is_not_joined_is_told(folder: Path, tmp_path: Path, capsys: Any) -> None:
    model: Any = rse.load(folder / "model.safetensors")
    stored = model.scorer.stored
    model.scorer = type(model.scorer)(stored.replace(preset="movielens_100k"))
    rse.export(model, tmp_path / "m.safetensors")
    (tmp_path / "in").mkdir()
    EVENTS.write_parquet(tmp_path / "in" / "rows.parquet")
    out = str(tmp_path / "s.parquet")
    assert main(["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "in"), "--out", out]) == 0
    said = capsys.readouterr().err
    assert "reading a table, not the files of movielens_100k" in said
    assert "u.data" in said


def test_bad_rows_fail_or_are_set_aside(folder: Path, tmp_path: Path, capsys: Any) -> None:
    rows = EVENTS.with_columns(price=pl.when(pl.col("ts") == EVENTS["ts"][3]).then(float("inf")).otherwise("price"))
    rows.write_parquet(tmp_path / "rows.parquet")
    model: Any = rse.load(folder / "model.safetensors")
    with pytest.raises(DataError, match=r"row 4, column price: infinite.*leave them out"):
        model.predict(rows)
    out = tmp_path / "scores.parquet"
    out.write_text("what was there")
    args = ["predict", str(folder / "model.safetensors"), str(tmp_path / "rows.parquet"), "--out", str(out)]
    assert main(args) == 2
    assert "row 4, column price: infinite" in capsys.readouterr().err
    assert out.read_text() == "what was there"
    assert main([*args, "--on-bad-row", "quarantine", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["quarantined"], told["output"]) == (39, 1, "probability")
    (line,) = Path(told["quarantine"]).read_text().splitlines()
    assert json.loads(line)["row"] == 4
    wanted = model.predict(EVENTS.filter(pl.col("ts") != EVENTS["ts"][3]))
    assert np.allclose(pl.read_parquet(out)["score"].to_numpy(), wanted)


def test_columns_are_refused_together(folder: Path, tmp_path: Path, capsys: Any) -> None:
    model: Any = rse.load(folder / "model.safetensors")
    wrong = EVENTS.drop("user").with_columns(zip=pl.lit(True), price=pl.lit("cheap"), more=pl.lit(1))
    with pytest.raises(ConfigError) as e:
        model.predict(wrong)
    for text in ("3 faults", "'user' is missing", "'zip' as categorical: it learned values of type string; got Bool",
                 "'price' as numeric: numbers are"):  # fmt: skip
        assert text in str(e.value)
    with pytest.raises(ConfigError, match="`batch_size` must be an integer of at least 1; got 0"):
        model.predict(EVENTS, batch_size=0)
    row = EVENTS.to_dicts()[0]
    assert model.predict([row]).tolist() == model.predict(EVENTS.head(1)).tolist()
    assert len(model.predict(EVENTS.with_columns(more=pl.lit(1)))) == 40
    assert model.predict(EVENTS.head(0)).shape == model.predict([]).shape == (0,)
    EVENTS.write_parquet(tmp_path / "rows.parquet")
    args = ["predict", str(folder / "model.safetensors"), str(tmp_path / "rows.parquet"), "--out"]
    assert main([*args, str(tmp_path / "scores.txt"), "--keep", "nothing"]) == 2
    said = capsys.readouterr().err
    assert "no column 'nothing' to keep" in said
    assert "must end in .parquet or .csv" in said


def test_files_are_read_as_those_of_training_were(tmp_path: Path) -> None:
    rows = EVENTS.select("click", "user", "price", "ts")
    rows.write_csv(tmp_path / "train.txt", include_header=False, separator=";")
    source = {"format": "csv", "separator": ";", "names": rows.columns}
    of = TableSchema.of(label="click", categorical="user", numeric="price", min_count=1, source=source)
    convert_table(tmp_path / "train.txt", tmp_path / "data", of)
    model = written(tmp_path, open_dataset(tmp_path / "data"))
    wanted = model.predict(rows)
    assert np.array_equal(model.predict(tmp_path / "train.txt"), wanted)
    # Files of another format say so by their ending, in a folder too; others are named.
    (tmp_path / "day=1").mkdir()
    rows.write_parquet(tmp_path / "day=1" / "rows.parquet")
    assert np.array_equal(model.predict(tmp_path / "day=1"), wanted)
    rows.drop("click").write_csv(tmp_path / "new.txt", include_header=False, separator=";")
    args = ["predict", str(tmp_path / "model.safetensors"), str(tmp_path / "new.txt"), "--out", str(tmp_path / "s.csv")]
    assert main(args) == 2
    assert main([*args, "--source", "names=user,price,ts"]) == 0
    assert np.allclose(pl.read_csv(tmp_path / "s.csv")["score"].to_numpy(), wanted, rtol=1e-5)


def test_one_row_in_no_list_is_refused(tmp_path: Path) -> None:
    events = pl.DataFrame({"click": [0, 1] * 9, "user": list("abc") * 6, "tags": [["a", "b"], ["b"], []] * 6})
    convert_table(events, tmp_path / "data", TableSchema.of(label="click", categorical="user", list="tags"))
    model: Any = written(tmp_path, open_dataset(tmp_path / "data"))
    wanted = model.predict([{"user": "a", "tags": ["a", "b"]}])
    assert model.predict({"user": ["a"], "tags": [["a", "b"]]}).tolist() == wanted.tolist()
    assert model.predict({"user": [], "tags": []}).shape == (0,)
    for tags in ([], None, ["a"], ["a", "b", "c"]):
        for user in ("a", None, ["a"], ["a", "b", "c"]):
            one: Any = {"user": user, "tags": tags}
            with pytest.raises(ConfigError, match=r"^`rows` is a dict .*: give a list of rows, \[row\], or columns"):
                model.predict(one)
    convert_table(events, tmp_path / "lists", TableSchema.of(label="click", list="tags"))
    (tmp_path / "only").mkdir()
    model = written(tmp_path / "only", open_dataset(tmp_path / "lists"))
    with pytest.raises(ConfigError, match="dict of empty lists, which may be one row or none"):
        model.predict({"tags": []})


@pytest.mark.parametrize(
    ("column", "good", "bad", "told"),
    [
        ("zip", "12", True, "text '12' and row 2 has the boolean True"),
        ("user", 1, "1", "number 1 and row 2 has the text '1'"),
        ("user", 1, True, "number 1 and row 2 has the boolean True"),
        ("price", 2.5, "abc", "number 2.5 and row 2 has the text 'abc'"),
        ("member", True, 1, "boolean True and row 2 has the number 1"),
        ("tags", "a", ["a"], "text 'a' and row 2 has the list"),
        ("ts", 1_700_000_000, dt.date(2024, 1, 1), "number 1700000000 and row 2 has the date"),
    ],
)
def test_a_value_has_its_type_whatever_is_beside_it(
    folder: Path, column: str, good: object, bad: object, told: str
) -> None:
    model: Any = rse.load(folder / "model.safetensors")
    row = {**EVENTS.to_dicts()[0], column: good}
    for rows in (
        [row, {**row, column: bad}],
        pl.DataFrame([row, row]).to_dict(as_series=False) | {column: [good, bad]},
    ):
        with pytest.raises(DataError) as e:
            model.predict(rows)
        assert f"column {column!r}: row 1 has the {told}" in str(e.value)
    # What the model does not read may hold anything, and NaN is missing beside any type.
    odd = [{**row, "click": good}, {**row, "click": bad, column: float("nan")}]
    alone = [model.predict([one]).item() for one in (row, {**row, column: None})]
    np.testing.assert_allclose(model.predict(odd), alone, rtol=1e-6)


def test_a_file_without_encoders_says_how_to_get_them(folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = open_dataset(folder / "data")
    rse.export(model_of(data), tmp_path / "ids.safetensors")
    assert rse.exports.verify(tmp_path / "ids.safetensors")["version"] == 1
    model: Any = rse.load(tmp_path / "ids.safetensors")
    with pytest.raises(ConfigError, match=r"export RUN --data FOLDER.*encoders=open_dataset"):
        model.predict(EVENTS)
    assert main(["predict", str(tmp_path / "ids.safetensors"), "x.parquet", "--out", str(tmp_path / "s.csv")]) == 2
    assert "does not hold what turns raw rows into ids" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="`encoders` go with a model that gives scores"):
        rse.export(rse.make_embedding("hash", 100, 4, num_buckets=9), tmp_path / "e.safetensors", encoders=data)
    other = TableSchema.of(label="click", categorical="zip", min_count=1)
    convert_table(EVENTS, tmp_path / "other", other)
    with pytest.raises(ConfigError, match=r"the model has the features user, zip.*; the data zip"):
        rse.export(model_of(data), tmp_path / "e.safetensors", encoders=tmp_path / "other")
    # What a model was loaded with goes on with it.
    served: Any = rse.load(folder / "model.safetensors")
    report = rse.export(served, tmp_path / "again.safetensors", "int8")
    again: Any = rse.load(tmp_path / "again.safetensors")
    assert report.encoder_bytes > 0
    assert np.allclose(again.predict(EVENTS), served.predict(EVENTS), atol=0.2)
    rse.export(served, tmp_path / "none.safetensors", encoders=False)
    assert rse.exports.verify(tmp_path / "none.safetensors")["version"] == 1


def test_another_conversion_of_the_same_sizes_is_refused(tmp_path: Path, capsys: Any) -> None:
    rows = pl.DataFrame({"click": [0, 1] * 60, "user": list("abc") * 40})
    other = rows.with_columns(pl.col("user").replace({"a": "x"}))
    of = TableSchema.of(label="click", categorical="user", min_count=1)
    convert_table(rows, tmp_path / "data", of)
    convert_table(other, tmp_path / "other", of)
    config = TrainConfig(model="fm", method="full", embedding_dim=2, steps=1, batch_size=16, threads=1)
    run_training(config, open_dataset(tmp_path / "data"), folder=tmp_path / "run", show_progress=False)
    out = tmp_path / "m.safetensors"
    for given in (tmp_path / "other", str(tmp_path / "other"), open_dataset(tmp_path / "other")):
        with pytest.raises(ConfigError, match=r"other is another conversion than .*data\).*: name that folder"):
            rse.export(tmp_path / "run", out, encoders=given)
    assert main(["export", str(tmp_path / "run"), str(out), "--data", str(tmp_path / "other")]) == 2
    assert "another conversion" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "data").rename(tmp_path / "moved")
    assert rse.export(tmp_path / "run" / "model.pt", out, encoders=tmp_path / "moved").encoder_bytes > 0


def test_every_method_and_every_precision(tmp_path: Path) -> None:
    rows = 1200
    events = pl.DataFrame(
        {
            "click": [0, 1] * (rows // 2),
            "user": [f"u{i * i % 397}" for i in range(rows)],
            "tags": [[f"t{i % 101}", f"t{i % 7}"][: i % 3] for i in range(rows)],
            "price": [i / 7 for i in range(rows)],
        }
    )
    columns = {"label": "click", "categorical": "user", "list": "tags", "numeric": "price"}
    convert_table(events, tmp_path / "data", TableSchema.of(**columns, min_count=1))  # type: ignore[arg-type]
    data = open_dataset(tmp_path / "data")
    batch = data.read("train", 0, 500)
    for i, method in enumerate(rse.list_methods()):
        for precision in ("fp32", ("int8", "int4", "fp16", "bf16")[i % 4]):
            rse.export(model_of(data, method=method.name), tmp_path / "m", precision, encoders=data)  # type: ignore[arg-type]
            model: Any = rse.load(tmp_path / "m")
            assert np.array_equal(model.predict(events.head(500)), scores(model, batch)), (method.name, precision)


def test_every_model(folder: Path, tmp_path: Path) -> None:
    data = open_dataset(folder / "data")
    batch = data.read("train", 0, 36)
    tried = 0
    for key in list_models():
        try:
            made = model_of(data, key)
        except ConfigError:
            continue  # one that needs a history
        tried += 1
        rse.export(made, tmp_path / "m", encoders=data, output="value")
        model: Any = rse.load(tmp_path / "m")
        with torch.no_grad():
            assert np.array_equal(model.predict(EVENTS.head(36)), model(batch.dense, batch.inputs).numpy()), key
    assert tried >= 8


def test_values_are_scores_where_the_labels_are_real(tmp_path: Path) -> None:
    real = {**SCHEMA, "columns": {**SCHEMA["columns"], "click": {"kind": "label", "task": "real"}}}  # type: ignore[dict-item]
    convert_table(EVENTS, tmp_path / "data", real)
    data = open_dataset(tmp_path / "data")
    model = written(tmp_path, data)
    batch = data.read("train", 0, 36)
    with torch.no_grad():
        assert np.array_equal(model.predict(EVENTS.head(36)), model(batch.dense, batch.inputs).numpy())


@pytest.mark.skipif(not ROOT, reason="RECSYS_EMBED_DATA is not set")
def test_three_commands_from_a_public_data_sets_files(tmp_path: Path, capsys: Any) -> None:
    files = str(Path(ROOT) / "movielens_100k")
    data, run, model, out = (str(tmp_path / n) for n in ("data", "run", "model.safetensors", "scores.parquet"))
    assert main(["data", "preset", "movielens_100k", files, data]) == 0
    train = ["train", "--data", data, "--method", "hash", "--ratio", "5", "--out", run, "--export", model]
    assert main([*train, "--steps", "30", "--model", "dnn", "--batch-size", "1024"]) == 0
    assert main(["predict", model, files, "--out", out, "--keep", "user,item,rating"]) == 0
    assert "reading the files of movielens_100k" in capsys.readouterr().err
    found = pl.read_parquet(out)
    # The rows of the folder's test split, by their users' and items' ids, have the scores that it gives.
    folder = open_dataset(data)
    served: Any = rse.load(model)
    assert len(found) == sum(folder.splits.values()) == 100_000
    assert 0.3 < found["score"].mean() < 0.8  # type: ignore[operator]
    some = folder.read("test", 0, 2000)
    assert np.isin(scores(served, some).round(5), found["score"].to_numpy().round(5)).all()
    assert json.loads((Path(run) / "run.json").read_text())["data"]["folder"] == str(Path(data).resolve())
    # A run whose folder has moved is exported without, and says so.
    Path(data).rename(tmp_path / "moved")
    assert main(["export", run, str(tmp_path / "bare.safetensors")]) == 0
    assert "is no longer the data that the run was trained on" in capsys.readouterr().out
    assert main(["export", run, model, "--data", str(tmp_path / "moved")]) == 0
    again: Any = rse.load(model)
    assert again.scorer is not None
