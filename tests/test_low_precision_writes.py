"""What rows that train in few bits hold after writes that no optimizer makes, and faults that used to pass unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import CheckpointError, ConfigError

WAYS = [("lpt", "int8"), ("lpt", "fp16"), ("alpt", "int8"), ("alpt", "int4"), ("lsq", "int8"), ("lsq", "int4")]
IDS = torch.arange(50)


def drop_in(quantization: str, precision: str, **options: Any) -> CompressedEmbedding:
    return rse.make_embedding("full", 50, 16, precision=precision, quantization=quantization, **options)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach() - want).norm() / want.norm())


def assigned(quantization: str, precision: str, values: Tensor) -> Tensor:
    """What lookups read after `copy_`."""
    emb = drop_in(quantization, precision)
    with torch.no_grad():
        emb.weight.copy_(values)
        return emb(IDS)


@pytest.mark.parametrize(("quantization", "precision"), WAYS)
def test_data_that_is_assigned_is_what_lookups_read(quantization: str, precision: str) -> None:
    values = torch.randn(50, 16) * 0.05
    want = assigned(quantization, precision, values)
    emb = drop_in(quantization, precision)
    emb.weight.data = values
    assert torch.equal(emb(IDS), want)
    emb = drop_in(quantization, precision)
    nn.utils.vector_to_parameters(values.reshape(-1), emb.parameters())
    assert torch.equal(emb(IDS), want)
    with pytest.raises(ConfigError, match=r"weight\.copy_\(\)"):
        emb.weight.data = values[:10]


@pytest.mark.parametrize(("quantization", "precision"), [w for w in WAYS if w[0] != "lpt"])
def test_averages_and_scales_find_the_steps_of_the_new_rows(quantization: str, precision: str) -> None:
    torch.manual_seed(0)
    emb = drop_in(quantization, precision)
    start, end = torch.randn(50, 16) + 0.5, torch.randn(50, 16) * 3
    writes = {
        "lerp_": lambda w: w.lerp_(end, 0.5),
        "_foreach_lerp_": lambda w: torch._foreach_lerp_([w], [end], 0.5),
        "mul_": lambda w: w.mul_(3.0),
        "div_": lambda w: w.div_(-4.0),
    }
    results = {"lerp_": (start + end) / 2, "_foreach_lerp_": (start + end) / 2, "mul_": start * 3, "div_": start / -4}
    for name, write in writes.items():
        with torch.no_grad():
            emb.weight.copy_(start)
            write(emb.weight)
        # Rounded twice, once of them at random, beside once to nearest.
        allowed = 1.01 if quantization == "lsq" else 2.5
        least = error(assigned(quantization, precision, results[name]), results[name])
        assert error(emb(IDS), results[name]) < allowed * least, name


def test_weight_decay_of_an_optimizer_keeps_the_steps_that_rows_learn() -> None:
    emb = drop_in("lsq", "int4")
    before = emb.weight.distances()
    with torch.no_grad():
        emb.weight.mul_(1 - 1e-4)
    assert float((emb.weight.distances() / before - 1).abs().max()) < 1e-3


def test_codes_without_their_distance_are_refused() -> None:
    state = drop_in("lpt", "int8", quantization_step=0.25).state_dict()
    del state["_extra_state"]
    emb = drop_in("lpt", "int8")
    before = emb(IDS)
    with pytest.raises(CheckpointError, match="'weight' without the distance between them"):
        emb.load_state_dict(state, strict=False)
    assert torch.equal(emb(IDS), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_float32_rows_that_are_not_finite_are_not_exported(bad: float, tmp_path: Path) -> None:
    schema = rse.Schema([rse.FeatureSpec("u", 50, 16)])
    plan = rse.Plan.uniform(schema, "full", precision="int8", quantization="lsq")
    coll = rse.EmbeddingCollection(schema, plan, rse.SGD(lr=0.1))
    (coll(torch.tensor([[7]])) * bad).sum().backward()
    with pytest.raises(ConfigError, match="NaN or infinite values in 1 rows, the first of them row 7"):
        rse.export(coll, tmp_path / "f")


def test_rows_are_written_by_negative_numbers_as_they_are_read() -> None:
    emb, row = drop_in("lpt", "int8"), torch.full((1, 16), 0.05)
    with torch.no_grad():
        emb.weight[torch.tensor([-1])] = row
    want = assigned("lpt", "int8", row.expand(50, 16))
    assert torch.equal(emb.weight[torch.tensor([-1])], want[-1:])
    assert torch.equal(emb(torch.tensor([49])), want[-1:])


def test_a_search_of_scales_that_nothing_needs_is_noted(tmp_path: Path) -> None:
    for options, noted in (
        ({}, True),
        ({"precision": "int4", "quantization": "alpt"}, True),
        ({"precision": "int4"}, False),
    ):
        report = rse.export(rse.make_embedding("full", 50, 16, **options), tmp_path / "f", search="mse")
        assert any("`search='mse'` changed nothing" in note for note in report.notes) == noted


def test_messages_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'dropped' in `precisions` is for the last tier"):
        rse.make_embedding("tiered", 50, 16, blocks=(10,), precisions=("dropped", "int4"))
    with pytest.raises(ConfigError, match="its vectors are computed: leave it out"):
        rse.export(rse.make_embedding("dhe", 50, 16, budget="64KiB"), tmp_path / "f", "int8", rows_per_scale=4)
    with pytest.raises(ConfigError, match="`rounding` is for rows that are stored rounded"):
        drop_in("lsq", "int8", rounding="nearest")
