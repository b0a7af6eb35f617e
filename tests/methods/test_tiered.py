"""tiered: rows of frequent ids in more bits, each tier served from a table of its own precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.errors import ConfigError
from recsys_embed.methods.tiered import TieredConfig

TIERS: dict[str, Any] = {"blocks": (5, 20), "precisions": ("int8", "int4", "int2")}


def test_export_keeps_each_tier_at_its_precision(tmp_path: Path) -> None:
    emb = rse.make_embedding("tiered", 100, 16, order="counts", **TIERS)
    counts = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    emb.assign_(counts)
    report = rse.export(emb, tmp_path / "e")
    served = rse.load(tmp_path / "e")
    index = emb.footprint().index
    assert report.embedding_bytes == 5 * 20 + 20 * 12 + 75 * 8 + index == emb.footprint().serve
    ids = torch.arange(100)
    error = (served(ids) - emb(ids)).abs().amax(1) / emb(ids).abs().amax(1)
    by_count = error[counts.argsort(descending=True)].detach()
    # A code lies within half a step of the range, which is at most twice the largest number.
    for tier, levels in ((by_count[:5], 255), (by_count[5:25], 15), (by_count[25:], 3)):
        assert tier.max() < 2 / levels
    assert by_count[:5].max() < by_count[5:25].mean() < by_count[25:].mean()


def test_plans_go_through_json_and_drop_the_tail() -> None:
    schema = Schema([FeatureSpec("item", 100, 16)])
    config = TieredConfig(blocks=(10,), precisions=("fp32", "int4"), dim=8)
    plan = Plan({"item": config})
    assert Plan.from_dict(plan.to_dict()) == plan
    # 10 rows of 8 numbers, 90 of 8 codes of 4 bits behind a scale and a bias, and a matrix of halves.
    assert plan.footprint(schema).serve == 10 * 32 + 90 * 8 + 2 * 8 * 16
    dropped = rse.make_embedding("tiered", 100, 16, blocks=(10,), precisions=("int8", "dropped"))
    assert (dropped.footprint().serve, dropped.footprint().train) == (10 * 20, 10 * 64)
    out = dropped(torch.tensor([9, 10]))
    assert out[0].any()
    assert not out[1].any()
    # A budget below the least row of every id is met by dropping those that it does not pay for.
    small = rse.make_embedding("tiered", 100, 16, precisions=("int8", "int4", "dropped"), budget=300)
    assert small.config.blocks == (4, 18)
    assert small.footprint().serve == 4 * 20 + 18 * 12


def test_wrong_tiers_are_refused() -> None:
    with pytest.raises(ConfigError, match="int9"):
        rse.make_embedding("tiered", 100, 16, precisions=("int9", "int2"), blocks=(10,))
    with pytest.raises(ConfigError, match="blocks"):
        rse.make_embedding("tiered", 100, 16, blocks=(10,))
    with pytest.raises(ConfigError, match="precisions"):
        rse.make_embedding("tiered", 100, 16, precision="int8", **TIERS)
    with pytest.raises(ConfigError, match="dropped"):
        rse.make_embedding("tiered", 100, 16, precisions=("dropped", "int8"), blocks=(10,))
    with pytest.raises(ConfigError, match="at least one tier with rows"):
        rse.make_embedding("tiered", 100, 16, precisions=("dropped",))
    with pytest.raises(ConfigError, match="leave ids"):
        rse.make_embedding("tiered", 100, 16, precisions=("int8", "dropped"), blocks=(100,))


def test_the_report_of_an_export_tells_the_error_of_each_tier_and_a_metric_before_and_after(tmp_path: Path) -> None:
    schema = Schema([FeatureSpec("a", 100, 16), FeatureSpec("b", 60, 16)])
    plan = Plan({"a": TieredConfig(**TIERS), "b": Plan.uniform(schema, "full", precision="int4")["b"]})
    source = rse.EmbeddingCollection(schema, plan)
    ids = torch.stack([torch.arange(60), torch.arange(60)], 1)

    def measure(module: Any) -> float:
        return float(module(ids).detach().square().mean())

    report = rse.export(source, tmp_path / "e", evaluate=measure, metric="power", prune=False)
    served: Any = rse.load(tmp_path / "e")
    assert report.metric is not None
    assert (report.metric.before, report.metric.after) == (measure(source), measure(served))
    assert report.metric.before != report.metric.after
    told = {t.name: t for t in report.tables}
    assert {name: t.kind for name, t in told.items()} == {
        "a.tier_0": "int8", "a.tier_1": "int4", "a.tier_2": "int2", "b.weight": "int4"
    }  # fmt: skip
    for name, table in told.items():
        difference = (served.table(name) - source.table(name)).detach().double()
        assert table.max_error == pytest.approx(float(difference.abs().max()), rel=1e-4)
        assert table.rms_error == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-4)
        assert table.source_bytes == table.rows * 64
    assert all(f"{t.kind}" in line for t in report.tables for line in str(report).splitlines() if t.name in line)
    assert "the precisions of the plan" in str(report)
    assert "power: " in str(report)
