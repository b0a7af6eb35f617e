"""Raw rows give a served file the very ids, numbers and scores that a data folder and its model have."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import TYPES, frame_of, rows, schema, written

from recsys_embed.data import Batch, convert_table, open_dataset
from recsys_embed.models import CTRModel


def encoded(model: CTRModel, table: Any) -> Batch:
    """What a model's encoder makes of rows."""
    encoder: Any = model.scorer.encoder  # type: ignore[union-attr]
    source = encoder.open(table)
    parts = [encoder.encode(source, c) for f in range(len(source.files))
             for c in source.chunks(f, 0, 1 << 16, encoder.columns)]  # fmt: skip
    return Batch.cat([p.batch for p in parts])


def same(found: Batch, wanted: Batch) -> None:
    """Equal bits of all inputs."""
    assert torch.equal(found.ids, wanted.ids.long())
    assert np.array_equal(found.dense.numpy().view(np.int32), wanted.dense.numpy().view(np.int32))
    assert found.vector_places == wanted.vector_places
    assert (found.lists is None) == (wanted.lists is None)
    if found.lists is not None and wanted.lists is not None:
        assert torch.equal(found.lists.values, wanted.lists.values.long())
        assert torch.equal(found.lists.offsets, wanted.lists.offsets)


def scores(model: CTRModel, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        return torch.sigmoid(model(batch.dense, batch.inputs)).numpy()


@settings(max_examples=15, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(TYPES)), ids=st.sampled_from(["vocab", "raw"]))
def test_every_kind_of_column_and_every_null(data: st.DataObject, kind: str, ids: str) -> None:
    train = frame_of(kind, data.draw(rows(kind, 6)))
    new = frame_of(kind, data.draw(rows(kind, 1)))
    with TemporaryDirectory() as name:
        folder = Path(name)
        convert_table(train, folder / "data", schema(ids, data.draw(st.integers(1, 2))))
        old = open_dataset(folder / "data")
        model = written(folder, old)
        for split, frame in (("train", train.head(old.splits["train"])), ("test", train.tail(old.splits["test"]))):
            batch = old.read(split, 0, len(frame))
            same(encoded(model, frame.drop("click", "weight", "user")), batch)
            assert np.array_equal(model.predict(frame), scores(model, batch))
        # Rows that training never saw.
        convert_table(new, folder / "new", like=folder / "data")
        batch = open_dataset(folder / "new").read("test", 0, len(new))
        same(encoded(model, new), batch)
        assert np.array_equal(model.predict(new), scores(model, batch))
        # Row by row, as dictionaries, where a column may be null throughout.
        one = model.predict([new.to_dicts()[0]])
        assert np.array_equal(one, scores(model, open_dataset(folder / "new").read("test", 0, 1)))


EVENTS = pl.DataFrame(
    {
        "click": [0, 1] * 20,
        "user": pl.Series([1, 2, 3, 2**54 + 1, None] * 8, dtype=pl.Int64),
        "zip": ["007", "12", None, "9", "7"] * 8,
        "member": [True, False, None, True] * 10,
        "tags": ["a|b", "", "b|c|a", None] * 10,
        "price": [1.0, 2.5, None, 4.0] * 10,
        "ts": [1_700_000_000 + 1000 * i for i in range(40)],
    }
)
SCHEMA = {
    "columns": {
        "click": {"kind": "label"}, "user": {"kind": "categorical", "min_count": 1},
        "zip": {"kind": "categorical", "min_count": 1}, "member": {"kind": "categorical"},
        "tags": {"kind": "list", "separator": "|", "min_count": 1}, "price": {"kind": "numeric"},
        "ts": {"kind": "time"},
    },
    "split": {"kind": "order", "valid": 0, "test": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[CTRModel, Path]:
    folder = tmp_path_factory.mktemp("served")
    convert_table(EVENTS, folder / "data", SCHEMA)
    return written(folder, open_dataset(folder / "data")), folder


def _hive(frame: pl.DataFrame, folder: Path) -> Path:
    for value, part in enumerate((frame.head(15), frame.slice(15))):
        place = folder / "hive" / f"part={value}"
        place.mkdir(parents=True)
        part.write_parquet(place / "rows.parquet")
    return folder / "hive"


def test_rows_of_any_source_score_alike(served: tuple[CTRModel, Path], tmp_path: Path) -> None:
    model = served[0]
    frame = EVENTS.drop("click")
    wanted = model.predict(frame)
    assert wanted.dtype == np.float32
    assert len(np.unique(wanted)) > 10
    frame.write_csv(tmp_path / "rows.csv")
    frame.filter(pl.col("zip").is_in(["12", "9", "7"])).write_csv(tmp_path / "numbers.csv")
    frame.write_csv(tmp_path / "rows.tsv", separator="\t")
    frame.write_ndjson(tmp_path / "rows.jsonl")
    frame.write_ipc(tmp_path / "rows.arrow")
    tables: dict[str, Any] = {
        "csv": tmp_path / "rows.csv", "tsv": [tmp_path / "rows.tsv"], "json": str(tmp_path / "rows.jsonl"),
        "arrow": tmp_path / "rows.arrow", "hive": _hive(frame, tmp_path), "lazy": frame.lazy(),
        "dicts": frame.to_dicts(), "columns": frame.to_dict(as_series=False),
        "unsigned": frame.with_columns(pl.col("user", "ts").cast(pl.UInt64)),
        "floats": frame.with_columns(pl.col("ts").cast(pl.Float64), pl.col("price").cast(pl.Float32)),
        "times": frame.with_columns(pl.from_epoch("ts")),
        "categories": frame.with_columns(pl.col("zip").cast(pl.Categorical)),
    }  # fmt: skip
    for name, table in tables.items():
        assert np.array_equal(model.predict(table), wanted), name
    # A file whose zip codes all look like numbers.
    known = frame.filter(pl.col("zip").is_in(["12", "9", "7"]))
    same(encoded(model, tmp_path / "numbers.csv"), encoded(model, known))


def test_rows_of_pandas(served: tuple[CTRModel, Path]) -> None:
    pandas = pytest.importorskip("pandas")
    model, frame = served[0], EVENTS.drop("click")
    columns = {name: pandas.Series(frame[name].to_list(), dtype=object) for name in frame.columns}
    columns["user"] = columns["user"].astype("Int64")
    columns["price"] = columns["price"].astype("float64")
    assert np.array_equal(model.predict(pandas.DataFrame(columns)), model.predict(frame))
