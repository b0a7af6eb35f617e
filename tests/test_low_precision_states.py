"""What state dicts hold of rows that train in few bits, who may read them, and copies that train on."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema, make_embedding
from recsys_embed.core import config_state
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import CheckpointError
from recsys_embed.kernels.low_precision_states import STORED_ROWS
from recsys_embed.kernels.low_precision_table import LowPrecisionTable

IDS = torch.arange(300)


def drop_in(method: str = "full", init: str = "normal:1", **options: Any) -> CompressedEmbedding:
    options = {"precision": "int8", "quantization": "lpt", **options}
    if method == "hash":
        options = {"num_buckets": 40, **options}
    return make_embedding(method, 300, 16, init=init, **options)


def collection(init: str = "normal:1", seed: int = 0) -> EmbeddingCollection:
    schema = Schema([FeatureSpec("C1", 300, 16, init=init), FeatureSpec("C2", 50, 16, init="normal:4")])
    return EmbeddingCollection(schema, Plan.uniform(schema, "full", precision="int8", quantization="lpt"), seed=seed)


def vectors(module: nn.Module) -> Tensor:
    if isinstance(module, EmbeddingCollection):
        return module.lookup("C1", IDS)
    return module(IDS)


def saved(module: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


def tables(module: nn.Module) -> list[LowPrecisionTable]:
    return [p for p in module.parameters() if isinstance(p, LowPrecisionTable)]


def as_written_before(module: nn.Module) -> dict[str, Tensor]:
    """The state of versions that did not save the distance of codes; of a full table it was its rows alone."""
    state = {k: v.squeeze(1) if v.dim() == 3 else v for k, v in module.state_dict().items()}
    identity = config_state.unpack(state["_extra_state"], "")
    del identity[STORED_ROWS]
    state["_extra_state"] = config_state.pack(identity)
    if getattr(module, "config", None) is not None and module.config.method == "full":
        del state["_extra_state"]
    return state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("build", [drop_in, lambda init="normal:1": drop_in("hash", init), collection])
def test_codes_keep_their_distance_wherever_they_are_loaded(build: Any, assign: bool) -> None:
    trained, other = build(), build(init="normal:0.01")
    before = vectors(trained).detach().clone()
    assert tables(other)[0].format.step != tables(trained)[0].format.step
    other.load_state_dict(saved(trained), assign=assign)
    assert torch.equal(vectors(other), before)
    assert [t.format for t in tables(other)] == [t.format for t in tables(trained)]
    table = tables(other)[0]
    weights = table.to_dense()
    vectors(other).square().sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.05).step()
    moved = table.to_dense() - (weights - 0.05 * table.grad).clamp(-128 * table.format.step, 127 * table.format.step)
    assert float(moved.abs().max()) <= table.format.step * 1.001
    earlier = build()
    earlier.load_state_dict(as_written_before(trained), assign=assign)
    assert torch.equal(vectors(earlier), before)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_are_refused_by_what_reads_them_as_weights(kind: str) -> None:
    state = drop_in(precision=kind).state_dict()
    plain = make_embedding("full", 300, 16)
    before = plain(IDS).detach().clone()
    with pytest.raises(CheckpointError, match="quantization: saved 'lpt', here None"):
        plain.load_state_dict(state, strict=False)
    for width in (16, state["weight"].shape[-1]):
        with pytest.raises(RuntimeError, match="size mismatch"):
            nn.Embedding(300, width).load_state_dict(state, strict=False)
    assert torch.equal(plain(IDS), before)
    # The numbers of 16 bits are the weights.
    halves = drop_in(precision="bf16")
    torch_module = nn.Embedding(300, 16)
    torch_module.load_state_dict(halves.state_dict(), strict=False)
    assert torch.equal(torch_module(IDS), halves(IDS))


def test_a_collection_whose_tables_stand_otherwise_refuses_the_rows() -> None:
    def of(*inits: str) -> EmbeddingCollection:
        schema = Schema([FeatureSpec(f"C{i}", 30, 16, init=init) for i, init in enumerate(inits)])
        return EmbeddingCollection(schema, Plan.uniform(schema, "full", precision="int8", quantization="lpt"))

    state = of("normal:1", "normal:1", "normal:0.01").state_dict()
    other = of("normal:1", "normal:0.01", "normal:1")
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in state.items()}
    with pytest.raises(CheckpointError, match="give each feature the `init` that it had"):
        other.load_state_dict(state)
    of("normal:0.01", "normal:0.01", "normal:1").load_state_dict(state)


def test_tables_are_built_on_any_default_device() -> None:
    with torch.device("meta"):
        assert tables(drop_in("hash"))[0].device.type == "meta"


def test_steps_and_writes_that_move_no_row_are_none() -> None:
    table = tables(drop_in(precision="int4"))[0]
    before = table.stored.clone()
    with torch.no_grad():
        table.data.add_(0.0)
        table[torch.zeros(300, dtype=torch.bool)] = 1.0
    assert torch.equal(table.stored, before)


def test_a_load_that_fails_leaves_rows_and_their_distance() -> None:
    module, other = drop_in(init="normal:0.01"), drop_in()
    before = module(IDS).clone()
    state = other.state_dict()
    state["weight"] = state["weight"][:7]
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(state)
    assert torch.equal(module(IDS), before)


def test_weights_assigned_to_such_rows_are_stored_as_they_are() -> None:
    module = drop_in(init="normal:0.05")
    weights = torch.randn(300, 16) * 0.05
    module.load_state_dict({"weight": weights}, assign=True)
    (table,) = tables(module)
    assert table.stored.dtype is torch.uint8
    assert float((module(IDS).detach() - weights).abs().max()) <= table.format.step / 2 * 1.001


@pytest.mark.parametrize("build", [drop_in, collection])
def test_steps_through_data_round_anew_each_time(build: Any) -> None:
    """Steps of 1/100 of a code move rows in the mean, whichever view of them the optimizer writes."""
    module = build()
    table = tables(module)[0]
    step = table.format.step
    for view in (lambda: table.data, table.detach, lambda: table.data[:300]):
        with torch.no_grad():
            table.fill_(0.0)
        for _ in range(60):
            view().add_(torch.full((len(view()), 16), step / 100))
        moved = table.to_dense()[:300] / step
        assert float(moved.mean()) == pytest.approx(0.6, abs=0.05)
    assert table.writes.count == 180
    again = build()
    again.load_state_dict(saved(module))
    assert tables(again)[0].writes.count == 180
