"""First-order weights are served at the precision of the vectors' rows, unless the settings keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema, compress_
from recsys_embed.core.precision import table_bytes
from recsys_embed.train.build import model_from_config
from recsys_embed.train.plans import first_order_bytes, first_order_precision, on_top_of, plans_for
from tests.train.toy import toy_config

SCHEMA = Schema([FeatureSpec("a", 3000, 16), FeatureSpec("b", 700, 16)])
INT8, MIXED = Plan.uniform(SCHEMA, "full", precision="int8"), Plan.uniform(SCHEMA, "full", precision="int8").configs
MIXED = {**MIXED, "b": Plan.uniform(SCHEMA, "full")["b"]}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"method": "full"}, "fp32"),
    ({"method": "full", "method_args": {"precision": "int4"}}, "int4"),
    ({"method": "full", "method_args": {"precision": "int4"}, "first_order_precision": "fp32"}, "fp32"),
    ({"method": "full", "first_order_precision": "int8"}, "int8"),
    ({"method": "hash", "method_args": {"precision": "int2"}, "ratio": 4}, "int2"),
    ({"method": "tiered", "method_args": {"precisions": ["int8", "int2"]}, "ratio": 6}, "int4"),
    ({"method": "tiered", "method_args": {"precisions": ["int8", "dropped"]}, "ratio": 6}, "int8"),
    ({"method": "planned", "method_args": {"precision": "auto"}, "ratio": 10}, "int4"),
    ({"method": "planned", "plan": INT8.to_dict()}, "int8"),
    ({"method": "planned", "plan": Plan(MIXED).to_dict()}, "int4"),
    ({"method": "planned", "plan": Plan.full(SCHEMA).to_dict()}, "fp32"),
]


@pytest.mark.parametrize(("settings", "precision"), CASES)
def test_first_order_weights_follow_the_rows(settings: dict[str, Any], precision: str) -> None:
    config = toy_config(model="deepfm", embedding_dim=16, **settings)
    assert first_order_precision(config) == precision
    plans, narrow = plans_for(SCHEMA, config), SCHEMA.with_dim(1)
    if plans.linear is None:
        assert precision == "fp32"
        return
    assert {t.precision for t in plans.linear.tables(narrow).values()} == {precision}
    vectors, linear = plans.vectors.footprint(SCHEMA).serve, plans.linear.footprint(narrow).serve
    if config.ratio is not None:
        assert vectors + linear <= plans.full_bytes / config.ratio
    if config.plan is not None:
        plan = Plan.from_dict(config.plan)
        assert first_order_bytes(plan, SCHEMA) == on_top_of(SCHEMA, config) == linear
    # The same vectors whatever the precision of the weights beside them.
    kept = plans_for(
        SCHEMA, toy_config(model="deepfm", embedding_dim=16, **{**settings, "first_order_precision": "fp32"})
    )
    assert kept.vectors.configs == plans.vectors.configs


def test_whole_tables_at_four_bits_take_what_their_first_order_weights_take_too(tmp_path: Path) -> None:
    config = toy_config(model="deepfm", embedding_dim=16, method="full", method_args={"precision": "int4"})
    model = model_from_config(config, SCHEMA, 0)
    wanted = sum(table_bytes(s.num_ids, width, "int4") for s in SCHEMA for width in (16, 1))
    assert model.footprint().serve == rse.export(model, tmp_path / "m", prune=False).embedding_bytes == wanted
    assert model.footprint().serve + model.footprint().unrounded == 4 * 17 * 3700


def test_a_share_below_a_block_of_rows_stays_unrounded() -> None:
    narrow = SCHEMA.with_dim(1)
    for budget in (17 * 20, 17 * 4000):
        config = toy_config(model="deepfm", embedding_dim=16, method="hash", budget=budget,
                            method_args={"precision": "int4"})  # fmt: skip
        linear = plans_for(SCHEMA, config).linear
        assert linear is not None
        assert linear.footprint(narrow).serve <= budget // 17
        assert {t.precision for t in linear.tables(narrow).values()} == {"fp32" if budget == 340 else "int4"}


def test_rows_of_one_number_are_rounded_by_compressions_too(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Embedding(3000, 16), "b": nn.Embedding(3000, 1)})
    report = compress_(model, Plan.uniform(Schema.from_model(model), "full", precision="int4"))
    assert report["b"].bytes_after == table_bytes(3000, 1, "int4") < 3000
    assert rse.export(model, tmp_path / "m").embedding_bytes == report.bytes_after
