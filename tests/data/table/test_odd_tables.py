"""Tables that are not as one thinks: each is read rightly, or refused in words that name the fault and the way out."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys_embed.data import Batch, TableSchema, convert_table, inspect_table, open_dataset
from recsys_embed.data.table.rows import TableOptions
from recsys_embed.errors import ConfigError, DataError

LABEL = {"kind": "label"}
CATEGORY = {"kind": "categorical", "min_count": 1}
ALL = {"kind": "all", "only": "train"}


def made(table: Any, out: Path, columns: dict[str, Any], **more: Any) -> Any:
    convert_table(table, out, {"columns": columns, "split": ALL, **more})
    return open_dataset(out)


@pytest.mark.parametrize(
    ("values", "positive"),
    [
        ([1.0, 2.0], 1),
        ([1, 2], "1"),
        ([Decimal("1.50"), Decimal("2.00")], "1.5"),
        ([True, False], "True"),
        (["a", "b"], "a"),
    ],
)
def test_positive_is_a_value_and_not_its_spelling(tmp_path: Path, values: list[Any], positive: Any) -> None:
    data = made({"y": values}, tmp_path / "out", {"y": {"kind": "label", "positive": positive}})
    assert data.read("train", 0, 2).label.tolist() == [1, 0]


def test_a_positive_that_no_label_can_be_is_refused(tmp_path: Path) -> None:
    for values, positive in (([1, 2], "one"), ([1.5, 2.5], "one"), ([True, False], "yes")):
        with pytest.raises(ConfigError, match=f"`positive` of .*; got '{positive}'"):
            made({"y": values}, tmp_path / "out", {"y": {"kind": "label", "positive": positive}})


def test_labels_of_one_value_and_splits_without_rows_are_told(tmp_path: Path) -> None:
    table = {"y": ["a", "b"] * 6, "u": [*"aabbccddeeff"]}
    columns = {"y": {"kind": "label", "positive": "z"}, "u": CATEGORY}
    split = {"kind": "last", "column": "u"}
    notices = convert_table(table, tmp_path / "out", {"columns": columns, "split": split}).notices
    assert [n.split(",")[0] for n in notices] == [
        "no row is in split 'valid'", "no row is in split 'test'", "every label of the training rows is 0",
    ]  # fmt: skip


def test_buckets_do_not_take_the_vocabulary_of_others() -> None:
    columns = {"u": {**CATEGORY, "vocab": "price"}, "price": {"kind": "numeric", "buckets": 3}}
    with pytest.raises(ConfigError, match=r"column 'price': a vocabulary of other columns has the name of its buckets"):
        TableSchema.from_dict({"columns": columns})


def test_raw_columns_that_share_ids_hold_one_type(tmp_path: Path) -> None:
    raw = {"kind": "categorical", "ids": "raw", "vocab": "item"}
    table = {"y": [0, 1], "item": [7, 8], "last": ["7|8", "9"]}
    columns = {"y": LABEL, "item": raw, "last": {**raw, "kind": "list", "separator": "|"}}
    with pytest.raises(ConfigError, match="must hold one type of value; got Int64 and String"):
        made(table, tmp_path / "out", columns)
    columns["last"]["values"] = "integer"
    batch = made(table, tmp_path / "out", columns).read("train", 0, 2)
    assert batch.ids.flatten().tolist() == [7, 8]
    assert batch.lists.values.tolist() == [7, 8, 9]


@pytest.mark.parametrize("ids", ["vocab", "raw"])
def test_statistics_are_a_plain_count(tmp_path: Path, ids: str) -> None:
    users = ["a", "a", None, "b", "", "c", "a", None]
    tags: list[Any] = [["x", None], [], None, ["x", "y"], [""], ["z"], ["x"], ["x", "x"]]
    columns = {"y": LABEL, "u": {"kind": "categorical", "ids": ids}, "t": {"kind": "list", "ids": ids}}
    stats = made({"y": [0, 1] * 4, "u": users, "t": tags}, tmp_path / "out", columns).stats["fields"]
    for name, values in (("u", [u or None for u in users]), ("t", [v for row in tags for v in row or () if v])):
        count = Counter(values)
        missing = count.get(None, 0)
        assert stats[name]["missing"] == missing
        assert stats[name]["occurrences"] == len(values)
        assert stats[name]["distinct"] == len(count)
        assert stats[name]["seen_once"] == sum(n == 1 for n in count.values())
        assert stats[name]["coverage"]["1"] == round(max(count.values()) / len(values), 6)
    assert stats["u"]["missing_rate"] == {"train": 0.375}
    assert stats["t"]["missing_rate"] == {"train": 0.25}


def test_a_vector_has_one_width_in_all_parts_and_in_later_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TableOptions, "part_rows", lambda self, row_bytes: 2)
    columns = {"y": LABEL, "v": {"kind": "vector"}}
    vectors = [None, None, [1.0, 2.0], [3.0, 4.0], [5.0], [6.0]]
    with pytest.raises(DataError, match=r"row 5, column v: expected 2 components; got \[5.0\]"):
        made({"y": [0, 1] * 3, "v": vectors}, tmp_path / "out", columns)
    made({"y": [0, 1], "v": vectors[2:4]}, tmp_path / "two", columns)
    with pytest.raises(DataError, match=r"row 1, column v: expected 2 components; got \[5.0\]"):
        convert_table({"v": vectors[4:]}, tmp_path / "like", like=tmp_path / "two")


@pytest.mark.parametrize("name", ["*", "^u.*$"])
def test_names_that_polars_reads_as_patterns_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="has the name of a pattern of names; rename it"):
        made({"y": [0, 1], "user": ["a", "b"], name: ["c", "d"]}, tmp_path / "out", {"y": LABEL, "user": CATEGORY})


def test_long_names_have_short_files(tmp_path: Path) -> None:
    names = ["n" * 300, "n" * 301]
    table = {"y": [0, 1], **{n: ["a", "b"] for n in names}}
    data = made(table, tmp_path / "out", {"y": LABEL, **dict.fromkeys(names, CATEGORY)})
    assert len({f.vocab for f in data.manifest.features}) == 2
    assert data.vocabulary(names[1]).values.to_list() == ["a", "b"]


def test_columns_of_text_are_what_the_schema_makes_of_them(tmp_path: Path) -> None:
    first = "".join(f"{i % 2},{i},,{i}\n" for i in range(200_000))
    (tmp_path / "t.csv").write_text("y,price,empty,item\n" + first + "1,2.5,,7\n")
    columns: dict[str, Any] = {"y": LABEL, "price": {"kind": "numeric"}, "empty": {"kind": "numeric"}, "item": CATEGORY}
    data = made(tmp_path / "t.csv", tmp_path / "out", columns)
    assert data.read("train", 199_999, 200_001).dense.tolist() == [[199_999.0, 0.0], [2.5, 0.0]]
    assert data.vocabulary("item").values.dtype == pl.Int64
    (tmp_path / "u.csv").write_text("y,user\n1,ann\n0,7\n")
    made(tmp_path / "u.csv", tmp_path / "users", {"y": LABEL, "user": CATEGORY})
    (tmp_path / "digits.csv").write_text("user\n7\n8\n")
    convert_table(tmp_path / "digits.csv", tmp_path / "like", like=tmp_path / "users")
    known = open_dataset(tmp_path / "users").vocabulary("user").find(pl.Series(["7", "8"])).to_list()
    assert open_dataset(tmp_path / "like").read("test", 0, 2).ids.flatten().tolist() == known
    assert known[0] > known[1] == 0


def test_files_may_spell_texts_and_times_in_other_ways(tmp_path: Path) -> None:
    frame = pl.DataFrame({"y": [0, 1], "u": ["a", "b"], "ts": [1, 2]}).with_columns(
        pl.col("ts").cast(pl.Datetime("us"))
    )
    frame.write_parquet(tmp_path / "1.parquet")
    other = frame.with_columns(pl.col("u").cast(pl.Categorical), pl.col("ts").cast(pl.Datetime("ns")))
    other.write_parquet(tmp_path / "2.parquet")
    data = made(tmp_path / "*.parquet", tmp_path / "out", {"y": LABEL, "u": CATEGORY, "ts": {"kind": "time"}})
    assert data.read("train", 0, 4).ids.flatten().tolist() == [1, 2, 1, 2]


def test_infinite_numbers_are_clipped_and_fills_fit_a_float(tmp_path: Path) -> None:
    columns = {"y": LABEL, "x": {"kind": "numeric", "clip": [0, 5]}}
    data = made({"y": [0, 1, 1], "x": [1.0, float("inf"), float("nan")]}, tmp_path / "out", columns)
    assert data.read("train", 0, 3).dense.flatten().tolist() == [1, 5, 3]
    with pytest.raises(ConfigError, match="`fill` must be a finite number in"):
        TableSchema.from_dict({"columns": {"x": {"kind": "numeric", "fill": 1e300}}})


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"columns": 3}, "`columns` must be tables of settings"),
        ({"columns": ["user"]}, "a column is its `name`, its `kind` and their settings; got 'user'"),
        ({"columns": {"u": {"kind": ["label"]}}}, "column 'u': unknown kind of column"),
        ({"columns": {"u": {"kind": "categorcal"}}, "splt": {}}, "2 faults in .*\n.*column 'u': .*\n.*mean 'split'"),
        ({"columns": {"u": {"kind": "label", "taks": 1}}}, r"did you mean 'task'.*column 'u', kind label"),
        ({"columns": {"": {"kind": "numeric"}}}, "column '': a name must not be empty"),
        ({"columns": {"t": {"kind": "time", "parts": ["hour", "hour"]}}}, "`parts` names hour more than once"),
        ({"columns": {"u": CATEGORY}, "split": "time"}, "`split` must be settings by name"),
        ({"columns": {"u": CATEGORY}, "split": {"valid": "x", "test": "y"}}, "2 faults in split"),
        (
            {"columns": {"t": {"kind": "time"}}, "split": {"kind": "time", "valid": 0.1, "test_from": "2024-01-01"}},
            "`valid` is a share of rows, `valid_from` and `test_from` are dates",
        ),
        (
            {
                "columns": {"u": CATEGORY},
                "split": {"kind": "column", "column": "u", "values": {"train": [1, 2], "test": 2}},
            },
            "`values` has 2 in train and test",
        ),
    ],
)
def test_schemas_that_are_wrong_are_refused_in_words(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TableSchema.from_dict(schema)


def test_split_columns_of_floats_and_of_lists(tmp_path: Path) -> None:
    table = {"y": [0, 1, 1], "s": [1.0, 2.0, 1.0], "u": [["a"], ["b"], ["c"]]}
    split: dict[str, Any] = {"kind": "column", "column": "s", "values": {"train": 1, "test": 2}}
    assert convert_table(table, tmp_path / "a", {"columns": {"y": LABEL}, "split": split}).rows == {
        "train": 2,
        "test": 1,
    }
    with pytest.raises(ConfigError, match=r"column 'u' of the split holds List\(String\)"):
        convert_table(table, tmp_path / "b", {"columns": {"y": LABEL}, "split": {**split, "column": "u"}})


def test_rows_of_a_missing_user_train(tmp_path: Path) -> None:
    table = {"y": [0, 1] * 5, "u": [*"aaa", "", "", "", None, None, None, None]}
    split = {"kind": "last", "column": "u"}
    report = convert_table(table, tmp_path / "out", {"columns": {"y": LABEL}, "split": split})
    assert report.rows == {"train": 8, "valid": 1, "test": 1}


@pytest.mark.parametrize(
    ("data", "says"), [(b"y,u\r0,a\r1,b\r", "the first lines are no CSV"), (b"PAR1\x15\x04", "is Parquet")]
)
def test_files_that_are_no_csv(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(DataError, match=says):
        made(tmp_path / "t.csv", tmp_path / "out", {"y": LABEL})


def test_a_folder_is_not_written_over_what_it_is_made_of(tmp_path: Path) -> None:
    columns = {"y": LABEL, "u": CATEGORY, "v": {"kind": "vector"}}
    table = {"y": [0, 1], "u": ["a", "b"], "v": [[1.0, 2.0], [3.0, 4.0]]}
    made(table, tmp_path / "out", columns)
    with pytest.raises(ConfigError, match="its schema and vocabularies encode these rows"):
        convert_table(table, tmp_path / "out", like=tmp_path / "out", overwrite=True)
    shard = tmp_path / "out" / "train-000000.parquet"
    with pytest.raises(ConfigError, match="is in it, and would be replaced"):
        convert_table(shard, tmp_path / "out", {"columns": {"label": LABEL}}, overwrite=True)
    # Columns that are null throughout have no type of their own.
    convert_table({"u": [None], "v": [None]}, tmp_path / "like", like=tmp_path / "out")
    assert open_dataset(tmp_path / "like").read("test", 0, 1).dense.tolist() == [[0, 0]]


def test_columns_that_no_kind_takes_are_left_out_of_a_guess() -> None:
    wide = pl.DataFrame({"y": [0, 1], "u": pl.Series([2**100, 1], dtype=pl.Int128), "b": [b"a", b"b"]})
    text = inspect_table(wide).to_toml()
    assert "no kind of column takes Int128" in text
    assert "no kind of column takes Binary" in text


def test_raw_integers_are_themselves_in_rows_of_the_other_sign(tmp_path: Path) -> None:
    raw = {"kind": "categorical", "ids": "raw"}
    columns = {"y": LABEL, "u": raw, "l": {**raw, "kind": "list"}}
    made({"y": [0, 1], "u": [1, 2], "l": [[3], [4]]}, tmp_path / "out", columns)
    big = pl.DataFrame({"u": pl.Series([2**63 + 5, None], dtype=pl.UInt64), "l": pl.Series([[2**64 - 1], []])})
    assert big["l"].dtype == pl.List(pl.UInt64)
    convert_table(big, tmp_path / "like", like=tmp_path / "out")
    batch = open_dataset(tmp_path / "like").read("test", 0, 2)
    assert batch.ids.flatten().tolist() == [-(2**63) + 5, -(2**63)]
    assert batch.lists.values.tolist() == [-1]


def test_a_query_that_fails_is_no_full_disk(tmp_path: Path) -> None:
    query = pl.LazyFrame({"y": ["a"]}).with_columns(pl.col("y").cast(pl.Int64))
    with pytest.raises(DataError, match="the lazy frame cannot be computed"):
        made(query, tmp_path / "out", {"y": LABEL})


def test_no_rows_have_all_parts(tmp_path: Path) -> None:
    columns = {"y": LABEL, "u": CATEGORY, "t": {"kind": "list"}, "w": {"kind": "list"}, "weight": {"kind": "weight"}}
    table = {"y": [0, 1], "u": ["a", "b"], "t": [["x"], []], "w": [["x"], []], "weight": [1.0, 2.0]}
    data = made(table, tmp_path / "out", columns)
    none, whole = data.read("train", 1, 1), data.read("train", 0, 2)
    assert (none.num_rows, none.ids.shape, len(none.lists), none.lists.num_features) == (0, (0, 1), 0, 2)
    assert Batch.cat([none, whole, none]).lists.values.tolist() == whole.lists.values.tolist()
