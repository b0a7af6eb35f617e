"""Numbers where texts were learned are their decimals, however the rows come; what they cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tables import written

import recsys_embed as rse
from recsys_embed.data import convert_table, open_dataset
from recsys_embed.errors import ConfigError, DataError

NUMBERS = [0, 1, 2**53 + 1, -7, 2.5, 1e-7, 3.0, None]
TEXTS = ["0", "1", str(2**53 + 1), "-7", "2.5", "0.0000001", "3", None]
KNOWN = [*TEXTS, "ann", "x"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"user": t, "tags": [t, "x"]} for t in TEXTS],
    "numbers and texts": [{"user": n, "tags": [n, "x"]} for n in NUMBERS],
    "integers": [{"user": n, "tags": [n]} for n in NUMBERS[:4]],
    "floats": [{"user": float(n), "tags": [float(n)]} for n in (0, 1, -7, 2.5, 1e-7, 3)],
}
WANTED: dict[str, list[dict[str, Any]]] = {
    "texts": ROWS["texts"],
    "numbers and texts": ROWS["texts"],
    "integers": [{"user": t, "tags": [t]} for t in TEXTS[:4]],
    "floats": [{"user": t, "tags": [t]} for t in ("0", "1", "-7", "2.5", "0.0000001", "3")],
}


@pytest.fixture(scope="module", params=["vocab", "raw"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    own = {"min_count": 1} if request.param == "vocab" else {"ids": "raw"}
    made = tmp_path_factory.mktemp("texts")
    columns = {"y": {"kind": "label"}, "user": {"kind": "categorical", **own}, "tags": {"kind": "list", **own}}
    frame = pl.DataFrame({"y": [0, 1] * 5, "user": KNOWN, "tags": [[t] for t in KNOWN]})
    convert_table(frame, made / "data", {"columns": columns, "split": {"kind": "all", "only": "train"}})
    written(made, open_dataset(made / "data"))
    return made


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def forms(kind: str, rows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """The rows in every form that can hold them."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    found = {"dicts": rows, "columns": columns, "lines": lines(path.with_suffix(".jsonl"), rows)}
    if kind != "numbers and texts":
        frame = pl.DataFrame(rows)
        frame.write_parquet(path.with_suffix(".parquet"))
        found |= {"frame": frame, "lazy": frame.lazy(), "parquet": path.with_suffix(".parquet")}
    return found


@pytest.mark.parametrize("kind", ROWS)
def test_equal_to_the_texts(folder: Path, tmp_path: Path, kind: str) -> None:
    model: Any = rse.load(folder / "model.safetensors")
    wanted = model.predict(pl.DataFrame(WANTED[kind], schema={"user": pl.String, "tags": pl.List(pl.String)}))
    assert len(np.unique(wanted)) > 2
    for name, rows in forms(kind, ROWS[kind], tmp_path / "rows").items():
        assert np.array_equal(model.predict(rows), wanted), name
        if name not in ("dicts", "columns") or kind == "texts":
            if name == "dicts":
                continue
            convert_table(rows, tmp_path / "new", like=folder / "data", overwrite=True)
            data = open_dataset(tmp_path / "new")
            batch = data.read("test", 0, len(wanted))
            encoded = model.predict(rows)
            with_folder = model(batch.dense, batch.inputs).sigmoid().detach().numpy()
            assert np.array_equal(encoded, with_folder), name


@pytest.mark.parametrize(
    ("value", "says"),
    [(True, "learned values of type string; got Boolean"), ([1], "got List"), (1e400, "infinity is no")],
)
def test_what_is_no_text(folder: Path, tmp_path: Path, value: Any, says: str) -> None:
    model: Any = rse.load(folder / "model.safetensors")
    rows = [{"user": value, "tags": ["x"]}] * 2
    sources: list[Callable[[], Any]] = [
        lambda: model.predict(rows),
        lambda: convert_table(pl.DataFrame(rows), tmp_path / "new", like=folder / "data"),
    ]
    if value != 1e400:  # JSON has no infinity
        sources.append(lambda: model.predict(lines(tmp_path / "rows.jsonl", rows)))
    for use in sources:
        with pytest.raises((ConfigError, DataError), match=says):
            use()


def test_lists_and_objects_in_a_column_of_text(folder: Path, tmp_path: Path) -> None:
    """Polars writes them down as texts; they are bad rows."""
    good: list[Any] = ["ann", "[x", 7]
    path = lines(tmp_path / "a.jsonl", [{"user": u, "tags": ["x"]} for u in [*good, [1], {"a": 1}]])
    with pytest.raises(DataError, match=r"(?s)line 4, column user: not String.*line 5, column user: not String"):
        convert_table(path, tmp_path / "new", like=folder / "data")
    path = lines(tmp_path / "b.jsonl", [{"user": u, "tags": ["x", {"a": 1}]} for u in good])
    with pytest.raises(DataError, match=r"line 1, column tags: not List\(String\)"):
        convert_table(path, tmp_path / "new", like=folder / "data")


def test_numbers_that_lost_their_zeros_are_refused(tmp_path: Path) -> None:
    frame = pl.DataFrame({"y": [0, 1] * 4, "zip": ["00501", "10001"] * 4})
    columns = {"y": {"kind": "label"}, "zip": {"kind": "categorical"}}
    convert_table(frame, tmp_path / "data", {"columns": columns, "split": {"kind": "all", "only": "train"}})
    written(tmp_path, open_dataset(tmp_path / "data"))
    model: Any = rse.load(tmp_path / "model.safetensors")
    (tmp_path / "a.csv").write_text("zip\n501\n10001\n")
    says = "'501' is unknown, and '00501' is known: give texts, which keep their zeros"
    for rows in ([{"zip": 501}], pl.DataFrame({"zip": [10001, 501]}), tmp_path / "a.csv"):
        with pytest.raises(ConfigError, match=says):
            model.predict(rows)
    with pytest.raises(ConfigError, match=says):
        convert_table(tmp_path / "a.csv", tmp_path / "new", like=tmp_path / "data")
    assert len(model.predict([{"zip": 10001}, {"zip": 77}])) == 2


def test_weights_that_are_all_zero_are_told(tmp_path: Path) -> None:
    frame = pl.DataFrame({"y": [0, 1] * 4, "n": range(8), "w": [0.0] * 7 + [1.0]})
    columns = {"y": {"kind": "label"}, "n": {"kind": "numeric"}, "w": {"kind": "weight"}}
    for valid, told in ((0.25, True), (0, False)):
        split = {"kind": "order", "valid": valid, "test": 0}
        made = convert_table(frame, tmp_path / "out", {"columns": columns, "split": split}, overwrite=True)
        assert any("the weight of every training row is 0" in notice for notice in made.notices) == told


def test_integers_that_no_float_holds_are_not_read_as_floats(tmp_path: Path) -> None:
    columns = {"y": {"kind": "label"}, "item": {"kind": "categorical", "min_count": 1}}
    frame = pl.DataFrame({"y": [0, 1], "item": [2**53, 2**53 + 1]})
    convert_table(frame, tmp_path / "data", {"columns": columns, "split": {"kind": "all", "only": "train"}})
    written(tmp_path, open_dataset(tmp_path / "data"))
    model: Any = rse.load(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=f"column 'item': row 1 has the integer {2**53 + 1}, which no float holds"):
        model.predict([{"item": 2**53 + 1}, {"item": 1.0}])
    assert len(model.predict([{"item": 2**53 + 1}, {"item": NAN}])) == 2


NAN = float("nan")
