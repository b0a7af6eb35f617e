"""What is exported comes back with the same outputs: bit for bit at fp32, within the stated error otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed.export import export, load
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels.precision import Precision
from recsys_embed.plan import Plan
from recsys_embed.registry import MethodInfo, list_methods

PRECISIONS = get_args(Precision)
METHODS = pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)
ROWS, WIDTH = 1500, 12
SCHEMA = Schema(
    [
        FeatureSpec(f"C{i}", n, 8, pooling=p)
        for i, (n, p) in enumerate([(40, "sum"), (900, "mean"), (7, "sum"), (300, "max")])
    ]
)


def make(method: MethodInfo, **options: Any) -> Any:
    budget = {} if method.name == "full" else {"budget": "16KiB"}
    return rse.make_embedding(method.name, ROWS, WIDTH, **budget, **options)


def plan_of(method: MethodInfo) -> Plan:
    return (
        Plan.full(SCHEMA) if method.name == "full" else Plan.uniform(SCHEMA, method.name, budget="16KiB", full_below=10)
    )


def ids_of(schema: Schema, batch: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in schema], 1)


@METHODS
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", [None, "sum", "max"])
def test_every_drop_in(method: MethodInfo, precision: Any, mode: Any, tmp_path: Path) -> None:
    source = make(method, mode=mode, padding_idx=5)
    report = export(source, tmp_path / "e", precision)
    served = load(tmp_path / "e")
    ids = torch.randint(0, ROWS, (30, 4))
    ids[0, :2] = 5
    wanted, got = source(ids).detach(), served(ids)
    assert not served.training
    assert not got.requires_grad
    if precision == "fp32":
        assert torch.equal(got, wanted)
        assert report.max_error == 0
    else:
        spread = {"fp16": 1e-3, "bf16": 1e-2, "int8": 1.5e-2, "int4": 0.25}[precision]
        assert (got - wanted).abs().mean() <= spread * wanted.abs().mean().clamp_min(0.1)
        assert report.max_error > 0
    assert type(served) is type(source)
    assert served.config == source.config
    assert served.spec == source.spec
