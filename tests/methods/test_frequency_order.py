"""Methods that treat frequent ids apart: counts decide, travel with the state, and cost the bytes that are stated."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.registry import list_methods
from recsys_embed.testing import poisoned_memory

METHODS = [m.name for m in list_methods() if m.config_cls.order_option]
ROWS, WIDTH = 500, 6
IDS = torch.arange(ROWS)


def counts(seed: int = 0, rows: int = ROWS) -> Tensor:
    return torch.randint(0, 1000, (rows,), generator=torch.Generator().manual_seed(seed))


def build(method: str, order: str = "counts", rows: int = ROWS, **options: Any) -> CompressedEmbedding:
    more: dict[str, Any] = {"blocks": (rows // 10,)} if method == "mixeddim" else {}
    with poisoned_memory():
        return rse.make_embedding(
            method, rows, WIDTH, budget=rows * WIDTH * 3, order=order, **{"seed": 0, **more, **options}
        )


def test_there_are_such_methods() -> None:
    assert set(METHODS) >= {"adaptive", "freqcut", "mixeddim"}


@pytest.mark.parametrize("method", METHODS)
def test_until_counts_are_given_ids_are_ranks(method: str) -> None:
    module = build(method)
    ranked = type(module)(ROWS, WIDTH, config=replace(module.config, order="ids"))
    assert torch.equal(ranked(IDS), module(IDS))
    assert torch.equal(module.assign_(torch.arange(ROWS, 0, -1))(IDS), ranked(IDS))
    assert torch.equal(ranked.assign_(counts())(IDS), module(IDS)), "with order='ids' counts change nothing"
    assert not torch.equal(module.assign_(counts())(IDS), ranked(IDS))


@pytest.mark.parametrize("method", METHODS)
def test_footprint_is_parameters_and_buffers(method: str) -> None:
    module = build(method)
    held = sum(p.nbytes for p in module.parameters())
    index = module.kernel.index.nbytes
    assert index > 0
    said = module.footprint()
    # Rows train unrounded, whatever they are served at.
    assert (said.weights + said.unrounded, said.index) == (held, index)
    stored = sum(v.nbytes for k, v in module.state_dict().items() if not k.endswith("_extra_state"))
    assert stored == said.train
    assert said.serve <= ROWS * WIDTH * 3
    assert build(method, "ids").footprint().index == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_sets_travel_with_state_copies_and_casts(method: str) -> None:
    module = build(method).assign_(counts())
    other = build(method, init="normal:0.1").assign_(counts(7))
    assert not torch.equal(other(IDS), module(IDS))
    other.load_state_dict(module.state_dict())
    lazy = build(method, device="meta")
    lazy.to_empty(device="cpu")
    lazy.load_state_dict(module.state_dict())
    for copied in (other, lazy, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(IDS), module(IDS))
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(copy.deepcopy(module).double()(IDS), module(IDS).double(), **close)
    cast = copy.deepcopy(module).to(torch.bfloat16).kernel.index.arrays.held
    for name, values in module.kernel.index.arrays.held.items():
        assert torch.equal(values, cast[name]), "sets are no numbers to round"
    state = module.state_dict()
    name = next(k for k in state if k.startswith("kernel.index"))
    state[name] = state[name].flip(0).clone()
    with pytest.raises((CheckpointError, RuntimeError), match="damaged"):
        build(method).load_state_dict(state)


@pytest.mark.parametrize("method", METHODS)
def test_in_a_collection_counts_decide_per_feature_and_travel_with_the_state(method: str) -> None:
    schema = rse.Schema(
        [rse.FeatureSpec(n, r, WIDTH, init="normal:1") for n, r in (("a", ROWS), ("b", 90), ("c", 300))]
    )
    configs = {s.name: build(method, rows=s.num_embeddings).config for s in schema}
    plan = rse.Plan({**configs, "b": build(method, "ids", rows=90).config})
    given = {"a": counts(1), "c": counts(2, 300)}
    coll = rse.EmbeddingCollection(schema, plan).assign_(given)
    ids = torch.stack([torch.randint(0, s.num_embeddings, (64,)) for s in schema], 1)
    for f, s in enumerate(schema):
        alone = rse.make_embedding(method, s.num_embeddings, WIDTH, config=plan[s.name], name=s.name, init=s.init)
        alone.reset_parameters(coll.seed)
        if s.name in given:
            alone.assign_(given[s.name])
        torch.testing.assert_close(coll(ids)[:, f], alone(ids[:, f]))
    again = rse.EmbeddingCollection(schema, plan, seed=5)
    again.load_state_dict(coll.state_dict())
    assert torch.equal(again(ids), coll(ids))
    assert coll.footprint().index == sum(configs[n].footprint(schema[n]).index for n in "ac")
    with pytest.raises(ConfigError, match=r"must be \[500\]"):
        coll.assign_({"a": torch.ones(499)})


@pytest.mark.parametrize("method", METHODS)
def test_sets_compile_and_export(method: str) -> None:
    module = build(method).assign_(counts())
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), module(IDS))
    exported = torch.export.export(module, (IDS, None, None))
    torch.testing.assert_close(exported.module()(IDS.flip(0), None, None), module(IDS.flip(0)))


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_with_counts_serves_the_frequent_ids_best(method: str, tmp_path: Path) -> None:
    target = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    seen = counts(3).double() ** 4

    def error_of(name: str, **known: Any) -> Tensor:
        fitted = type(build(method)).from_dense(target, config=build(method).config, **known)
        rse.export(fitted, tmp_path / name)  # at the precisions of the configuration
        served: Any = rse.load(tmp_path / name)
        out: Tensor = (served(IDS) - target).square().sum(1)
        return out

    error, blind = error_of("known", counts=seen), error_of("blind")
    often = seen.argsort(descending=True)
    # Rows of 8 bits lie within 1 / 255 of their range.
    rounded = "precisions" in build(method).config.to_dict()
    assert error[often[: ROWS // 20]].sum() < (1e-3 if rounded else 1e-6) * error.sum()
    assert (error * seen).sum() < 0.7 * (blind * seen).sum()
