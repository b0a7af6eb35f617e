"""Drop-ins whose rows train in few bits: built over weights, shared, turned back, exchanged, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys_embed import Plan, Schema, compress_, make_embedding, materialize_
from recsys_embed.core.program import Initializer, Table
from recsys_embed.core.row_format import RowFormat
from recsys_embed.embedding.shared_tables import SharedTables
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.methods.full import FullEmbedding
from recsys_embed.methods.multihash import MultihashEmbedding
from recsys_embed.methods.unified import UnifiedEmbedding

LPT: dict[str, Any] = {"precision": "int8", "quantization": "lpt"}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("build", ["from_dense", "from_pretrained"])
def test_codes_span_the_weights_that_they_are_built_over(build: str, scale: float) -> None:
    weight = scale * torch.randn(400, 16)
    weight[7, 3] = 9 * scale
    options = {} if build == "from_dense" else {"freeze": False}
    module = getattr(FullEmbedding, build)(weight, **options, **LPT)
    table = module.weight
    assert isinstance(table, LowPrecisionTable)
    assert table.requires_grad
    assert module.footprint().train == table.nbytes == 400 * 16
    error = (table.to_dense() - weight).abs()
    # Steps are powers of two, so that their span may be twice what the largest weight needs.
    assert float(error.max()) <= max(2 * 9 * scale / 128, 2.0**-10)
    assert float(error.max()) <= table.format.step * 1.001


def test_tables_turned_back_are_ordinary_parameters() -> None:
    model = nn.Sequential(nn.Embedding(300, 16))
    compress_(model, Plan.uniform(Schema.from_model(model), "full", **LPT))
    before = model(torch.arange(300)).detach()
    materialize_(model)
    assert type(model[0].weight) is nn.Parameter
    assert model[0].weight.untyped_storage().nbytes() == 300 * 64
    assert torch.equal(model(torch.arange(300)), before)


def test_readers_of_a_shared_table_agree_on_its_rows() -> None:
    described = Table("unified", 100, 4, Initializer("uniform", 0.05), shared=True)
    tables = SharedTables([described])
    UnifiedEmbedding(1000, 16, num_buckets=100, name="a", shared=tables)
    with pytest.raises(ConfigError, match=r"has rows served at fp32; .* needs rows served at int8 that train as"):
        UnifiedEmbedding(1000, 16, num_buckets=100, name="b", shared=tables, **LPT)


def test_tables_are_fitted_before_they_are_rounded() -> None:
    """Rows of two hashes are summed: least squares of rounded iterates would end far from those of float32."""
    weight, options = torch.randn(300, 16), {"num_buckets": 60, "seed": 0}
    exact = MultihashEmbedding.from_dense(weight, **options)
    rounded = MultihashEmbedding.from_dense(weight, **options, precision="int4", quantization="lpt")
    steps = [p.format.step for p in rounded.parameters()]
    best = float((exact.materialize() - weight).square().mean())
    assert float((rounded.materialize() - weight).square().mean()) < best + 2 * max(steps) ** 2 / 12 * 4


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: make_embedding("full", 9, 16, max_norm=1.0, **LPT), "need rows that train unrounded"),
        (lambda: make_embedding("full", 9, 16, scale_grad_by_freq=True, **LPT), "leave `quantization` at 'ptq'"),
        (lambda: make_embedding("full", 9, 16, dtype=torch.bfloat16, **LPT), "got dtype torch.bfloat16: give dtype"),
        (lambda: make_embedding("hash", 9, 16, num_buckets=3, dtype=torch.half, **LPT), "give float32 vectors"),
        (lambda: compress_(half := nn.Sequential(nn.Embedding(300, 16)).half(), uniform(half)), "give float32 vectors"),
    ],
)
def test_what_such_rows_cannot_do_is_refused(build: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build()


def uniform(model: nn.Module) -> Plan:
    return Plan.uniform(Schema.from_model(model), "full", **LPT)


def test_processes_exchange_rows_and_never_add_codes() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        table = LowPrecisionTable.empty(10, 16, RowFormat("int8", 0.5), torch.device("cpu"), seed=0)
        with torch.no_grad():
            table.copy_(torch.arange(160.0).view(10, 16) / 4)
        before, other = table.to_dense(), table.clone()
        for add in (dist.all_reduce, lambda t: dist.reduce(t, 0), lambda t: dist.reduce_scatter(t, [other])):
            with pytest.raises(ConfigError, match=r"cannot add the codes .*; add their values, table\.to_dense\(\)"):
                add(table)
        with pytest.raises(ConfigError, match=r"with tables of its format alone; give table\.to_dense\(\)"):
            dist.all_gather([torch.zeros(10, 16)], table)
        found: Tensor = torch.zeros_like(table.stored)
        dist.broadcast(table, 0)
        dist.all_gather([other], table)
        dist.all_gather([found], table.stored)
    finally:
        dist.destroy_process_group()
    assert torch.equal(table.to_dense(), before)
    assert torch.equal(other.to_dense(), before)
    assert torch.equal(found, table.stored)
