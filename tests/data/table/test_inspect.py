"""The schema that `data inspect` prints converts the table it was guessed from."""

from __future__ import annotations

import json
import random
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from recsys_embed.cli import main
from recsys_embed.data import TableSchema, TableSplit, convert_table, inspect_table, open_dataset
from recsys_embed.errors import DataError

ROWS = 1200


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    rng = random.Random(1)
    items = [rng.randrange(99) + 2**55 for _ in range(ROWS)]
    clicks = [int(rng.random() < 0.3) for _ in range(ROWS)]
    columns = {
        "event_id": range(ROWS),
        "ts": [1_700_000_000_000 + 1000 * i for i in range(ROWS)],
        "user": [f"u{rng.randrange(200)}" for _ in range(ROWS)],
        "item": items,
        "last_items": [rng.choices(items, k=rng.randrange(5)) for _ in range(ROWS)],
        "tags": ["|".join(rng.choices("abc", k=2)) for _ in range(ROWS)],
        "price": [rng.choice([None, rng.lognormvariate(3, 2)]) for _ in range(ROWS)],
        "age": [rng.choice([None, float(rng.randrange(18, 80))]) for _ in range(ROWS)],
        "country": [rng.choice([None, "", "de", "us"]) for _ in range(ROWS)],
        "flag": [rng.random() < 0.5 for _ in range(ROWS)],
        "const": ["x"] * ROWS,
        "w": [1.5] * ROWS,
        "weight": [2.5] * ROWS,
        "session_id": [i // 5 for i in range(ROWS)],
        "paid": [3.0 * c for c in clicks],
        "click": clicks,
        "zip": [rng.choice(["00123", "12345"]) for _ in range(ROWS)],
        "title": [" ".join(rng.choices(["lorem", "ipsum", "dolor", "sit", "amet", "et"], k=9)) for _ in range(ROWS)],
        "when": [datetime(2024, 1, 1) + timedelta(hours=i) for i in range(ROWS)],
        "vec": [[0.5, 1.5, i / 8] for i in range(ROWS)],
        "empty": [None] * ROWS,
    }
    return pl.DataFrame(columns, schema_overrides={"empty": pl.String})


WANTED = {
    "ts": "time", "user": "categorical", "item": "categorical", "last_items": "sequence", "tags": "list",
    "price": "numeric", "age": "numeric", "country": "categorical", "flag": "categorical", "const": "categorical",
    "w": "numeric", "weight": "weight", "group": "group", "click": "label", "zip": "categorical", "when": "time",
    "vec": "vector",
}  # fmt: skip
REMARKS = {
    "event_id": "looks like an id",
    "ts": "timestamp in ms",
    "last_items": "whose vocabulary it shares",
    "tags": "separated by '|'",
    "age": "float that holds integers",
    "const": "constant",
    "w": "constant",
    "paid": "leaks the label",
    "zip": "begin with 0",
    "title": "free text",
    "empty": "every value is missing",
}


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_what_inspect_prints_converts(tmp_path, capsys, events, ending) -> None:
    wanted, remarks = dict(WANTED), dict(REMARKS)
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        events.write_parquet(path)
    elif ending == "jsonl":
        events.write_ndjson(path)
    else:
        flat = events.drop("last_items", "vec").with_columns(pl.col("price").cast(pl.String).fill_null("NULL"))
        flat.write_csv(path, separator=";")
        wanted = {k: v for k, v in wanted.items() if k not in ("last_items", "vec")}
        del remarks["last_items"]
        remarks["price"] = "'NULL' for a missing value"
    found = inspect_table(path)
    assert {c.name: c.kind for c in found.schema.columns} == wanted
    said = {g.name: " ".join(g.remarks) for g in found.guesses}
    for name, words in remarks.items():
        assert words in said[name], name
    assert [n for n, text in said.items() if text and n not in remarks] == []
    assert main(["data", "inspect", str(path)]) == 0
    (tmp_path / "events.toml").write_text(capsys.readouterr().out)
    assert TableSchema.read(tmp_path / "events.toml") == found.schema
    assert main(["data", "table", str(path), str(tmp_path / "out"), "--schema", str(tmp_path / "events.toml")]) == 0
    assert sum(open_dataset(tmp_path / "out").splits.values()) == ROWS


def test_labels(events) -> None:
    def label(**columns) -> dict | None:
        schema = inspect_table(pl.DataFrame(columns)).schema
        return {c.name: c.entry() for c in schema.columns if c.kind == "label"}, schema.label

    u = ["a", "b", "c", "d"] * 30
    assert label(u=u, rating=[1, 5, 3, 4] * 30)[0]["rating"]["threshold"] == 4
    assert label(u=u, target=[-1, 1] * 60)[0]["target"]["threshold"] == 1
    assert list(label(u=u, bought_it=[0, 1, 1] * 40)[0]) == ["bought_it"]
    assert label(u=u, purchase=[0, 1] * 60, click=[0, 1, 1] * 40)[1] == "click"
    found = inspect_table(pl.DataFrame({"u": u, "a": [0, 1] * 60, "b": [True, False] * 60}))
    assert "no column looks like a label" in found.notes[1]


def test_bad_rows_are_told_and_set_aside(tmp_path) -> None:
    lines = [f"{i % 2},{i % 7},{i}.5" for i in range(200)]
    lines[9], lines[20] = "1,2", ",3,4.5"
    (tmp_path / "t.csv").write_text("\n".join(["click,user,price", *lines]))
    found = inspect_table(tmp_path / "t.csv")
    assert "1 rows cannot be read, e.g. " in found.notes[1]
    assert "line 11" in found.notes[1]
    assert "1 bad rows: the label is missing" in found.to_toml()
    report = convert_table(tmp_path / "t.csv", tmp_path / "out", found.schema, on_bad_row="quarantine")
    assert (sum(report.rows.values()), report.quarantined) == (198, 2)


def test_reader_options_are_kept_in_the_schema(tmp_path, capsys) -> None:
    (tmp_path / "u.data").write_text("".join(f"{i % 9}::{i % 5}::{i % 2}\n" for i in range(120)))
    source = ["--source", "format=csv", "--source", "separator=::", "--source", "names=user,item,click"]
    assert main(["data", "inspect", str(tmp_path / "u.data"), *source]) == 0
    (tmp_path / "s.toml").write_text(capsys.readouterr().out)
    assert (
        main(["data", "table", str(tmp_path / "u.data"), str(tmp_path / "o"), "--schema", str(tmp_path / "s.toml")])
        == 0
    )
    assert sum(open_dataset(tmp_path / "o").splits.values()) == 120


def test_a_table_without_a_schema_file_and_rows_like_it_in_another_format(tmp_path) -> None:
    frame = pl.DataFrame({"click": [i % 2 for i in range(120)], "user": [f"u{i % 7}" for i in range(120)]})
    frame.write_csv(tmp_path / "t.txt", include_header=False, separator=";")
    options = ["--source", "format=csv", "--source", "names=click,user", "--source", "separator=;"]
    columns = ["--label", "click", "--categorical", "user"]
    assert main(["data", "table", str(tmp_path / "t.txt"), str(tmp_path / "out"), *columns, *options]) == 0
    frame.write_parquet(tmp_path / "new.parquet")
    for name in ("t.txt", "new.parquet"):
        paths = [str(tmp_path / name), str(tmp_path / f"like_{name}")]
        assert main(["data", "table", *paths, "--like", str(tmp_path / "out")]) == 0
    first, second = (open_dataset(tmp_path / f"like_{name}").read("test", 0, 120) for name in ("t.txt", "new.parquet"))
    assert first.ids.tolist() == second.ids.tolist()


def test_names_that_collide_in_a_folder_are_changed(tmp_path) -> None:
    columns = {
        "a.b": ["x", "y"] * 60, "a_b": ["x", "y", "z"] * 40, "time": [0.5, 1.5] * 60, "vec[0]": [0.5, 2.5] * 60,
        "vec": [[0.5, 1.0]] * 120, "ts": [datetime(2024, 1, 1)] * 120, "ts_hour": [0.25, 0.5] * 60,
        "click": [0, 1, 1, 0, 0] * 24,
    }  # fmt: skip
    found = inspect_table(pl.DataFrame(columns))
    assert [c.source for c in found.schema.columns] == list(columns)
    (tmp_path / "s.toml").write_text(found.to_toml())
    schema = TableSchema.read(tmp_path / "s.toml").replace(split=TableSplit("order"))
    assert sum(convert_table(pl.DataFrame(columns), tmp_path / "out", schema).rows.values()) == 120
    with pytest.raises(DataError, match="no column of the frame can be used"):
        inspect_table(pl.DataFrame({"x": [None, None]}))


def test_json_says_what_the_comments_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pl.DataFrame({"click": [0, 1] * 50, "user": [f"u{i % 9}" for i in range(100)], "one": ["x"] * 100})
    frame.write_parquet(tmp_path / "events.parquet")
    assert main(["data", "inspect", str(tmp_path / "events.parquet"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c.kind for c in TableSchema.from_dict(found["schema"]).columns][:2] == ["label", "categorical"]
    assert {c["column"]: bool(c["warnings"]) for c in found["columns"]}["one"]


def test_a_foreign_dialect_is_told_by_its_marks(tmp_path: Path) -> None:
    """Times that are not ISO 8601, decimal commas, words for missing values and single quotes are told."""
    rows = [
        f"{d:02}.11.2026 23:59;{d % 7},{d};{'NULL' if d % 5 == 0 else 'Österreich'};'a';{d % 2}" for d in range(1, 29)
    ]
    path = tmp_path / "rows.csv"
    path.write_text("at;price;land;word;click\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found = inspect_table([str(path)], options={"separator": ";"})
    text = found.to_toml()
    assert 'format = "%d.%m.%Y %H:%M"' in text
    assert 'decimal = ","' in text
    assert 'nulls = ["NULL"]' in text
    assert 'quote = "\'"' in text
    assert "'Österreich'" in text
