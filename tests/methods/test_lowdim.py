"""lowdim: the factorisation, its optimum and its initial distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, LowdimConfig, LowdimEmbedding, MixeddimConfig, Plan, Schema
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.optim import SGD, unfused_parameters


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_output_and_gradients_are_those_of_the_product() -> None:
    emb = LowdimEmbedding(50, 6, dim=2).double()
    ids, out_grad = torch.tensor([3, 3, 49]), torch.randn(3, 6, dtype=torch.float64, generator=generator())
    emb(ids).backward(out_grad)
    torch.testing.assert_close(emb(ids), (emb.weight @ emb.projection)[ids])
    dense = torch.zeros(50, 6, dtype=torch.float64).index_add_(0, ids, out_grad)
    torch.testing.assert_close(emb.weight.grad, dense @ emb.projection.T)
    torch.testing.assert_close(emb.projection.grad, emb.weight.T @ dense)


@pytest.mark.parametrize("dim", [1, 4, 15])
def test_outputs_start_with_the_variance_of_a_plain_table(dim: int) -> None:
    tables = [LowdimEmbedding(300, 16, dim=dim, init="sqrt_rows", seed=s).materialize() for s in range(200)]
    std = float(torch.stack(tables).double().std())
    assert abs(std * (3 * 300) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_fit_reaches_the_singular_value_bound(dim: int) -> None:
    target = torch.randn(200, 8, dtype=torch.float64, generator=generator())
    emb = LowdimEmbedding.from_dense(target, dim=dim)
    error = (emb.materialize() - target).square().sum()
    best = torch.linalg.svdvals(target)[dim:].square().sum()
    torch.testing.assert_close(error, best, rtol=1e-9, atol=1e-20)


def test_weighted_fit_reaches_the_weighted_bound_and_differs() -> None:
    target = torch.randn(200, 8, dtype=torch.float64, generator=generator())
    counts = torch.randint(0, 50, (200,), generator=generator(1)).double() ** 2
    emb = LowdimEmbedding.from_dense(target, dim=3, counts=counts)
    error = ((emb.materialize() - target).square().sum(1) * counts).sum()
    best = torch.linalg.svdvals(target * counts.sqrt().unsqueeze(1))[3:].square().sum()
    torch.testing.assert_close(error, best, rtol=1e-9, atol=1e-20)
    plain = LowdimEmbedding.from_dense(target, dim=3)
    assert ((plain.materialize() - target).square().sum(1) * counts).sum() > 1.02 * best
    # Ids that never occur still get their own best coordinates.
    unseen = counts == 0
    residual = (target - emb.materialize())[unseen]
    torch.testing.assert_close(residual @ emb.projection.T, torch.zeros(int(unseen.sum()), 3, dtype=torch.float64))


def test_fit_leaves_padding_out() -> None:
    target = torch.randn(40, 6, dtype=torch.float64, generator=generator())
    target[5] *= 1000
    emb = LowdimEmbedding.from_dense(target, dim=2, padding_idx=5)
    kept = torch.arange(40) != 5
    best = torch.linalg.svdvals(target[kept])[2:].square().sum()
    torch.testing.assert_close((emb.materialize() - target)[kept].square().sum(), best, rtol=1e-9, atol=1e-20)


def test_fit_sees_every_chunk_of_rows() -> None:
    """The energy of column 0 lies at the start and that of column 1 at the end: one chunk alone would miss one."""
    target = torch.randn(150_000, 3, dtype=torch.float64, generator=generator())
    target[:1000, 0] *= 30
    target[-1000:, 1] *= 30
    emb = LowdimEmbedding.from_dense(target, dim=2)
    best = torch.linalg.svdvals(target)[2:].square().sum()
    torch.testing.assert_close((emb.materialize() - target).square().sum(), best, rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("counts", [torch.zeros(40), torch.ones(39), -torch.ones(40)])
def test_bad_counts_raise(counts: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="`counts` must"):
        LowdimEmbedding.from_dense(torch.randn(40, 6), dim=2, counts=counts)


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(1, 600_000))
def test_budgets_are_filled_to_the_last_column_and_never_exceeded(n: int, width: int, budget: int) -> None:
    spec, column = FeatureSpec("C1", n, width), 4 * (n + width)
    if budget < column:
        with pytest.raises(BudgetError):
            LowdimConfig.for_budget(spec, budget)
        return
    config = LowdimConfig.for_budget(spec, budget)
    assert config.dim == min(width, budget // column)
    assert config.footprint(spec).serve == column * config.dim


def test_too_wide_and_raw_ids_raise_together() -> None:
    with pytest.raises(ConfigError, match=r"2 faults in LowdimConfig, feature 'C1'") as error:
        LowdimConfig(dim=5).program(FeatureSpec("C1", 10, 4, ids="raw"))
    assert "`dim` must be in [1, 4]" in str(error.value)


def test_in_a_fused_collection_tables_update_in_backward_and_projections_have_gradients() -> None:
    schema = Schema([FeatureSpec("a", 20, 4), FeatureSpec("b", 30, 4)])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, "lowdim", dim=2), optimizer=SGD(lr=0.1))
    before = coll.table("a.weight").detach().clone()
    coll(torch.tensor([[3, 7]])).sum().backward()
    moved = (coll.table("a.weight") != before).any(1)
    assert moved.nonzero().flatten().tolist() == [3]
    heads = unfused_parameters(coll)
    assert heads
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads)


FROZEN = (LowdimConfig(dim=3, projection="frozen"), MixeddimConfig(dims=(3, 2), blocks=(5,), projection="frozen"))


@pytest.mark.parametrize("config", FROZEN, ids=lambda c: c.method)
def test_a_frozen_projection_starts_as_zero_padding_and_stays(config: LowdimConfig | MixeddimConfig) -> None:
    """As a plain table of the width would train, here by a dot product of two towers, in torch."""
    emb = rse.make_embedding(config.method, 20, 6, config=config)
    rows = {t.name: emb.table(t.name) for t in emb.program.tables if not t.dense}
    padded = torch.cat([torch.nn.functional.pad(r, (0, 6 - r.shape[1])) for r in rows.values()]).detach().clone()
    plain, mask, ids = torch.nn.Parameter(padded), padded != 0, torch.tensor([0, 4, 5, 19, 4])
    torch.testing.assert_close(emb(ids), plain[ids])
    optimizers = [torch.optim.SGD(p, 0.5, weight_decay=0.1) for p in (list(emb.parameters()), [plain])]
    for _ in range(3):
        for optimizer, vectors in zip(optimizers, (emb(ids), (plain * mask)[ids]), strict=True):
            optimizer.zero_grad()
            (vectors[:2] * vectors[2:4]).sum().backward()
            optimizer.step()
    torch.testing.assert_close(emb(ids), plain[ids])


@pytest.mark.parametrize("optimizer", [None, SGD(lr=0.1)], ids=["torch", "fused"])
@pytest.mark.parametrize("config", FROZEN, ids=lambda c: c.method)
def test_collections_keep_frozen_and_learned_projections_apart(
    config: LowdimConfig | MixeddimConfig, optimizer: SGD | None, tmp_path: Path
) -> None:
    schema = Schema([FeatureSpec("a", 20, 6), FeatureSpec("b", 20, 6), FeatureSpec("c", 20, 6)])
    coll = EmbeddingCollection(schema, Plan({"a": config, "b": LowdimConfig(dim=3), "c": config}), optimizer)
    ids = torch.tensor([[0, 4, 19], [7, 7, 3]])
    before = {n: coll.bundle.dense_tables()[f"{n}.projection"].clone() for n in schema.names}
    for name in "ac":
        columns = torch.cat([torch.arange(d) for d in getattr(config, "dims", (3,))])
        assert torch.equal(before[name], torch.eye(6)[columns])
    coll(ids).square().sum().backward()
    torch.optim.SGD([p for p in coll.parameters() if p.grad is not None], 0.1, weight_decay=0.1).step()
    for name in schema.names:
        assert torch.equal(coll.bundle.dense_tables()[f"{name}.projection"], before[name]) == (name != "b")
    assert EmbeddingCollection(schema, coll.plan).load_state_dict(coll.state_dict())
    rse.export(coll, tmp_path / "coll")
    torch.testing.assert_close(rse.load(tmp_path / "coll")(ids), coll(ids))


def test_compressed_models_train_rows_but_no_frozen_projection() -> None:
    model = torch.nn.ModuleDict({"user": torch.nn.Embedding(200, 16), "item": torch.nn.Embedding(300, 16)})
    weights = {n: m.weight.detach().clone() for n, m in model.items()}
    rse.compress_(model, Plan(dict.fromkeys(model, LowdimConfig(dim=12, projection="frozen"))))
    for name, emb in model.items():
        assert emb.table("weight").requires_grad
        assert not emb.table("projection").requires_grad
        # Fitted as a learned one is: the best approximation of rank 12.
        best = torch.linalg.svdvals(weights[name])[12:].square().sum()
        torch.testing.assert_close((emb.materialize() - weights[name]).square().sum(), best, rtol=1e-3, atol=0.0)
