"""Consecutive rows that share a scale: fewer bytes, read alike by every backend, told by reports, refused clearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core.precision import Layout
from recsys_embed.errors import ConfigError
from recsys_embed.exports.graph import to_torch_export

HEADS = {"int8": 4, "int4": 4, "int2": 4, "fp8": 2}
BITS = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}


@pytest.mark.parametrize("precision", [*HEADS])
@pytest.mark.parametrize("width", [8, 16, 20, 27])
@pytest.mark.parametrize("rows", [1, 5, 403])
def test_groups_of_rows_have_one_scale(precision: Any, width: int, rows: int, tmp_path: Path) -> None:
    emb = rse.make_embedding("full", rows, width, init="normal:1")
    report = rse.export(emb, tmp_path / "e", precision, search="minmax", prune=False, rows_per_scale=4)
    share = min(4, rows)
    whole = -(-share * width * BITS[precision] // 8)
    assert report.embedding_bytes == -(-rows // share) * (HEADS[precision] + whole)
    table = emb.table("weight").detach()
    ids = torch.randperm(rows)
    served: Any = rse.load(tmp_path / "e")
    out = served(ids)
    assert torch.equal(out, rse.load(tmp_path / "e", backend="torch")(ids))
    # Each group is one long row, rounded as rows of its own width are.
    padded = torch.cat([table, table[-1:].expand(-rows % share, -1)]).view(-1, share * width)
    layout = Layout(precision, share * width)
    wanted = layout.decode(layout.encode(padded)).view(-1, width)
    torch.testing.assert_close(out, wanted[ids], rtol=1e-6, atol=1e-6)
    if precision != "fp8":
        step = (padded.amax(1) - padded.amin(1)).max() / (2 ** BITS[precision] - 1)
        assert report.max_error <= 0.51 * step + 2e-3
    assert served.footprint().serve == report.embedding_bytes == rse.memory_report(tmp_path / "e").total("serve")
    assert rse.memory_report(served).total("serve") == report.embedding_bytes


def test_plans_of_several_precisions_group_the_rows_that_have_scales(tmp_path: Path) -> None:
    schema = Schema([FeatureSpec(name, rows, 16) for name, rows in {"a": 200, "b": 90, "c": 50}.items()])
    kinds = {"a": "int8", "b": "fp32"}
    configs: dict[str, Any] = {n: Plan.uniform(schema, "full", precision=p)[n] for n, p in kinds.items()}
    configs["c"] = rse.get_method("tiered").config_cls.from_params({"blocks": (3, 20)})
    source = EmbeddingCollection(schema, Plan(configs))
    plain = rse.export(source, tmp_path / "plain", prune=False)
    grouped = rse.export(source, tmp_path / "grouped", prune=False, rows_per_scale=8)
    assert {t.name: t.kind for t in plain.tables} == {t.name: t.kind for t in grouped.tables}
    sizes = {t.name: t.bytes for t in grouped.tables}
    assert sizes["a.weight"] == 200 // 8 * (4 + 8 * 16)
    assert sizes["b.weight"] == 90 * 64
    assert sizes["c.tier_2"] == -(-27 // 8) * (4 + 8 * 4)
    ids = torch.stack([torch.arange(9) % s.num_ids for s in schema], 1)
    served: Any = rse.load(tmp_path / "grouped")
    error = max(t.max_error for t in grouped.tables)
    assert (served(ids) - source(ids)).abs().max() <= error * (1 + 1e-5)


def test_rows_without_ids_are_dropped_before_rows_are_grouped(tmp_path: Path) -> None:
    emb = rse.make_embedding("full", 3000, 16)
    gone = torch.rand(3000, generator=torch.Generator().manual_seed(0)) < 0.6
    with torch.no_grad():
        emb.table("weight")[gone] = 0.0
    report = rse.export(emb, tmp_path / "e", "int8", rows_per_scale=4)
    assert report.tables[0].kept_rows == int((~gone).sum())
    out = rse.load(tmp_path / "e")(torch.arange(3000))  # type: ignore[operator]
    assert not out[gone].any()
    assert (out - emb(torch.arange(3000))).abs().max() <= report.max_error


def test_graphs_read_groups(tmp_path: Path) -> None:
    emb = rse.make_embedding("full", 403, 16)
    rse.export(emb, tmp_path / "e", "int4", rows_per_scale=4)
    served: Any = rse.load(tmp_path / "e")
    ids = torch.arange(12) * 33
    to_torch_export(served, tmp_path / "g.pt2", (ids,), check=False)
    program = torch.export.load(tmp_path / "g.pt2").module()
    torch.testing.assert_close(program(torch.arange(403)), served(torch.arange(403)))


def test_what_cannot_be_grouped_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    emb = rse.make_embedding("full", 100, 16)
    for wrong in (0, 65, True, 2.0):
        with pytest.raises(ConfigError, match="rows_per_scale"):
            rse.export(emb, tmp_path / "e", "int8", rows_per_scale=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is for rows with a scale"):
        rse.export(emb, tmp_path / "e", rows_per_scale=2)
    trained = rse.make_embedding("full", 100, 16, precision="int8", quantization="lpt")
    with pytest.raises(ConfigError, match="trained with their scales"):
        rse.export(trained, tmp_path / "e", rows_per_scale=2)
    assert not (tmp_path / "e").exists()
    assert rse.export(trained, tmp_path / "e", "int4", rows_per_scale=2).embedding_bytes == 50 * 20


@pytest.mark.parametrize("method", ["full", "tiered"])
def test_torchrec_reads_them(method: str, tmp_path: Path) -> None:
    pytest.importorskip("torchrec")
    from recsys_embed.sharding import quantised

    schema = Schema([FeatureSpec("a", 403, 16), FeatureSpec("b", 90, 16)])
    options: dict[str, Any] = {"precision": "int4"} if method == "full" else {"blocks": (3, 20)}
    rse.export(EmbeddingCollection(schema, Plan.uniform(schema, method, **options)), tmp_path / "e")
    rse.export(rse.load(tmp_path / "e"), tmp_path / "g", rows_per_scale=4)
    ids = torch.stack([torch.arange(80), torch.arange(80)], 1)
    for name in "eg":
        served: Any = rse.load(tmp_path / name)
        torch.testing.assert_close(quantised(served)(ids).values(), served(ids).flatten(1), rtol=1e-6, atol=1e-6)
