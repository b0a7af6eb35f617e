"""What the feature-multiplexing paper claims (Coleman et al., NeurIPS 2023), and the planner's care for budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed.core import hashing
from recsys_embed.errors import BudgetError, ConfigError

SCHEMA = rse.Schema([rse.FeatureSpec("A", 1000, 16), rse.FeatureSpec("B", 50, 16), rse.FeatureSpec("C", 30_000, 16)])


def _rows(config: rse.UnifiedConfig, feature: str, ids: torch.Tensor) -> list[torch.Tensor]:
    program = config.program(rse.FeatureSpec(feature, 10**6, 16))
    return [p.transform.rows(ids) for p in program.row_lookups]


@pytest.mark.parametrize("row_lookups", [1, 2, 4, 8])
def test_concatenation_is_that_many_single_hash_lookups(row_lookups: int) -> None:
    emb = rse.make_embedding("unified", 10_000, 16, num_buckets=97, num_hashes=row_lookups)
    ids = torch.arange(0, 10_000, 7)
    chunks = [
        emb.unified[hashing.hash_rows(ids, hashing.salt(0, "embedding", "chunk", j), 97)] for j in range(row_lookups)
    ]
    assert torch.equal(emb(ids), torch.cat(chunks, 1))
    assert emb.unified.shape == (97, 16 // row_lookups)


def test_sum_adds_full_width_rows() -> None:
    emb = rse.make_embedding("unified", 10_000, 16, num_buckets=97, num_hashes=3, combine="sum")
    ids = torch.arange(50)
    rows = [hashing.hash_rows(ids, hashing.salt(0, "embedding", "chunk", j), 97) for j in range(3)]
    torch.testing.assert_close(emb(ids), sum(emb.unified[r] for r in rows))


def test_a_feature_keeps_its_rows_when_others_come_go_or_move() -> None:
    plan = rse.Plan.uniform(SCHEMA, "unified", num_buckets=500, num_hashes=2)
    ids = torch.tensor([[5, 6, 7], [999, 49, 29_999]])
    whole = rse.EmbeddingCollection(SCHEMA, plan)(ids)
    order = [2, 0]
    fewer = rse.Schema([SCHEMA.features[i] for i in order])
    part = rse.EmbeddingCollection(fewer, rse.Plan({n: plan[n] for n in fewer.names}))(ids[:, order])
    assert torch.equal(part, whole[:, order])


def test_row_lookups_are_independent_hashes() -> None:
    ids = torch.arange(40_000)
    first, second = _rows(rse.UnifiedConfig(num_buckets=100, num_hashes=2), "A", ids)
    pairs = torch.bincount(first * 100 + second, minlength=10_000).double()
    chi2 = ((pairs - 4.0) ** 2 / 4.0).sum()
    # 9,999 degrees of freedom: mean 9,999, standard deviation 141.
    assert abs(chi2 - 9_999) < 5 * 141


def test_features_collide_at_the_rate_of_random_hashing() -> None:
    config, rows = rse.UnifiedConfig(num_buckets=1000, num_hashes=1), 1000
    (a,), (b,) = _rows(config, "A", torch.arange(1000)), _rows(config, "B", torch.arange(1000))
    hits = (a[:, None] == b[None, :]).sum().item()
    expected, sigma = 1e6 / rows, (1e6 / rows) ** 0.5
    assert abs(hits - expected) < 3 * sigma


def test_backend_tables_take_chunks_in_turn_across_features() -> None:
    plan = rse.Plan.uniform(SCHEMA, "unified", budget="300KiB", num_tables=3, num_hashes=2, full_below=1)
    tables = [[p.table for p in plan[s.name].program(s).row_lookups] for s in SCHEMA]
    assert tables == [["unified_0", "unified_1"], ["unified_2", "unified_0"], ["unified_1", "unified_2"]]


def test_inter_feature_collisions_leave_orthogonal_features_unharmed() -> None:
    """Section 3.4: with fixed orthogonal readouts, collisions between features do not move a feature's logit."""
    width, steps = 8, 40
    generator = torch.Generator().manual_seed(0)
    schema = rse.Schema([rse.FeatureSpec(n, 1000, width) for n in "AB"])
    config = rse.UnifiedConfig(num_buckets=50, num_hashes=1, dim=width)
    rows_a, rows_b = (config.program(s).row_lookups[0].transform.rows(torch.arange(1000)) for s in schema)
    # One id per row and feature, so that all collisions are between the features; half of the rows are read by both.
    shared, alone_a, alone_b = torch.randperm(50, generator=generator)[:30].split(10)
    first = torch.stack([(rows_a == r).nonzero()[0, 0] for r in torch.cat([shared, alone_a])])
    second = torch.stack([(rows_b == r).nonzero()[0, 0] for r in torch.cat([shared, alone_b])])
    batches = [torch.randint(0, 20, (32, 2), generator=generator) for _ in range(steps)]
    truth = torch.randn(20, generator=generator, dtype=torch.float64)
    theta = torch.linalg.qr(torch.randn(width, 2, generator=generator, dtype=torch.float64))[0].T

    def logits_of_first(tables: tuple[str, str], readout: torch.Tensor) -> torch.Tensor:
        plan = rse.Plan({n: replace(config, table=t) for n, t in zip("AB", tables, strict=True)})
        coll = rse.EmbeddingCollection(schema, plan, rse.SGD(lr=8.0), dtype=torch.float64)
        for name in set(tables):
            coll.table(name).data.zero_()
        for batch in batches:
            ids = torch.stack([first[batch[:, 0]], second[batch[:, 1]]], 1)
            z = torch.einsum("bfw,fw->b", coll(ids), readout)
            label = (truth[batch[:, 0]] > 0).double()
            torch.nn.functional.binary_cross_entropy_with_logits(z, label).backward()
        ids = torch.stack([first, second], 1)
        return (coll(ids)[:, 0] @ readout[0]).detach()

    apart, together = ("a", "b"), ("one", "one")
    alone = logits_of_first(apart, theta)
    assert alone.abs().min() > 0.1, "the feature must have learned something"
    torch.testing.assert_close(logits_of_first(together, theta), alone, rtol=0, atol=1e-12)
    parallel = torch.stack([theta[0], theta[0]])
    assert (logits_of_first(together, parallel) - logits_of_first(apart, parallel)).abs().max() > 0.05


def test_multi_size_features_reach_one_width_through_their_projections() -> None:
    plan = rse.Plan.uniform(SCHEMA, "unified", budget="300KiB", dim=4, num_hashes={"A": 2, "C": 6})
    shapes = {s.name: [(t.width, t.dense) for t in plan[s.name].program(s).tables] for s in SCHEMA}
    assert shapes["A"] == shapes["C"] == [(4, False), (16, True)]
    assert plan["B"].method == "full"
    assert rse.EmbeddingCollection(SCHEMA, plan)(torch.tensor([[1, 2, 3]])).shape == (1, 3, 16)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    ratio=st.floats(1.0, 500.0),
    row_lookups=st.sampled_from([None, 1, 4]),
    tables=st.integers(1, 4),
)
def test_plans_use_the_budget_and_never_more(
    sizes: list[int], ratio: float, row_lookups: int | None, tables: int
) -> None:
    schema = rse.Schema([rse.FeatureSpec(f"f{i}", n, 16) for i, n in enumerate(sizes)])
    budget = max(1, int(sum(sizes) * 64 / ratio))
    try:
        plan = rse.Plan.uniform(schema, "unified", budget=budget, num_hashes=row_lookups, num_tables=tables)
    except BudgetError:
        return
    used = plan.footprint(schema).serve
    assert used <= budget
    if any(c.method == "unified" for c in plan.configs.values()):
        assert budget - used < 4 * 16 * tables, "what is left must be less than one more row of each table"


def test_faults_are_named() -> None:
    with pytest.raises(ConfigError, match="must divide embedding_dim 16"):
        rse.make_embedding("unified", 100, 16, num_buckets=10, num_hashes=3)
    with pytest.raises(BudgetError, match=r"needs at least .* available. Ways out"):
        rse.Plan.uniform(SCHEMA, "unified", budget=10)
    with pytest.raises(ConfigError, match=r"without '\.' or '#'"):
        rse.make_embedding("unified", 100, 16, num_buckets=10, table="a.b")
    for taken in ("unseen", "shared", "served", "config", "_native"):
        with pytest.raises(ConfigError, match=f"'{taken}' is taken by an attribute"):
            rse.make_embedding("unified", 100, 16, num_buckets=10, table=taken)
    mixed = rse.Plan(
        {"A": rse.UnifiedConfig(num_buckets=5), "B": rse.UnifiedConfig(num_buckets=6), "C": rse.FullConfig()}
    )
    with pytest.raises(ConfigError, match=r"shared table 'unified' is 5 x 4.* 6 x 4.* for 'B'"):
        rse.EmbeddingCollection(SCHEMA, mixed)


def test_rows_of_a_shared_table_start_with_the_papers_distribution() -> None:
    collection = rse.EmbeddingCollection(SCHEMA, rse.Plan.uniform(SCHEMA, "unified", num_buckets=5000))
    table = collection.table("unified")
    assert table.abs().max() <= 0.05
    assert abs(table.std().item() - 0.05 / 3**0.5) < 0.001
