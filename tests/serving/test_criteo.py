"""Models of Criteo's folders take its text, or tables of its columns, as the conversion took them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tables import written
from test_parity import encoded, same, scores

from recsys_embed.data import CriteoOptions, convert_criteo, open_dataset
from recsys_embed.data.criteo.layout import CAT_NAMES, INT_NAMES
from recsys_embed.data.sources import BadRow, Chunk
from recsys_embed.errors import ConfigError, DataError


def table(rows: int, seed: int, bits: int = 32) -> pl.DataFrame:
    """Rows with blanks, negatives and few values of each field."""
    rng = random.Random(seed)
    columns: dict[str, Any] = {"label": [rng.randrange(2) for _ in range(rows)]}
    for name in INT_NAMES:
        pool = [None, 0, 1, 2, 3, -1, -2, rng.randrange(10**6)]
        columns[name] = pl.Series([rng.choice(pool) for _ in range(rows)], dtype=pl.Int64)
    for i, name in enumerate(CAT_NAMES):
        values = random.Random(i)
        pool = [f"{values.getrandbits(bits):0{bits // 4}x}" for _ in range(1 + i)]
        columns[name] = [rng.choice([*pool, None, f"{rng.getrandbits(bits):x}"]) for _ in range(rows)]
    return pl.DataFrame(columns)


def text(frame: pl.DataFrame, path: Path) -> Path:
    frame.write_csv(path, separator="\t", include_header=False)
    return path


@pytest.mark.parametrize(
    ("ids", "bits", "dense"), [("vocab", 32, "log"), ("vocab", 64, "bucket"), ("raw", 32, "log"), ("raw", 64, "bucket")]
)
def test_rows_of_criteo(ids: Any, bits: Any, dense: Any, tmp_path: Path) -> None:
    convert_criteo(
        text(table(300, 0, bits), tmp_path / "train.tsv"),
        tmp_path / "data",
        CriteoOptions(ids=ids, id_bits=bits, dense=dense, min_count=1),
    )
    data = open_dataset(tmp_path / "data")
    assert data.manifest.to_dict()["version"] == 1
    model = written(tmp_path, data)
    new = table(80, 1, bits)
    file = text(new, tmp_path / "new.tsv")
    convert_criteo(file, tmp_path / "new", CriteoOptions(like=tmp_path / "data"))
    folder = open_dataset(tmp_path / "new")
    batch = torch.cat([folder.read(split, 0, n).ids for split, n in folder.splits.items()])
    whole = encoded(model, new)
    assert torch.equal(whole.ids, batch.long())
    wanted = scores(model, whole)
    same(encoded(model, file), whole)
    tables: dict[str, Any] = {
        "text": file, "several": [file], "no labels": text(new.drop("label"), tmp_path / "plain.txt"),
        "dicts": new.to_dicts(), "any order": new.select(reversed(new.columns)),
        "floats": new.with_columns(pl.col(INT_NAMES).cast(pl.Float64)),
    }  # fmt: skip
    new.write_csv(tmp_path / "header.tsv", separator="\t")
    new.write_parquet(tmp_path / "new.parquet")
    tables |= {"header": tmp_path / "header.tsv", "parquet": tmp_path / "new.parquet"}
    for name, rows in tables.items():
        assert np.array_equal(model.predict(rows), wanted), name


def test_rows_that_are_not_criteos(tmp_path: Path) -> None:
    convert_criteo(text(table(60, 0), tmp_path / "train.tsv"), tmp_path / "data")
    model = written(tmp_path, open_dataset(tmp_path / "data"))
    frame = table(9, 1)
    with pytest.raises(ConfigError, match=r"(?s)'I3' is missing.*'C2': expected hexadecimal text; got Int32"):
        model.predict(frame.drop("I3").with_columns(C2=pl.lit(7)))
    with pytest.raises(DataError, match=r"row 2, column C4: expected up to 8 hexadecimal digits"):
        model.predict(frame.with_columns(C4=pl.Series(["0a", "xyz", *["1"] * 7])))
    for odd in ("a\tb", "a\nb"):
        with pytest.raises(DataError, match="row 3: a value holds a tab or a newline"):
            model.predict(frame.with_columns(C4=pl.Series(["0a", "1", odd, *["1"] * 6])))
    # Rows that a reader left out count.
    left_out = (BadRow(0, 10, "", "", ""), BadRow(0, 12, "", "", ""))
    encoder: Any = model.scorer.encoder
    for value in ("xyz", "a\tb"):
        rows = frame.with_columns(C4=pl.Series(["0a", value, *["1"] * 7]))
        source = encoder.open(rows)
        chunk = Chunk(0, 10, rows.select(encoder.columns), left_out)
        if value == "xyz":
            assert [row.row for row in encoder.encode(source, chunk).bad] == [10, 12, 13]
        else:
            with pytest.raises(DataError, match="row 14: a value holds a tab"):
                encoder.encode(source, chunk)
