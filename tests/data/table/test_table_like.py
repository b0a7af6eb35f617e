"""New rows get the ids and numbers that the rows of an old folder have, and a folder works like Criteo's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys_embed.cli import main
from recsys_embed.data import TableSchema, TableSplit, convert_criteo, convert_table, open_dataset
from recsys_embed.errors import ConfigError, DataError

SCHEMA = {
    "columns": {
        "click": {"kind": "label"},
        "user": {"kind": "categorical"},
        "item": {"kind": "categorical", "ids": "raw"},
        "bucket": {"kind": "numeric", "column": "price", "buckets": 5},
        "price": {"kind": "numeric", "standardise": True, "indicator": True},
        "title": {"kind": "vector"},
        "ts": {"kind": "time", "parts": ["hour", "age"]},
        "weight": {"kind": "weight", "column": "w"},
        "group": {"kind": "group", "column": "user"},
    },
    "split": {"kind": "time", "valid": 0.1, "test": 0.2},
}


def events(rows: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    user = rng.integers(0, 30, rows)
    return pl.DataFrame(
        {
            "click": (rng.random(rows) < 0.2 + 0.5 * (user % 2)).astype(np.int8),
            "user": [None if u == 7 else f"u{u}" for u in user],
            "item": rng.integers(0, 2**62, 40)[rng.integers(0, 40, rows)],
            "price": [None if x < 0.1 else float(x) for x in rng.random(rows)],
            "title": pl.Series(rng.random((rows, 3)).astype(np.float32), dtype=pl.Array(pl.Float32, 3)),
            "ts": pl.from_epoch(pl.Series(1_700_000_000 + rng.integers(0, 10**6, rows)), "s"),
            "w": rng.random(rows),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("table") / "out"
    convert_table(events(3000), out, SCHEMA)
    return out


def test_rows_encoded_again_are_equal(folder: Path, tmp_path: Path) -> None:
    old = open_dataset(folder)
    convert_table(events(3000), tmp_path / "new", like=folder, split=old.table_schema.split)  # type: ignore[union-attr]
    new = open_dataset(tmp_path / "new", verify=True)
    assert (new.digest, new.manifest.columns) == (old.digest, old.manifest.columns)
    assert new.schema(8) == old.schema(8)


def test_new_rows_are_a_test_and_may_lack_what_is_not_a_feature(folder: Path, tmp_path: Path) -> None:
    frame = events(500, 1).drop("click", "w")
    report = convert_table(frame.with_columns(user=pl.lit("stranger")), tmp_path / "new", like=folder)
    assert report.rows == {"test": 500}
    assert "no value of 'user' is known" in " ".join(report.notices)
    data = open_dataset(tmp_path / "new")
    batch = data.read("test", 0, 500)
    assert batch.label.isnan().all()
    assert set(batch.extra) == {"group", "time"}
    assert (batch.ids[:, 0] == 0).all()
    assert data.stats["fields"]["user"]["oov_rate"] == {"test": 1.0}
    with pytest.raises(ConfigError, match="column 'price' is not in the table"):
        convert_table(frame.drop("price"), tmp_path / "other", like=folder)


def test_new_rows_of_another_type_are_refused(folder: Path, tmp_path: Path) -> None:
    frame = events(20).with_columns(user=pl.lit(True), item=pl.lit("a"))
    with pytest.raises(ConfigError) as e:
        convert_table(frame, tmp_path / "new", like=folder)
    assert "column 'user': it learned values of type string; got Boolean: cast the column" in str(e.value)
    assert "column 'item': it learned values of type integer; got String" in str(e.value)


def test_one_row_is_encoded_as_the_folder_has_it(folder: Path) -> None:
    data, frame = open_dataset(folder), events(3000).sort("ts", maintain_order=True)
    assert data.table_schema is not None
    row = 17
    first = data.read("train", 0, data.rows("train"))
    at = int((first.extra["time"] == int(frame["ts"][row].timestamp())).nonzero()[0])
    for name in ("user", "item", "bucket"):
        column = data.encoder(name).column
        found = data.encoder(name).encode(frame[column.source].slice(row, 1)).columns[name]
        assert found[0] == int(first.ids[at, data.feature_names.index(name)])
    for name in ("price", "title", "ts"):
        encoded = data.encoder(name).encode(frame[data.encoder(name).column.source].slice(row, 1))
        parts = [x for n, s in encoded.columns.items() if n != "time" for x in np.ravel(s.to_numpy())]
        wanted = [float(first.dense[at, data.manifest.dense.index(d)]) for d in data.encoder(name).dense]
        assert [np.float32(p) for p in parts] == wanted


def test_reading_and_counting(folder: Path) -> None:
    data = open_dataset(folder, verify=True)
    assert data.feature_names == ("user", "item", "bucket")
    assert data.manifest.dense == ("price", "price_missing", "ts_hour", "ts_age", "title[0]", "title[1]", "title[2]")
    assert data.manifest.id_mode == "mixed"
    assert [f.ids for f in data.schema(4)] == ["index", "raw", "index"]
    whole = data.read("train", 0, data.rows("train"))
    for name in ("user", "bucket"):
        counts, column = data.counts(name), whole.ids[:, data.feature_names.index(name)]
        assert counts is not None
        assert counts.tolist() == column.bincount(minlength=len(counts)).tolist()
    assert data.counts("item") is None
    mean, std = data.numeric_moments()
    assert abs(float(mean[0])) < 1e-5
    assert float(std[0]) == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ConfigError, match="unknown column 'usr'"):
        data.encoder("usr")


def test_what_a_manifest_may_not_say(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    schema = json.loads((copy / "schema.json").read_text())
    del schema["columns"][1]["learned"]["missing_count"]
    (copy / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(DataError, match="what was learned lacks 'missing_count'"):
        open_dataset(copy).encoder("user")
    convert_criteo_folder(tmp_path)
    with pytest.raises(ConfigError, match="was not made of a table"):
        convert_table(events(10), tmp_path / "x", like=tmp_path / "criteo")


def convert_criteo_folder(base: Path) -> None:
    (base / "a.tsv").write_text("\t".join(["1", *["2"] * 13, *["0a"] * 26]) + "\n")
    from recsys_embed.data import CriteoOptions, SplitRule

    convert_criteo(base / "a.tsv", base / "criteo", CriteoOptions(split=SplitRule("all", only="train")))


@pytest.mark.parametrize("command", ["named", "schema", "like"])
def test_command_line(folder: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    events(3000).write_parquet(tmp_path / "a.parquet")
    inputs = ["data", "table", str(tmp_path / "a.parquet"), str(tmp_path / "out")]
    if command == "named":
        options = ["--label", "click", "--categorical", "user,item", "--numeric", "price", "--vector", "title",
                   "--time", "ts", "--weight", "w", "--group", "user", "--test", "0.2", "--json"]  # fmt: skip
    elif command == "schema":
        TableSchema.from_dict(SCHEMA).write(tmp_path / "a.toml")
        options = ["--schema", str(tmp_path / "a.toml"), "--valid", "0", "--json"]
    else:
        options = ["--like", str(folder), "--only", "train", "--json"]
    assert main([*inputs, *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sum(rows.values()) == 3000
    if command == "like":
        assert rows == {"train": 3000}
        return
    # The schema's own share of the test holds beside the option.
    assert rows["test"] == pytest.approx(600, abs=5)
    assert ("valid" in rows) == (command == "named")
    assert main(["data", "stats", str(tmp_path / "out")]) == 0
    assert "user" in capsys.readouterr().out
    if command == "named":
        run = ["train", "--data", str(tmp_path / "out"), "--out", str(tmp_path / "run"), "--model", "deepfm",
               "--method", "full", "--batch-size", "128", "--epochs", "8", "--embedding-dim", "8",
               "--learning-rate", "0.01"]  # fmt: skip
        assert main(run) == 0
        out = capsys.readouterr().out
        assert float(out.split("test: AUC ")[1].split()[0]) > 0.6
        assert main(["plan", "--data", str(tmp_path / "out"), "--budget", "1KiB", "--embedding-dim", "8"]) == 0
        assert main(["report", str(tmp_path / "run" / "checkpoint.pt"), "--data", str(tmp_path / "out")]) == 0
        assert "user" in capsys.readouterr().out


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, says in (
        ([], "name the columns"),
        (["--schema", "a.toml", "--label", "y"], "give one of them"),
        (["--like", "a", "--label", "y"], "leave out the options that name columns"),
    ):
        assert main(["data", "table", "a.parquet", str(tmp_path / "out"), *options]) == 2
        assert says in capsys.readouterr().err


def test_a_real_label_has_no_click_rate(tmp_path: Path) -> None:
    schema = TableSchema.from_dict(
        {"columns": {"stars": {"kind": "label", "task": "real"}, "n": {"kind": "numeric"}}, "split": {"kind": "order"}}
    )
    frame = pl.DataFrame({"stars": [1.5, 2.5] * 10, "n": range(20)})
    convert_table(frame, tmp_path / "out", schema, split=TableSplit("all", only="train"))
    stats = open_dataset(tmp_path / "out").stats
    assert stats["splits"]["train"] == {"rows": 20, "click_rate": None, "label_mean": 2.0}


def test_statistics_of_a_shared_vocabulary_are_of_all_its_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A history has many values a row, so shares and values seen once do not go by the number of rows."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "click": rng.integers(0, 2, 60),
            "item": rng.integers(0, 300, 60),
            "seen": [rng.integers(0, 300, 9).tolist() for _ in range(60)],
        }
    )
    columns = {
        "click": {"kind": "label"},
        "item": {"kind": "categorical", "vocab": "item"},
        "seen": {"kind": "list", "vocab": "item"},
    }
    out = tmp_path / "out"
    convert_table(frame, out, {"columns": columns, "split": {"kind": "all", "only": "train"}})
    field = open_dataset(out).stats["fields"]["seen"]
    assert field["occurrences"] == 600
    assert main(["plan", "--data", str(out), "--budget", "1KiB", "--embedding-dim", "4"]) == 0
    assert "one table for item, seen" in " ".join(capsys.readouterr().out.split())


def test_options_of_the_old_files_may_name_columns_that_new_rows_lack(tmp_path: Path) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text("click,zip\n1,01\n0,02\n1,01\n0,02\n")
    new.write_text("zip\n02\n01\n")
    columns = {"click": {"kind": "label"}, "zip": {"kind": "categorical", "min_count": 1}}
    source = {"types": {"click": "integer", "zip": "string"}}
    split = {"kind": "all", "only": "train"}
    convert_table(old, tmp_path / "a", {"columns": columns, "source": source, "split": split})
    convert_table(new, tmp_path / "b", like=tmp_path / "a")
    made, known = open_dataset(tmp_path / "b"), open_dataset(tmp_path / "a").vocabulary("zip")
    ids = dict(zip(known.values, known.ids.tolist(), strict=True))
    assert made.read("test", 0, 2).ids[:, 0].tolist() == [ids["02"], ids["01"]]
    with pytest.raises(ConfigError, match="`types` names 'click', which is no column"):
        convert_table(new, tmp_path / "c", like=tmp_path / "a", options={"types": {"click": "integer"}})
