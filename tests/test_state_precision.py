"""Optimizer state in 16 and 8 bits: formats, expectation against rules in float64, backends, checkpoints, bytes."""

from __future__ import annotations

import copy
import importlib.util
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.core.stochastic_rounding import random_words
from recsys_embed.optim import FusedOptimizer, fused_optimizer, list_rules, make_rule
from recsys_embed.optim.state_format import StateFormat
from recsys_embed.train.build import make_optimizer
from recsys_embed.train.config import TrainConfig

FEW = pytest.mark.parametrize("precision", ["bf16", "8bit"])
FORMS = [
    StateFormat(torch.uint8, signed=False, least=-48),
    StateFormat(torch.uint8, signed=True),
    StateFormat(torch.bfloat16),
]
RULES = pytest.mark.parametrize("rule", sorted(set(list_rules()) - {"sgd"}))
BACKENDS = pytest.mark.parametrize("backend", ["torch", "native"])


def tables(rule: FusedOptimizer, backend: str = "torch", rows: int = 400, dim: int = 8) -> EmbeddingCollection:
    return EmbeddingCollection(Schema([FeatureSpec("C1", rows, dim)]), optimizer=rule, backend=backend)


def step(coll: EmbeddingCollection, ids: Tensor, gradient: Tensor) -> None:
    coll(ids.view(-1, 1)).squeeze(1).backward(gradient)


def state_of(coll: EmbeddingCollection) -> dict[str, Tensor]:
    return coll.optimizer_state_dict()["state"]


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_the_numbers_of_8_bits(form: StateFormat) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = form.decoded(codes)
    sizes = values[1:128] if form.signed else values[1:]
    # Four to each power of two, the same distance apart within it.
    wanted = [2.0**form.least * 2.0 ** (i // 4) * (1 + i % 4 / 4) for i in range(len(sizes))]
    assert sizes.tolist() == wanted
    assert values[0] == 0
    if form.signed:
        torch.testing.assert_close(values[128:], -values[:128], rtol=0, atol=0)
    words = random_words(codes.long(), 1, 0, 1)[:, 0]
    for given_words in (None, words):
        assert torch.equal(form.encoded(values, given_words), codes)
    ends = form.encoded(torch.tensor([math.inf, math.nan, -math.inf, -1.0]), None)
    assert form.decoded(ends)[:2].tolist() == [wanted[-1]] * 2
    assert form.decoded(ends)[2:].tolist() == ([-wanted[-1], -1.0] if form.signed else [0.0, 0.0])


@pytest.mark.parametrize("form", FORMS, ids=str)
@given(exponent=st.floats(-26, 3), negative=st.booleans(), seed=st.integers(0, 2**63))
def test_rounding_keeps_the_mean_and_takes_a_neighbour(
    form: StateFormat, exponent: float, negative: bool, seed: int
) -> None:
    number = torch.tensor(2.0**exponent * (-1 if negative and form.signed else 1))
    rows = 20_000
    words = random_words(torch.arange(rows), 1, seed, 7)
    found = form.decoded(form.encoded(number.expand(rows, 1), words)).double()
    low, high = found.min(), found.max()
    nearest = form.decoded(form.encoded(number.view(1), None)).double()
    assert len(found.unique()) <= 2
    assert low <= nearest <= high
    gap = 2.0**-7 if form.dtype is torch.bfloat16 else 0.25
    assert high - low <= gap * number.double().abs()
    assert abs(float(found.mean() - number.double())) <= 5 * gap * abs(float(number)) / 2 / math.sqrt(rows)


def test_a_state_that_is_never_negative_does_not_fall_to_zero() -> None:
    form = FORMS[0]
    words = random_words(torch.arange(1000), 1, 0, 1)
    assert bool((form.encoded(torch.full((1000, 1), 1e-30), words) == 1).all())
    # Others become the least number as often as keeps the mean.
    signed = FORMS[1].decoded(FORMS[1].encoded(torch.full((1000, 1), -(2.0**-28)), words))
    assert set(signed.abs().unique().tolist()) == {0.0, 2.0**-27}
    assert 0.4 < float((signed != 0).float().mean()) < 0.6


@FEW
@RULES
@BACKENDS
def test_states_are_those_of_float64_in_the_mean(rule: str, precision: Any, backend: str) -> None:
    """Rows with equal gradients have random bits of their own: their mean is an expectation over seeds."""
    rows, count = 4000, 30
    coll = tables(make_rule(rule, lr=0.01, state_precision=precision), backend, rows, 8)
    with torch.no_grad():
        coll.width8.copy_(torch.full((rows, 8), 0.5))
    coll.reset_optimizer_()
    oracle = make_rule(rule, lr=0.01)
    weight = torch.full((1, 8), 0.5, dtype=torch.float64)
    state = {name: torch.zeros(1, 8 if kind == "element" else 1).double() for name, kind in oracle.tensors.items()}
    for name, values in state.items():
        oracle.reset_state_(name, values, weight)
    for t in range(1, count + 1):
        gradient = torch.linspace(-1, 1, 8).mul(0.3 + 0.1 * (t % 5)).expand(1, 8)
        step(coll, torch.arange(rows), gradient.expand(rows, 8))
        weight = oracle.update(weight, gradient.double(), state, 0.01, t)
    for name, wanted in state.items():
        if name == "z":  # follows from weights, whose own path is random
            continue
        found = coll.optimizer.formats[name].decoded(state_of(coll)[f"width8_{name}"]).double()
        error = found.mean(0) - wanted
        assert bool((error.abs() <= 6 * found.std(0) / rows**0.5 + 1e-6 * wanted.abs()).all()), name
        # Rounding to nearest would have lost what steps add.
        assert bool((found.std(0)[wanted[0].abs() > 1e-3] > 0).all()), name
    # A root's mean is not the root of the mean.
    moved = float((weight - 0.5).abs().max())
    torch.testing.assert_close(coll.width8.detach().double().mean(0), weight[0], rtol=0, atol=0.04 * moved)


@FEW
@RULES
def test_backends_store_the_same_bits(rule: str, precision: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (tables(make_rule(rule, lr=0.01, state_precision=precision), b) for b in ("torch", "native"))
    ids = torch.randperm(400, generator=generator)[:300]
    for t in range(3):
        gradient = torch.randn(300, 8, generator=generator) * 10.0 ** torch.randint(
            -6, 2, (300, 1), generator=generator
        )
        for coll in (first, second):
            step(coll, ids, gradient)
        for name, values in state_of(first).items():
            same = values == state_of(second)[name]
            # States that are one product are exact; sums of several numbers may differ in the last bit of float32.
            if t == 0 and rule in ("adagrad", "adam"):
                assert bool(same.all()), name
            assert float(same.float().mean()) > 0.99, name


@FEW
def test_threads_and_order_do_not_matter(precision: Any) -> None:
    found = []
    for threads, order in ((1, 1), (2, -1)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            coll = tables(rse.Adam(lr=0.01, state_precision=precision), "native", rows=9000)
            for t in range(2):
                ids = torch.arange(0, 9000, 2)
                ids = ids.flip(0) if order < 0 else ids
                step(coll, ids, (ids.view(-1, 1) * torch.ones(8) - 4000 + t) * 1e-5)
        finally:
            torch.set_num_threads(before)
        found.append([coll.width8.detach(), *state_of(coll).values()])
    assert all(map(torch.equal, *found))


@FEW
@BACKENDS
@pytest.mark.parametrize("rule", [rse.Adam(0.01, rows="all"), rse.RowwiseRMSprop(0.01, rows="all", weight_decay=0.1)])
def test_deferred_steps_round_as_steps_that_are_not(rule: FusedOptimizer, backend: str, precision: Any) -> None:
    """However long a row waits for them."""
    lazy = tables(replace(rule, state_precision=precision), backend)
    eager = copy.deepcopy(lazy)
    for t in range(6):
        ids = torch.arange(t, 400, 7)
        for coll in (lazy, eager):
            step(coll, ids, torch.full((len(ids), 8), 0.25))
        eager.catch_up_()
    lazy.catch_up_()
    assert torch.equal(lazy.width8, eager.width8)
    assert all(torch.equal(values, state_of(eager)[name]) for name, values in state_of(lazy).items())


@FEW
@RULES
def test_bytes_are_true(rule: str, precision: Any) -> None:
    optimizer = make_rule(rule, state_precision=precision)
    coll = tables(optimizer)
    held = sum(t.nbytes for t in state_of(coll).values())
    assert optimizer.state_bytes(400, 8) == coll.footprint().optimizer == held
    assert held * (2 if precision == "bf16" else 4) == make_rule(rule).state_bytes(400, 8)
    schema = coll.schema
    assert coll.plan.footprint(schema, optimizer=optimizer).optimizer == held
    assert rse.memory_report(coll).footprint.optimizer == held


@FEW
@BACKENDS
@pytest.mark.parametrize("form", ["state_dict", "optimizer_state_dict", "fused_optimizer"])
def test_training_resumes_bit_for_bit(form: str, backend: str, precision: Any) -> None:
    rule = rse.Adam(0.01, state_precision=precision)
    ids = torch.arange(100)

    def train(coll: EmbeddingCollection, optimizer: Any) -> None:
        step(coll, ids, torch.linspace(-1, 1, 800).view(100, 8))
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    one, two = tables(rule, backend), tables(rule, backend)
    optimizers = [fused_optimizer(c) if form == "fused_optimizer" else None for c in (one, two)]
    for _ in range(3):
        train(one, optimizers[0])
    two.load_state_dict(one.state_dict())
    if form == "optimizer_state_dict":
        two.load_optimizer_state_dict(one.optimizer_state_dict())
    if optimizers[1] is not None:
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    for coll, optimizer in zip((one, two), optimizers, strict=True):
        train(coll, optimizer)
    assert torch.equal(one.width8, two.width8)
    assert all(torch.equal(values, state_of(two)[name]) for name, values in state_of(one).items())


@pytest.mark.parametrize("form", ["state_dict", "optimizer_state_dict"])
@pytest.mark.parametrize(("saved", "loaded"), [("fp32", "8bit"), ("8bit", "fp32"), ("bf16", "8bit"), ("fp32", "bf16")])
def test_state_of_another_precision_is_converted(form: str, saved: Any, loaded: Any) -> None:
    one = tables(rse.Adam(0.01, state_precision=saved))
    step(one, torch.arange(100), torch.linspace(-1, 1, 800).view(100, 8))
    two = tables(rse.Adam(0.01, state_precision=loaded))
    if form == "state_dict":
        two.load_state_dict(one.state_dict())
    else:
        two.load_optimizer_state_dict(one.optimizer_state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        before, after = (c.optimizer.formats[name].decoded(state_of(c)[f"width8_{name}"]) for c in (one, two))
        torch.testing.assert_close(after, before, rtol=0.126, atol=1e-8)


@pytest.mark.skipif(importlib.util.find_spec("torchrec") is None, reason="torchrec is not installed")
def test_torchrec_keeps_float32() -> None:
    from recsys_embed.sharding import CompressedEBC, shard

    coll = CompressedEBC(Schema([FeatureSpec("C1", 9, 8)]), optimizer=rse.Adagrad(state_precision="bf16"))
    with pytest.raises(rse.errors.ConfigError, match="float32; set state_precision='fp32' in Adagrad"):
        shard(coll, device="cpu")


def test_the_train_command_has_it() -> None:
    config = TrainConfig(embedding_optimizer="adagrad", embedding_optimizer_args={"state_precision": "8bit"})
    assert make_optimizer(config) == rse.Adagrad(lr=config.learning_rate, state_precision="8bit")


def test_other_rules_and_names() -> None:
    assert repr(rse.Adagrad(state_precision="8bit")).startswith(
        "Adagrad(lr=0.01, weight_decay=0.0, rows='touched', state"
    )
    assert "state_precision" not in repr(rse.Adagrad())
    with pytest.raises(rse.errors.ConfigError, match="state_precision"):
        rse.Adagrad(state_precision="int8")  # type: ignore[arg-type]
    halves = EmbeddingCollection(
        Schema([FeatureSpec("C1", 9, 8)]), optimizer=rse.Adagrad(state_precision="8bit"), dtype=torch.bfloat16
    ).float()
    step(halves, torch.arange(9), torch.ones(9, 8))
    assert halves.width8_sum.dtype is torch.uint8
    assert bool(halves.width8_sum.any())
