"""Schemas: written and read back as TOML, built of names, and all of their faults told at once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import polars as pl
import pytest

from recsys_embed.data import TableSchema, TableSplit, convert_table
from recsys_embed.data.columns import KINDS, LATER
from recsys_embed.data.table import learn
from recsys_embed.errors import ConfigError, UnknownNameError

TOML = """
label = "click"

[columns.click]
kind = "label"

[columns."like it"]
kind = "label"
threshold = 4

[columns.item]
kind = "categorical"
vocab = "item"
min_count = 5

[columns.seen]
kind = "sequence"
column = "last items"
vocab = "item"
min_count = 5
max_length = 20

[columns.price]
kind = "numeric"
transform = "log"
clip = [0.5, 100.0]

[columns.ts]
kind = "time"
parts = ["hour", "age"]
format = "%d/%m/%Y\\t\\u007f"

[split]
kind = "time"
test_from = 2024-04-01T12:00:00
valid_from = 2024-03-01

[source]
separator = ";"
"""


def test_toml_round_trip(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    schema = TableSchema.read(tmp_path / "a.toml")
    assert schema.split == TableSplit("time", valid_from="2024-03-01", test_from="2024-04-01T12:00:00")
    shares = TableSplit("time", test=Fraction(1, 5))
    assert TableSplit.from_dict({"kind": "time", "test": "1/5"}) == shares
    assert TableSplit.from_dict(shares.to_dict()) == shares
    schema.write(tmp_path / "b.toml")
    assert TableSchema.read(tmp_path / "b.toml") == schema
    assert TableSchema.from_dict(schema.to_dict()) == schema
    assert [c.name for c in schema.used] == ["click", "item", "seen", "price", "ts"]


def test_names_build_the_schema_that_toml_builds(tmp_path: Path) -> None:
    named = TableSchema.of(
        label="click", categorical=["user", "item.id"], weight="w", group="user", time="ts", min_count=1
    )
    named.write(tmp_path / "a.toml")
    assert TableSchema.read(tmp_path / "a.toml") == named
    assert [(c.name, c.source) for c in named.columns] == [
        ("click", "click"), ("user", "user"), ("item_id", "item.id"), ("ts", "ts"), ("weight", "w"), ("group", "user"),
    ]  # fmt: skip


def test_all_faults_of_columns_at_once() -> None:
    with pytest.raises(ConfigError) as e:
        TableSchema.from_dict(
            {
                "columns": {
                    "a": {"kind": "categorical", "min_count": 0, "max_size": 0},
                    "b": {"kind": "categorial"},
                    "c": {"kind": "numeric", "clip": [2, 1]},
                    "d": {"kind": "text"},
                    "e": {"kind": "cross"},
                    "f": {"kind": "numeric", "transfrom": "log"},
                    "g": {},
                },
                "split": {"kind": "last"},
            }
        )
    for part in (
        "8 faults", "`min_count` must be an integer >= 1", "`max_size`", "did you mean 'categorical'", "`clip`",
        "n-gram features", "cross features", "did you mean 'transform'", "column 'g' lacks a `kind`", "needs `column`",
    ):  # fmt: skip
        assert part in str(e.value)


def test_faults_of_columns_together() -> None:
    with pytest.raises(ConfigError) as e:
        TableSchema.from_dict(
            {
                "columns": [
                    {"name": "a", "kind": "label"},
                    {"name": "b", "kind": "label"},
                    {"name": "x", "kind": "categorical", "vocab": "v", "min_count": 3},
                    {"name": "y.z", "kind": "list", "vocab": "v"},
                    {"name": "weight", "kind": "numeric"},
                    {"name": "x", "kind": "numeric"},
                    {"name": "ts", "kind": "time"},
                    {"name": "ts_hour", "kind": "numeric"},
                    {"name": "v[3]", "kind": "numeric"},
                    {"name": "w1", "kind": "weight"},
                    {"name": "w2", "kind": "weight"},
                ]
            }
        )
    for part in (
        "several columns are labels (a, b): choose one with `label`",
        "columns of vocabulary 'v' must have one `min_count`; got x 3, y.z 2",
        "column 'y.z': a feature's name must not contain '.' or '#'",
        "column 'weight': that name is the folder's own",
        "column 'x' is given 2 times",
        "one weight column; got w1, w2",
        "columns ts, ts_hour would both become 'ts_hour'",
        "column 'v[3]': a name that ends in a number in brackets",
    ):
        assert part in str(e.value)


def test_faults_of_the_table_at_once(tmp_path: Path) -> None:
    frame = pl.DataFrame({"s": [{"a": 1}], "t": ["x"], "l": [[1]], "n": ["1"], "f": [1.5]})
    columns = {
        "s": {"kind": "categorical"}, "t": {"kind": "list"}, "l": {"kind": "categorical"}, "n": {"kind": "numeric"},
        "gone": {"kind": "numeric"}, "f": {"kind": "group"}, "v": {"kind": "vector", "column": "t"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as e:
        convert_table(frame, tmp_path / "out", {"columns": columns})
    for part in (
        "7 faults", "column 's' as categorical", "name the `separator`", "column 'l' as categorical",
        "numbers are integers", "column 'gone' is not in the table", "column 'f' as group", "column 't' as vector",
    ):  # fmt: skip
        assert part in str(e.value)


def test_kinds_that_come_later_have_no_code() -> None:
    assert not KINDS.keys() & LATER.keys()


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"a": {"kind": "categorical", "ids": "raw", "min_count": 3}}, "`min_count` is of a vocabulary"),
        ({"a": {"kind": "numeric", "buckets": 4, "indicator": True}}, "`indicator` does not go with `buckets`"),
        ({"a": {"kind": "label", "threshold": 1.0, "positive": 1}}, "not both"),
        ({"a": {"kind": "time", "time_zone": "Berlin"}}, "`time_zone` must be an IANA name"),
        ({"a": {"kind": "list", "values": "integer"}}, "`values` is of delimited text"),
        ({}, "a schema needs columns"),
    ],
)
def test_settings_that_do_not_go_together(columns: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TableSchema.from_dict({"columns": columns})


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'columns'"):
        TableSchema.from_dict({"colums": {}, "columns": {"a": {"kind": "label"}}})
    with pytest.raises(ConfigError, match="no kind of column is called categories"):
        TableSchema.of(label="a", categories="b")
    (tmp_path / "a.toml").write_text("[columns")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        TableSchema.read(tmp_path / "a.toml")
    with pytest.raises(ConfigError, match="give a schema, or the folder `like`"):
        convert_table({"a": [1]}, tmp_path / "out")


def test_a_vocabulary_must_fit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "DISTINCT_BYTES", 1 << 30)
    schema = TableSchema.of(categorical="item", split={"kind": "all", "only": "train"})
    with pytest.raises(ConfigError, match=r"vocabulary 'item' has more than 1 values(.|\n)*raise --max-memory"):
        convert_table({"item": ["a", "b"]}, tmp_path / "out", schema)


def test_columns_of_one_vocabulary_hold_one_type(tmp_path: Path) -> None:
    frame = pl.DataFrame({"item": [1, 2], "seen": ["1,2", "2"]})
    columns = {
        "item": {"kind": "categorical", "vocab": "item"},
        "seen": {"kind": "list", "vocab": "item", "separator": ","},
    }
    with pytest.raises(ConfigError, match=r'one type of value; got Int64 and String(.|\n)*`values = "integer"`'):
        convert_table(frame, tmp_path / "out", {"columns": columns, "split": {"kind": "all", "only": "train"}})
