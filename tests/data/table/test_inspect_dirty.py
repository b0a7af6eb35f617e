"""What `data inspect` says of columns that hold a few values of another kind, and that its schema converts them."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from recsys_embed.data import TableSchema, convert_table, inspect_table

ROWS = 400


@pytest.fixture(scope="module")
def dirty() -> dict[str, list]:
    rng = random.Random(3)
    columns = {
        "clicked?": [rng.choice(["yes", "No"]) for _ in range(ROWS)],
        "dwell (s)": [str(rng.randrange(10, 900)) for _ in range(ROWS)],
        "tempo_bpm": [str(rng.uniform(60, 180)) for _ in range(ROWS)],
        "event time": [str(datetime(2024, 1, 1) + timedelta(minutes=i)) for i in range(ROWS)],
        "seen at": [str(1_700_000_000 + i) for i in range(ROWS)],
        "session": [f"s{rng.randrange(ROWS)}" for _ in range(ROWS)],
        "item_id": [str(rng.randrange(30)) for _ in range(ROWS)],
    }
    for at, (name, bad) in enumerate(
        [("dwell (s)", "n.a."), ("tempo_bpm", "fast"), ("event time", "soon"), ("seen at", "then"), ("item_id", "x")]
    ):
        columns[name][3 + at] = bad
    columns["tempo_bpm"][90] = "NULL"
    return columns


def test_columns_of_numbers_and_times_but_for_a_few(tmp_path: Path, dirty: dict[str, list]) -> None:
    path = tmp_path / "t.csv"
    pl.DataFrame(dirty).write_csv(path)
    found = inspect_table(path)
    kinds = {c.source: c.kind for c in found.schema.columns}
    assert kinds == {
        "clicked?": "label", "dwell (s)": "numeric", "tempo_bpm": "numeric", "event time": "time", "seen at": "time",
        "session": "categorical", "item_id": "categorical",
    }  # fmt: skip
    assert found.schema.split.kind == "time"
    said = {g.name: " ".join(g.remarks) for g in found.guesses}
    for name, bad in (("dwell (s)", "n.a."), ("tempo_bpm", "fast"), ("event time", "soon"), ("seen at", "then")):
        assert (
            f"99.75 % of the values are {'times' if bad == 'soon' else 'numbers'}; others, e.g. '{bad}'" in said[name]
        )
        assert "--on-bad-row quarantine" in said[name]
    assert 'nulls = ["n.a."]' in said["dwell (s)"]
    assert "categories of their own" in said["item_id"]
    assert "looks like an id: " in said["session"]
    assert found.schema.source["types"]["seen at"] == "integer"
    assert found.schema.source["nulls"] == ["NULL"]
    (tmp_path / "s.toml").write_text(found.to_toml())
    schema = TableSchema.read(tmp_path / "s.toml")
    report = convert_table(path, tmp_path / "out", schema, on_bad_row="quarantine")
    assert (sum(report.rows.values()), report.quarantined) == (ROWS - 4, 4)


def test_below_the_share_it_is_text(tmp_path: Path) -> None:
    cells = [str(i + 0.5) if i % 10 else "cheap" for i in range(ROWS)]
    pl.DataFrame({"click": [0, 1] * (ROWS // 2), "price": cells}).write_csv(tmp_path / "t.csv")
    assert {c.name: c.kind for c in inspect_table(tmp_path / "t.csv").schema.columns}["price"] == "categorical"


def test_json_lines_and_a_label_with_a_fault(tmp_path: Path) -> None:
    rows = [f'{{"click": {i % 2}, "price": {i + 0.5}, "code": "{i % 9}"}}' for i in range(ROWS)]
    rows[5] = '{"click": "?", "price": 3.5, "code": "4"}'
    rows[8] = '{"click": 1, "price": "free", "code": "4"}'
    (tmp_path / "t.jsonl").write_text("\n".join(rows) + "\n")
    found = inspect_table(tmp_path / "t.jsonl")
    assert {c.name: c.kind for c in found.schema.columns} == {
        "click": "label",
        "price": "numeric",
        "code": "categorical",
    }
    report = convert_table(tmp_path / "t.jsonl", tmp_path / "out", found.schema, on_bad_row="quarantine")
    assert report.quarantined == 2
