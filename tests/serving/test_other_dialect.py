"""Files that are written in another way than those that were learned from are refused, not read as unknown values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tables import written

import recsys_embed as rse
from recsys_embed.cli import main
from recsys_embed.data import convert_table, open_dataset
from recsys_embed.errors import ConfigError

USERS = ["ann", "bob", "zoë"]
ROWS = pl.DataFrame(
    {
        "click": [0, 1, 1] * 4,
        "user": USERS * 4,
        "tags": ["red|blue", "red", "blue|green"] * 4,
    }
)


def schema(ids: str, names: bool) -> dict[str, Any]:
    own = {"ids": ids} if ids == "raw" else {"min_count": 1}
    columns = {
        "click": {"kind": "label"},
        "user": {"kind": "categorical", **own},
        "tags": {"kind": "list", "separator": "|", **own},
    }
    source = {"names": ["click", "user", "tags"]} if names else {}
    return {"columns": columns, "split": {"kind": "all", "only": "train"}, "source": {"separator": ",", **source}}


@pytest.fixture(scope="module", params=["vocab", "raw", "vocab, no header"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    made = tmp_path_factory.mktemp("dialect")
    ids, _, headless = request.param.partition(", ")
    ROWS.write_csv(made / "a.csv", include_header=not headless)
    convert_table(made / "a.csv", made / "data", schema(ids, bool(headless)))
    written(made, open_dataset(made / "data"))
    return made


def text(header: bool, separator: str = ",", inside: str = "|", cell: Callable[[str], str] = str) -> str:
    lines = [["click", "user", "tags"]] if header else []
    lines += [[str(c), u, t.replace("|", inside)] for c, u, t in ROWS.rows()]
    return "".join(separator.join(map(cell, line)) + "\n" for line in lines)


CASES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "semicolons": ({"separator": ";"}, "separator=';'", ["separator=;"]),
    "tabs": ({"separator": "\t"}, r"separator='\t'", ["separator=\\t"]),
    "bars": ({"separator": "|", "inside": ";"}, "separator='|'", ["separator=|", "lists.tags=;"]),
    "blanks": ({"separator": ", "}, "separator=', '", ["separator=, "]),
    "quotes": ({"cell": lambda c: f"'{c}'"}, 'quote="\'"', ["quote='"]),
    "lists": ({"inside": ";"}, "lists.tags=';'", ["lists.tags=;"]),
}


@pytest.mark.crossed
@pytest.mark.parametrize("case", CASES)
def test_refused_until_named(folder: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    how, says, options = CASES[case]
    header = (folder / "a.csv").read_text().startswith("click")
    if case == "blanks" and open_dataset(folder / "data").manifest.features[0].vocab is None:
        pytest.skip("of raw ids nothing says that blanks are not theirs")
    path = tmp_path / "new.csv"
    path.write_text(text(header, **how))
    named = [word for option in options for word in ("--source", option)]
    like = ["data", "table", str(path), str(tmp_path / "new"), "--like", str(folder / "data")]
    predict = ["predict", str(folder / "model.safetensors"), str(path), "--out", str(tmp_path / "s.parquet")]
    for command in (like, predict):
        assert main(command) == 2
        assert says in capsys.readouterr().err.replace("\n", " ")
        assert main([*command, *named]) == 0
    old, new = (open_dataset(f) for f in (folder / "data", tmp_path / "new"))
    a, b = old.read("train", 0, 12), new.read("test", 0, 12)
    assert a.ids.tolist() == b.ids.tolist()
    assert a.lists is not None
    assert b.lists is not None
    assert a.lists.values.tolist() == b.lists.values.tolist()
    model: Any = rse.load(folder / "model.safetensors")
    wanted = model.predict(folder / "a.csv")
    assert np.array_equal(pl.read_parquet(tmp_path / "s.parquet")["score"], wanted)


def test_text_lists_of_frames(folder: Path, tmp_path: Path) -> None:
    frame = ROWS.with_columns(pl.col("tags").str.replace_all("|", ";", literal=True))
    model: Any = rse.load(folder / "model.safetensors")
    for use in (
        lambda: convert_table(frame, tmp_path / "new", like=folder / "data"),
        lambda: model.predict(frame),
        lambda: model.predict(frame.lazy()),
        lambda: model.predict(frame.to_dicts()),
    ):
        with pytest.raises(ConfigError, match=r"(?s)'red;blue' is unknown|most hold ';'.*give lists, or '\|'"):
            use()
    lists = frame.with_columns(pl.col("tags").str.split(";"))
    assert np.array_equal(model.predict(lists), model.predict(ROWS))


def test_values_that_hold_another_separator_are_no_fault(tmp_path: Path) -> None:
    """Rows that taught a folder are encoded again, whatever rare values they have."""
    frame = pl.DataFrame({"click": [0, 1, 1] * 4, "tags": ["a;b", "a", "b", "Rock, Pop"] * 3}).extend(
        pl.DataFrame({"click": [1], "tags": ["b;a"]})
    )
    columns = {"click": {"kind": "label"}, "tags": {"kind": "list", "separator": "|"}}
    convert_table(frame, tmp_path / "old", {"columns": columns, "split": {"kind": "all", "only": "train"}})
    convert_table(frame, tmp_path / "new", like=tmp_path / "old")
    old, new = (open_dataset(tmp_path / n).read(s, 0, 13).lists for n, s in (("old", "train"), ("new", "test")))
    assert old is not None
    assert new is not None
    assert old.values.tolist() == new.values.tolist()


def test_a_schema_whose_separator_no_value_holds_is_told(tmp_path: Path) -> None:
    made = convert_table(ROWS, tmp_path / "out", schema("vocab", False) | {"source": {}})
    assert not made.notices
    other = ROWS.with_columns(pl.col("tags").str.replace_all("|", ";", literal=True))
    made = convert_table(other, tmp_path / "other", schema("vocab", False) | {"source": {}})
    assert "no value of the first rows holds the separator '|', and most hold ';'" in " ".join(made.notices)


def test_encoding_and_header(tmp_path: Path) -> None:
    columns = {"click": {"kind": "label"}, "user": {"kind": "categorical", "min_count": 1}}
    source = {"encoding": "cp1252", "names": ["click", "user"], "header": True}
    whole = {"columns": columns, "split": {"kind": "all", "only": "train"}, "source": source}
    lines = "".join(f"{c},{u}\n" for c, u, _ in ROWS.rows())
    (tmp_path / "old.csv").write_text("y,name\n" + lines, encoding="cp1252")
    convert_table(tmp_path / "old.csv", tmp_path / "old", whole)
    for name, head, encoding, says, named in (
        ("a.csv", "y,name\n", "utf-8", "it is UTF-8, and cp1252 is what was read before", {"encoding": "utf-8"}),
        ("b.csv", "", "cp1252", "which would be left out as a header, holds values", {"header": False}),
    ):
        (tmp_path / name).write_text(head + lines, encoding=encoding)
        with pytest.raises(ConfigError, match=says):
            convert_table(tmp_path / name, tmp_path / "new", like=tmp_path / "old")
        convert_table(tmp_path / name, tmp_path / "new", like=tmp_path / "old", options=named, overwrite=True)
        old, new = (open_dataset(tmp_path / f).read(s, 0, 12).ids for f, s in (("old", "train"), ("new", "test")))
        assert old.tolist() == new.tolist()
    (tmp_path / "c.csv").write_text("click,user\n" + lines)
    with pytest.raises(ConfigError, match="the first line holds the names of the columns: --source header=true"):
        convert_table(tmp_path / "c.csv", tmp_path / "c", {**whole, "source": {"names": ["click", "user"]}})


def test_two_separators_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,5;2,5;7\n" * 9)
    columns = {"c1": {"kind": "numeric"}, "c2": {"kind": "numeric"}, "c3": {"kind": "label", "positive": 7}}
    made = {"columns": columns, "split": {"kind": "all", "only": "train"}}
    with pytest.raises(ConfigError, match=r"3 fields each by ',' and by ';'; say which it is"):
        convert_table(tmp_path / "a.csv", tmp_path / "out", made)
    convert_table(tmp_path / "a.csv", tmp_path / "out", {**made, "source": {"separator": ";", "decimal": ","}})
    assert open_dataset(tmp_path / "out").read("train", 0, 1).dense.tolist() == [[1.5, 2.5]]
