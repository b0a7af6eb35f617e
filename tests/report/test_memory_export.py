"""The memory report foretells what an export writes, and says the same of the file and of what was loaded from it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.core.precision import Precision
from recsys_embed.errors import CheckpointError
from recsys_embed.exports import export, load
from recsys_embed.report.memory import memory_report

METHODS = rse.list_methods()
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int4")


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_collection(info: rse.MethodInfo, precision: Precision, tmp_path: Path) -> None:
    schema = Schema([FeatureSpec("a", 20_000, 8), FeatureSpec("b", 40, 8), FeatureSpec("c", 5000, 8, pooling="mean")])
    plan = Plan.full(schema) if info.name == "full" else Plan.uniform(schema, info.name, budget="300KiB")
    collection = randomised(rse.EmbeddingCollection(schema, plan))
    report = memory_report(collection, precision=precision)
    written = export(collection, tmp_path / "a.safetensors", precision, search="minmax")
    assert report.total("serve") == written.embedding_bytes
    assert memory_report(plan, schema=schema, precision=precision).total("serve") == written.embedding_bytes
    file = memory_report(tmp_path / "a.safetensors")
    assert file.total("serve", "model") == file.total("serve") == written.embedding_bytes
    size = (tmp_path / "a.safetensors").stat().st_size
    assert abs(size - report.total("serve")) <= 0.01 * size + 4096
    loaded = memory_report(load(tmp_path / "a.safetensors"))
    matrices = sum(p.nbytes for p in (*collection.bundle.projections.parameters(), *collection.bundle.own.parameters()))
    # Matrices are kept in 16 bits and read back to 32.
    assert written.embedding_bytes <= loaded.total("serve") <= written.embedding_bytes + matrices
    assert [t.method for t in loaded.tables] == [t.method for t in report.tables]
    assert all(t.train == t.serve for t in loaded.tables)


@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_file_is_within_a_hundredth(info: rse.MethodInfo, precision: Precision, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if info.name == "full" else {"budget": "1MiB"}
    if info.config_cls.order_option:
        options["order"] = "counts"
    module = randomised(rse.make_embedding(info.name, 30_000, 16, **options))
    export(module, tmp_path / "a.safetensors", precision)
    size = (tmp_path / "a.safetensors").stat().st_size
    assert memory_report(module, precision=precision).total("serve") == pytest.approx(size, rel=0.01)
    file = memory_report(tmp_path / "a.safetensors")
    assert file.total("serve") == memory_report(module, precision=precision).total("serve")
    (table,) = file.tables
    assert (table.method, table.storage.ids, table.storage.width) == (info.name, 30_000, 16)


def test_models_with_other_layers(tmp_path: Path) -> None:
    from recsys_embed.models import build_model

    schema = Schema([FeatureSpec(f"f{i}", 3000, 8) for i in range(3)])
    plan = Plan.uniform(schema, "lowdim", budget="60KiB")
    model = randomised(build_model("deepfm", schema, plan, num_dense=2))
    written = export(model, tmp_path / "a.safetensors", "int8")
    report, file = memory_report(model, precision="int8"), memory_report(tmp_path / "a.safetensors")
    assert report.total("serve") == file.total("serve") == written.embedding_bytes
    assert report.rest.serve == file.rest.serve == written.dense_bytes
    assert {t.method for t in file.tables if t.storage.kind != "shared"} == {"lowdim", "full"}


def test_drop_ins_of_one_name_stay_apart_after_loading(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({n: rse.make_embedding("hash", 3000, 8, num_buckets=100) for n in "ab"})

    export(randomised(make()), tmp_path / "a.safetensors", "fp16")
    loaded = load(tmp_path / "a.safetensors", into=make())
    report = memory_report(loaded)
    assert [t.name for t in report.tables] == ["a", "b"]
    assert report.total("serve") == 2 * 100 * 8 * 2


def test_pruned_rows_are_gone_and_their_index_is_counted(tmp_path: Path) -> None:
    module = rse.make_embedding("full", 4000, 16)
    with torch.no_grad():
        module.weight[torch.rand(4000) < 0.5] = 0.0
    written = export(module, tmp_path / "a.safetensors", "int8")
    for report in (memory_report(tmp_path / "a.safetensors"), memory_report(load(tmp_path / "a.safetensors"))):
        assert report.footprint.weights == sum(t.bytes for t in written.tables)
        assert report.footprint.index == sum(t.index_bytes for t in written.tables) > 0
        assert report.total("serve") < 0.7 * 4000 * 20


def test_pruned_columns_are_gone(tmp_path: Path) -> None:
    module = rse.make_embedding("full", 4000, 16)
    with torch.no_grad():
        module.weight[:, 5:] = 0.0
    export(module, tmp_path / "a.safetensors", "fp32")
    for report in (memory_report(tmp_path / "a.safetensors"), memory_report(load(tmp_path / "a.safetensors"))):
        assert report.total("serve") == 4000 * 5 * 4
        (table,) = report.tables[0].storage.arrays_of("table")
        assert (table.rows, table.width, report.tables[0].storage.width) == (4000, 5, 16)


@pytest.mark.parametrize("change", ["version", "tables", "modules", "text"])
def test_damaged_manifests_are_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.safetensors"
    export(rse.make_embedding("hash", 3000, 8, num_buckets=100), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["recsys_embed"])
    manifest |= {"version": {"version": 99}, "tables": {"tables": {"nope": {}}}, "modules": {"modules": [3]}}.get(
        change, {}
    )
    header["__metadata__"]["recsys_embed"] = "{" if change == "text" else json.dumps(manifest)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        memory_report(path)
