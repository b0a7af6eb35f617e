"""The JSON beside an ONNX graph is enough to make its inputs of raw rows."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import client
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import TYPES, frame_of, model_of, rows, schema, written
from test_criteo import table, text
from test_parity import EVENTS, SCHEMA, encoded

import recsys_embed as rse
from recsys_embed.data import Batch, CriteoOptions, convert_criteo, convert_table, describe_encoders, open_dataset
from recsys_embed.exports import to_onnx


def agree(about: dict[str, Any], batch: Batch, some: list[dict[str, Any]]) -> None:
    dense, ids = client.encode(json.loads(json.dumps(about)), some)
    np.testing.assert_allclose(np.array(dense).reshape(batch.dense.shape), batch.dense.numpy(), rtol=1e-6, atol=1e-6)
    values, offsets = batch.lists.by_feature() if batch.lists is not None else (None, None)
    single = batch.ids.shape[1]
    for b, row in enumerate(ids):
        assert [bag[0] for bag in row[:single]] == batch.ids[b].tolist()
        for f, bag in enumerate(row[single:]):
            at = f * len(ids) + b
            assert bag == values[offsets[at] : offsets[at + 1]].tolist()  # type: ignore[index]


@settings(max_examples=10, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(TYPES)), ids=st.sampled_from(["vocab", "raw"]))
def test_a_client_makes_the_ids_and_numbers(data: st.DataObject, kind: str, ids: str) -> None:
    train, new = (frame_of(kind, data.draw(rows(kind, least))) for least in (6, 1))
    with TemporaryDirectory() as name:
        convert_table(train, Path(name) / "data", schema(ids, data.draw(st.integers(1, 2))))
        model = written(Path(name), open_dataset(Path(name) / "data"))
        about = describe_encoders(model.scorer.stored)  # type: ignore[union-attr]
        for frame in (train, new):
            agree(about, encoded(model, frame), frame.to_dicts())


@pytest.mark.parametrize(("ids", "bits", "dense"), [("vocab", 32, "log"), ("vocab", 64, "bucket"), ("raw", 64, "log")])
def test_a_client_of_criteo(ids: Any, bits: Any, dense: Any, tmp_path: Path) -> None:
    options = CriteoOptions(ids=ids, id_bits=bits, dense=dense, min_count=1)
    convert_criteo(text(table(200, 0, bits), tmp_path / "train.tsv"), tmp_path / "data", options)
    model = written(tmp_path, open_dataset(tmp_path / "data"))
    new = table(50, 1, bits)
    agree(describe_encoders(model.scorer.stored), encoded(model, new), new.to_dicts())  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_graph_and_its_client(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    convert_table(EVENTS, tmp_path / "data", SCHEMA)
    data = open_dataset(tmp_path / "data")
    model = written(tmp_path, data)
    files = to_onnx(model, tmp_path / "model.onnx").files
    assert [f.name for f in files] == ["model.onnx", "model.onnx.json"]
    about = json.loads(files[1].read_text())
    graph = onnxruntime.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"])
    for frame in (EVENTS.head(3), EVENTS, EVENTS.head(1)):
        feed = client.inputs(about, frame.to_dicts())
        assert set(feed) == {i.name for i in graph.get_inputs()}
        types = {i.name: np.float32 if i.type == "tensor(float)" else np.int64 for i in graph.get_inputs()}
        (logits,) = graph.run(None, {name: np.array(values, types[name]) for name, values in feed.items()})
        assert about["score"] == "sigmoid"
        np.testing.assert_allclose(1 / (1 + np.exp(-logits)), model.predict(frame), rtol=1e-4, atol=1e-6)
    # A model that was not loaded takes the folder; one without encoders leaves no such file.
    plain = model_of(data)
    assert len(to_onnx(plain, tmp_path / "model.onnx", encoders=data).files) == 2
    assert plain.scorer is None
    to_onnx(rse.make_embedding("hash", 100, 4, num_buckets=9), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx.json").exists()
