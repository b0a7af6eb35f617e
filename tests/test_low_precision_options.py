"""Options, plans, bytes and messages of rows that train in few bits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema, make_embedding, plan_for_budget
from recsys_embed.core.row_format import RowFormat
from recsys_embed.errors import ConfigError
from recsys_embed.kernels import dispatch
from recsys_embed.kernels.low_precision_table import LowPrecisionTable

LPT: dict[str, Any] = {"precision": "int8", "quantization": "lpt"}


def schema_of(*rows: int, width: int = 16) -> Schema:
    return Schema([FeatureSpec(f"C{i}", n, width) for i, n in enumerate(rows)])


def test_plain_tables_of_a_plan_train_as_the_others_do() -> None:
    options = {**LPT, "rounding": "nearest", "quantization_step": 2.0**-6}
    schema = schema_of(50_000, 100)
    plan = Plan.uniform(schema, "hash", budget="100KiB", **options)
    assert [c.method for c in plan.configs.values()] == ["hash", "full"]
    for config in plan.configs.values():
        assert {k: getattr(config, k) for k in options} == options
    assert all(isinstance(p, LowPrecisionTable) for p in EmbeddingCollection(schema, plan).parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int8", "rounding": "nearest"}, "`rounding` is for low-precision rows"),
        ({"precision": "int8", "quantization_step": 0.1}, "`quantization_step` is for low-precision rows"),
        ({"precision": "int8", "quantization_step_lr": 0.1}, "`quantization_step_lr` is for low-precision rows"),
        ({**LPT, "quantization_step_lr": 0.1}, "`quantization_step_lr` is for steps that learn"),
        ({"precision": "bf16", "quantization": "lpt", "quantization_step": 0.1}, "is for codes"),
        ({**LPT, "quantization_step": 2.0**-25}, "`quantization_step` must be .*; got 2.98"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_embedding("full", 100, 16, **options)


def test_tables_that_differ_in_how_they_train_are_told_apart() -> None:
    schema = Schema([FeatureSpec(n, 1000, 16) for n in ("a", "b")])
    configs = {
        n: rse.UnifiedConfig(num_buckets=100, **LPT, quantization_step=s) for n, s in (("a", 2.0**-6), ("b", 2.0**-7))
    }
    with pytest.raises(ConfigError, match=r"step=0\.015625.* step=0\.0078125"):
        EmbeddingCollection(schema, Plan(configs))


def test_bytes_of_gradients_are_those_of_torch() -> None:
    schema = schema_of(300, 200)
    for options in (LPT, {"precision": "int4", "quantization": "lpt"}, {"precision": "bf16", "quantization": "lpt"}):
        coll = EmbeddingCollection(schema, Plan.uniform(schema, "full", **options))
        coll(torch.zeros(4, 2, dtype=torch.int64)).sum().backward()
        held = sum(p.grad.nbytes for p in coll.parameters() if p.grad is not None)
        assert coll.footprint().gradient == held == 500 * 64
        assert rse.memory_report(coll).footprint.gradient == held


def test_planners_price_rows_as_they_train() -> None:
    schema = schema_of(100_000)
    plan = plan_for_budget(schema, "3MiB", target="train", optimizer="sgd", methods={"full": LPT})
    assert plan.footprint(schema).train == 100_000 * 16
    assert plan.notes is not None
    assert plan.notes.bytes == 100_000 * 16


def test_a_replaced_storage_of_fewer_rows_is_refused_before_it_is_read() -> None:
    coll = EmbeddingCollection(schema_of(1000), Plan.uniform(schema_of(1000), "full", **LPT))
    module = make_embedding("hash", 1000, 16, num_buckets=500, **LPT)
    for holder, name in ((coll, coll.storages[0]), (module, "weight")):
        table = getattr(holder, name)
        setattr(holder, name, nn.Parameter(table.detach()[:5]))
        ids = torch.full((1, 1), 900) if holder is coll else torch.tensor([900, 17])
        with pytest.raises((ConfigError, IndexError)), torch.no_grad():
            holder(ids)


def test_what_is_assigned_is_rounded_to_nearest_and_nothing_else_moves() -> None:
    for quantization in ("lpt", "alpt"):
        format = RowFormat("int8", 2.0**-6, quantization=quantization)
        table = LowPrecisionTable.empty(200, 16, format, torch.device("cpu"), seed=0)
        table.copy_(torch.randn(200, 16) * 0.3)
        mask = torch.zeros(200, dtype=torch.bool)
        mask[::2] = True
        values = torch.randn(200, 16) * 0.3
        right = torch.where(mask.unsqueeze(1), values, table.to_dense())
        before, columns = table.stored.clone(), torch.arange(16).expand(100, 16)
        for assign in (
            lambda t: t.__setitem__(mask, values[mask]),  # noqa: B023
            lambda t: t.masked_scatter_(mask.unsqueeze(1), values[mask]),  # noqa: B023
            lambda t: t.scatter_(0, torch.arange(0, 200, 2).unsqueeze(1).expand_as(columns), values[mask]),  # noqa: B023
        ):
            with torch.no_grad():
                assign(table)
            assert torch.equal(table.stored[1::2], before[1::2])
            apart = (table.to_dense() - right).abs() / table.distances()
            assert float(apart.max()) <= 0.501
            table.stored.copy_(before)


def test_features_that_a_gpu_leaves_to_torch_are_told(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(dispatch, "choose", lambda *_: "triton")
    with caplog.at_level(logging.INFO):
        made = [
            EmbeddingCollection(
                schema_of(100, 50), Plan.uniform(schema_of(100, 50), "full", **{**LPT, "quantization": quantization})
            )
            for quantization in ("lpt", "lsq")
        ]
    assert [coll.backend for coll in made] == ["triton", "torch"]
    assert "rows are read rounded (`quantization='lsq'`) runs on torch on a GPU" in caplog.text


def test_torchrec_serves_what_trained_in_few_bits(tmp_path: Any) -> None:
    torchrec = pytest.importorskip("torchrec")
    from recsys_embed.sharding import quantised

    schema = Schema([FeatureSpec("C1", 300, 16), FeatureSpec("C2", 40, 16)])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, "full", **LPT)).eval()
    rse.export(coll, tmp_path / "m.safetensors")
    served = quantised(rse.load(tmp_path / "m.safetensors", mmap=False))
    ids = torchrec.KeyedJaggedTensor(["C1", "C2"], torch.tensor([7, 299, 3]), lengths=torch.tensor([1, 1, 1, 0]))
    out = served(ids)
    assert torch.equal(out["C1"], coll.lookup("C1", torch.tensor([7, 299])))


def test_a_low_precision_table_names_its_own_tensors() -> None:
    table = make_embedding("full", 10, 16, **LPT).weight
    with pytest.raises(ConfigError, match="the rows in `stored` hold its values"):
        table.data_ptr()
