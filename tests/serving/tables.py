"""Tables with a column of every kind, nulls anywhere, and models of their folders."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import polars as pl
import torch
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed.data import Dataset
from recsys_embed.models import CTRModel, build_model
from recsys_embed.train import TrainConfig
from recsys_embed.train.build import model_from_config

BIG = 2**53 + 1
NAN = float("nan")
TYPES: dict[str, tuple[pl.DataType, list[Any]]] = {
    "string": (pl.String(), ["", "a", "b", "Zürich", "68fd1e64", "a b", "0", "x" * 300]),
    "int8": (pl.Int8(), [-2, -1, 0, 1, 100]),
    "int64": (pl.Int64(), [0, -1, BIG, BIG + 1, -(2**62), 2**63 - 1]),
    "uint64": (pl.UInt64(), [0, 1, 2**64 - 1, 2**64 - 2, 2**63 + 1]),
    "bool": (pl.Boolean(), [False, True]),
    "date": (pl.Date(), [dt.date(1969, 12, 31), dt.date(2024, 2, 29), dt.date(2030, 1, 1)]),
    "time": (pl.Datetime("ms"), [dt.datetime(1969, 12, 31, 1), dt.datetime(2024, 2, 29, 5, 6, 7, 8000)]),
    "float": (pl.Float64(), [0.0, 1.0, -5.0, NAN, 2.0**53]),
}
PRICES = [NAN, 0.0, -1.5, 1e9, 3.25, -0.0]
MOMENTS = [dt.datetime(2024, 5, 1, 13, 30, 1), dt.datetime(1999, 12, 31, 23, 59, 59)]
VECTORS = [[0.5, -1.0], [1e-20, 3.0]]


def schema(ids: str, min_count: int) -> dict[str, Any]:
    shared = {"vocab": "item", "min_count": min_count} if ids == "vocab" else {"ids": "raw"}
    return {
        "columns": {
            "click": {"kind": "label"},
            "item": {"kind": "categorical", **shared},
            "tags": {"kind": "list", "min_count": min_count},
            "pieces": {"kind": "list", "separator": "|", "values": "integer", "min_count": 1, "column": "text"},
            "seen": {"kind": "sequence", "max_length": 3, "newest": "first", **shared},
            "price": {"kind": "numeric", "transform": "log", "indicator": True},
            "scaled": {"kind": "numeric", "column": "price", "standardise": True, "clip": [-1.0, 100.0], "fill": 7},
            "bucket": {"kind": "numeric", "column": "price", "buckets": 3},
            "ts": {"kind": "time", "parts": ["hour", "weekday", "age", "month", "day"], "event": False},
            "title": {"kind": "vector", "width": 2},
            "weight": {"kind": "weight"},
            "group": {"kind": "group", "column": "user"},
        },
        "split": {"kind": "order", "valid": 0, "test": "1/6"},
    }


def rows(kind: str, least: int) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Rows whose ``item`` and ``seen`` are of a type."""
    value = st.none() | st.sampled_from(TYPES[kind][1])
    tag = st.none() | st.sampled_from(["", "x", "y", "z", "w"])
    fields = {
        "click": st.integers(0, 1),
        "item": value,
        "seen": st.none() | st.lists(value, max_size=5),
        "tags": st.none() | st.lists(tag, max_size=4),
        "text": st.none() | st.sampled_from(["", "1|2", "2||7", " 3 ", "-9|1"]),
        "price": st.none() | st.sampled_from(PRICES),
        "ts": st.none() | st.sampled_from(MOMENTS),
        "title": st.none() | st.sampled_from(VECTORS),
        "weight": st.sampled_from([0.0, 0.5, 2.0]),
        "user": st.none() | st.sampled_from(["u", "v", ""]),
    }
    return st.lists(st.fixed_dictionaries(fields), min_size=least, max_size=30)


def frame_of(kind: str, some: list[dict[str, Any]]) -> pl.DataFrame:
    inner = TYPES[kind][0]
    types = {
        "click": pl.Int16, "item": inner, "seen": pl.List(inner), "tags": pl.List(pl.String), "text": pl.String,
        "price": pl.Float64, "ts": pl.Datetime("us"), "title": pl.List(pl.Float64), "weight": pl.Float64,
        "user": pl.String,
    }  # fmt: skip
    return pl.DataFrame(some, schema=types)


def model_of(data: Dataset, key: str = "dnn", method: str | None = None) -> CTRModel:
    """An untrained model of a folder whose rows differ, with full tables, or by a method at half of their bytes."""
    features = data.schema(4)
    if method in (None, "full"):
        hashed = rse.get_method("hash").config_cls.from_params({"num_buckets": 7})
        full = rse.get_method("full").config_cls()
        plan = rse.Plan({f.name: hashed if f.ids == "raw" else full for f in features})
        linear = {"linear_plan": plan} if rse.models.get_model(key).uses_linear else {}
        sizes: dict[str, Any] = {"hidden": [8]} if key == "dnn" else {}
        made = build_model(key, features, plan, num_dense=data.num_dense, **linear, **sizes)
    else:
        config = TrainConfig(model=key, model_args={"hidden": [8]}, method=method, embedding_dim=4, ratio=2)
        made = model_from_config(config, features, data.num_dense)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.3)
    if data.num_dense and data.splits.get("train"):
        made.standardise(*data.numeric_moments())
    return made.eval()


def written(folder: Path, data: Dataset, **options: Any) -> CTRModel:
    """A model of a data folder, exported with its encoders and loaded again."""
    rse.export(model_of(data), folder / "model.safetensors", encoders=data, **options)
    loaded: Any = rse.load(folder / "model.safetensors")
    return loaded
