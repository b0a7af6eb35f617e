"""dhe: encodings of hashes, a network against plain torch, the start, budgets, raw ids and the fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core.hash_network import HashNetwork
from recsys_embed.errors import ConfigError
from recsys_embed.methods.dhe import DheConfig, DheEmbedding


def head_of(module: DheEmbedding) -> HashNetwork:
    head = module.program.head
    assert isinstance(head, HashNetwork)
    return head


@pytest.mark.parametrize("encoding", ["uniform", "normal"])
def test_encodings_are_independent_and_centred(encoding: Any) -> None:
    module = DheEmbedding(100_000, 8, hidden=4, num_hashes=64, encoding=encoding)
    codes = head_of(module).encode(torch.arange(50_000), torch.float64)
    moments = codes.mean(0), codes.square().mean(0)
    assert float(moments[0].abs().max()) < 5 / 50_000**0.5
    assert float((moments[1] - 1).abs().max()) < 5 * 2**0.5 / 50_000**0.5
    fourth = 9 / 5 if encoding == "uniform" else 3
    assert float(codes.pow(4).mean()) == pytest.approx(fourth, rel=0.02)
    correlations = (codes.T @ codes / len(codes)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 6 / 50_000**0.5, "hashes of one id are independent"
    assert len(codes[:, 0].unique()) > 45_000


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_vectors_are_those_of_a_network_of_torch(activation: Any, num_layers: int) -> None:
    module = DheEmbedding(500, 6, hidden=5, num_hashes=8, activation=activation, num_layers=num_layers).double()
    x = head_of(module).encode(torch.arange(500), torch.float64)
    # Mean and variance of the activation of a normal input, by Gauss' rule over the line.
    at = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    share = (-at.square() / 2).exp()
    share /= share.sum()
    act = F.mish if activation == "mish" else F.relu
    mean = (act(at) * share).sum()
    std = ((act(at) - mean).square() * share).sum().sqrt()
    for k in range(num_layers):
        x = (act(F.linear(x, module.table(f"weight{k}").T, module.table(f"bias{k}")[0])) - mean) / std
    wanted = F.linear(x, module.table(f"weight{num_layers}").T, module.table(f"bias{num_layers}")[0])
    torch.testing.assert_close(module(torch.arange(500)), wanted, rtol=1e-5, atol=1e-6)


def test_gradients_pass_gradcheck() -> None:
    module = DheEmbedding(30, 3, hidden=4, num_hashes=6, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]

    def look_up(*tables: torch.Tensor) -> torch.Tensor:
        values = dict(zip(names, tables, strict=True))
        out: torch.Tensor = torch.func.functional_call(module, values, (torch.tensor([0, 7, 7, 2**40]),))
        return out

    assert torch.autograd.gradcheck(look_up, tuple(p.detach().requires_grad_(True) for p in module.parameters()))


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("activation", ["mish", "relu"])
def test_elements_start_with_the_variance_of_a_plain_table(num_layers: int, activation: Any) -> None:
    squares, means = [], []
    for seed in range(4):
        options = {"num_layers": num_layers, "activation": activation, "seed": seed}
        table = DheEmbedding(3000, 64, hidden=64, init="normal:0.1", **options).materialize()
        squares.append(table.square().mean())
        means.append(table.mean())
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(0.1, rel=0.15)
    assert abs(float(torch.stack(means).mean())) < 0.01


def test_any_64_bit_id_has_a_vector_of_its_own() -> None:
    ids = torch.tensor([0, 1, -1, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1])
    assert len(DheEmbedding(10, 4, hidden=8)(ids).unique(dim=0)) == len(ids)
    spec = FeatureSpec("raw", 1000, 4, ids="raw")
    coll = EmbeddingCollection(Schema([spec]), Plan({"raw": DheConfig(hidden=8)}))
    out = coll(torch.cat([ids, ids]).unsqueeze(1))
    assert len(out.squeeze(1).unique(dim=0)) == len(ids)


def test_each_distinct_id_of_a_batch_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    apply = HashNetwork.apply

    def counted(self: HashNetwork, columns: torch.Tensor, tables: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append(0 if ids is None else len(ids))
        return apply(self, columns, tables, ids)

    monkeypatch.setattr(HashNetwork, "apply", counted)
    coll = EmbeddingCollection(Schema([FeatureSpec("C1", 100, 4)]), Plan({"C1": DheConfig(hidden=8)}))
    ids = torch.arange(60).remainder(7)
    coll(ids.unsqueeze(1))
    coll(ids, torch.arange(0, 61, 3))
    assert sizes == [7, 7]


@pytest.mark.parametrize("budget", [2000, 30_000, 300_000])
def test_a_budget_gets_the_widest_layers_that_fit(budget: int) -> None:
    spec = FeatureSpec("C1", 20_000, 16)
    config = DheConfig.for_budget(spec, budget)
    wider = DheConfig(hidden=config.hidden + 1)
    assert config.footprint(spec).serve <= budget < wider.footprint(spec).serve
    h, k = config.hidden, config.num_hashes
    assert config.footprint(spec).serve == 4 * ((k + 1) * h + (h + 1) * h + (h + 1) * 16)


def test_the_fit_keeps_most_of_a_table_with_structure() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4, 8, generator=generator)[torch.randint(0, 4, (300,), generator=generator)]
    fitted = DheEmbedding.from_dense(table, hidden=32)
    assert (fitted.materialize() - table).square().mean() < 0.1 * table.square().mean()


def test_normal_encodings_need_pairs() -> None:
    with pytest.raises(ConfigError, match="even"):
        DheEmbedding(10, 4, hidden=3, num_hashes=7, encoding="normal")
