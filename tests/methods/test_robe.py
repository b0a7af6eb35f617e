"""robe: where elements lie (paper and authors' code), what the array costs, and the planner's care for budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed.core import hashing
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.optim import list_rules, make_rule
from tests.tiers import slow_but

SCHEMA = rse.Schema([rse.FeatureSpec("A", 1000, 16), rse.FeatureSpec("B", 50, 12), rse.FeatureSpec("C", 30_000, 16)])
_BITS = (1 << 64) - 1


def mix(x: int, salt: int) -> int:
    """splitmix64 in unbounded integers, as Steele, Lea and Flood (2014) print it."""
    z = (((x ^ salt) & _BITS) + 0x9E3779B97F4A7C15) & _BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _BITS
    return z ^ (z >> 31)


def places(name: str, x: int, width: int, size: int, block: int, wrap: bool) -> list[int]:
    """Place in the array of every element of id ``x``: one block after the other."""
    out = []
    for j in range(width):
        number, offset = j // block, j % block
        starts = size if wrap else size - block + 1
        start = (mix(x, hashing.salt(0, name, "block", number)) * starts) >> 64
        out.append((start + offset) % size)
    return out


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 12), data=st.data(), wrap=st.booleans())
def test_elements_lie_where_their_block_is_hashed(width: int, data: st.DataObject, wrap: bool) -> None:
    block = data.draw(st.integers(1, width))
    size = data.draw(st.integers(block, 40))
    emb = rse.RobeEmbedding(100, width, num_elements=size, block_size=block, wrap=wrap, name="C1")
    emb.robe.data.copy_(torch.arange(size).unsqueeze(1))
    for x in (0, 1, 99, 2**24 + 1, 2**40 + 3, -5):
        assert emb(torch.tensor(x)).int().tolist() == places("C1", x, width, size, block, wrap)


def test_blocks_wrap_in_the_paper_and_fit_in_the_authors_code() -> None:
    ids = torch.arange(50_000)
    starts = {}
    for wrap in (True, False):
        emb = rse.RobeEmbedding(50_000, 8, num_elements=40, wrap=wrap, dtype=torch.float64)
        emb.robe.data.copy_(torch.arange(40).unsqueeze(1))
        read = emb(ids).long()
        starts[wrap] = read[:, 0]
        steps = read.diff(dim=1)
        assert ((steps == 1) | ((steps == -39) & wrap)).all()
    assert sorted(starts[True].unique().tolist()) == list(range(40))
    assert sorted(starts[False].unique().tolist()) == list(range(33)), "starts in [0, M - Z]"


def test_wrapping_uses_all_elements_alike() -> None:
    emb = rse.RobeEmbedding(40_000, 8, num_elements=50, block_size=4)
    emb.materialize()
    ones = torch.ones(40_000, 8)
    (uses,) = torch.autograd.grad((emb(torch.arange(40_000)) * ones).sum(), emb.robe)
    # 80,000 starts over 50 places; an element is read by the 4 starts before it.
    assert (uses.squeeze(1) - 6400).abs().max() < 6 * 6400**0.5
    emb = rse.RobeEmbedding(40_000, 8, num_elements=50, block_size=4, wrap=False)
    (uses,) = torch.autograd.grad(emb(torch.arange(40_000)).sum(), emb.robe)
    assert uses[0] < 2500, "without wrapping the array's ends are read by fewer blocks"


def test_blocks_of_one_element_are_hashednets() -> None:
    """Chen et al. 2015: every weight is one of the array's, chosen by its own hash."""
    emb = rse.RobeEmbedding(1000, 6, num_elements=37, block_size=1)
    ids = torch.arange(1000)
    salts = torch.tensor([hashing.salt(0, "embedding", "block", j) for j in range(6)])
    assert torch.equal(emb(ids), emb.robe[hashing.hash_rows(ids.unsqueeze(1), salts, 37), 0])


def test_one_block_is_one_contiguous_read() -> None:
    for options in ({}, {"block_size": 6}, {"block_size": 600}):
        config = rse.RobeConfig(num_elements=37, **options)
        (row_lookup,) = config.program(rse.FeatureSpec("C1", 1000, 6)).row_lookups
        assert (row_lookup.num_rows, row_lookup.column) == (6, 0)
    runs = [
        p.num_rows
        for p in rse.RobeConfig(num_elements=37, block_size=4).program(rse.FeatureSpec("C1", 9, 10)).row_lookups
    ]
    assert runs == [4, 4, 2], "the last block holds what is left of the width"


def test_signs_are_hashes_of_each_element() -> None:
    emb = rse.RobeEmbedding(4000, 6, num_elements=20, block_size=4, sign=True, dtype=torch.float64)
    torch.nn.init.ones_(emb.robe)
    signs = emb.materialize()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    correlation = signs.T @ signs / 4000
    assert (correlation - torch.eye(6, dtype=torch.float64)).abs().max() < 5 / 4000**0.5
    assert signs.mean(0).abs().max() < 5 / 4000**0.5


@pytest.mark.parametrize("block", slow_but([1, 3, 6], 3))
def test_signs_make_sketches_unbiased(block: int) -> None:
    """A vector written to the array and read back is itself on average over hashes, whatever shares its elements."""
    truth = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    read = {}
    for sign in (True, False):
        back = []
        for seed in range(300):
            emb = rse.RobeEmbedding(20, 6, num_elements=30, block_size=block, sign=sign, seed=seed, dtype=torch.float64)
            (sketch,) = torch.autograd.grad((emb(torch.arange(20)) * truth).sum(), emb.robe)
            emb.robe.data.copy_(sketch)
            back.append(emb.materialize())
        read[sign] = torch.stack(back)
    mean, sigma = read[True].mean(0), read[True].std(0) / 300**0.5
    assert ((mean - truth).abs() / sigma).max() < 4.5
    assert (read[False].mean(0) - truth).mean() > 5, "without signs everything that collides adds up"


def test_backward_adds_into_the_flat_array() -> None:
    emb = rse.RobeEmbedding(100, 7, num_elements=11, block_size=3, dtype=torch.float64)
    ids = torch.tensor([5, 5, 99, 0])
    g = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    emb(ids).backward(g)
    expected = torch.zeros(11, dtype=torch.float64)
    for row, x in zip(g, ids.tolist(), strict=True):
        for j, at in enumerate(places("embedding", x, 7, 11, 3, True)):
            expected[at] += row[j]
    torch.testing.assert_close(emb.robe.grad.squeeze(1), expected)


def test_features_read_one_array_at_places_of_their_own() -> None:
    plan = rse.Plan.uniform(SCHEMA, "robe", num_elements=500, block_size=5)
    coll = rse.EmbeddingCollection(SCHEMA, plan)
    assert sum(p.numel() for p in coll.parameters()) == 500
    assert plan.footprint(SCHEMA).serve == coll.footprint().serve == 2000
    array, ids = coll.table("robe").squeeze(1), [999, 49, 29_999]
    expected = [array[places(s.name, x, s.embedding_dim, 500, 5, True)] for s, x in zip(SCHEMA, ids, strict=True)]
    assert torch.equal(coll(torch.tensor([ids]))[0], torch.cat(expected))


def test_a_feature_keeps_its_places_when_others_come_go_or_move() -> None:
    schema = rse.Schema([rse.FeatureSpec(n, 100, 4) for n in "ABC"])
    plan = rse.Plan.uniform(schema, "robe", num_elements=50)
    ids = torch.tensor([[5, 6, 7], [99, 49, 0]])
    whole = rse.EmbeddingCollection(schema, plan)(ids)
    fewer = rse.Schema([schema["C"], schema["A"]])
    part = rse.EmbeddingCollection(fewer, rse.Plan({n: plan[n] for n in "CA"}))(ids[:, [2, 0]])
    assert torch.equal(part, whole[:, [2, 0]])


@pytest.mark.parametrize("rule", [make_rule(name, lr=0.1) for name in list_rules()], ids=repr)
def test_a_fused_step_sums_all_reads_of_an_element_first(rule: Any) -> None:
    """Blocks overlap within a vector, a batch and across features; stateful rules need the whole sum."""
    schema = rse.Schema([rse.FeatureSpec(n, 100, 7) for n in "AB"])
    plan = rse.Plan.uniform(schema, "robe", num_elements=9, block_size=3)
    fused = rse.EmbeddingCollection(schema, plan, rule, dtype=torch.float64)
    plain = rse.EmbeddingCollection(schema, plan, dtype=torch.float64)
    ids = torch.randint(0, 100, (20, 2), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(20, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (plain(ids) * weights).sum().backward()
    (fused(ids) * weights).sum().backward()
    state = {k: torch.empty(9, 1, dtype=torch.float64) for k in rule.state}
    for key, values in state.items():
        rule.reset_state_(key, values, plain.width1.detach())
    expected = rule.update(plain.width1.detach(), plain.width1.grad, state, 0.1, 1)
    torch.testing.assert_close(fused.width1, expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from([4, 6, 16])), min_size=1, max_size=8),
    ratio=st.floats(1.0, 5000.0),
    block=st.sampled_from([None, 1, 5, 100]),
)
def test_plans_use_the_budget_and_never_more(sizes: list[tuple[int, int]], ratio: float, block: int | None) -> None:
    schema = rse.Schema([rse.FeatureSpec(f"f{i}", n, d) for i, (n, d) in enumerate(sizes)])
    budget = max(1, int(sum(n * d * 4 for n, d in sizes) / ratio))
    try:
        plan = rse.Plan.uniform(schema, "robe", budget=budget, block_size=block)
    except BudgetError:
        assert budget < 2 * 4 * 16, "half may go to small tables, the other must hold a block"
        return
    used = plan.footprint(schema).serve
    assert used <= budget
    assert {s.name for s in schema if plan[s.name].method == "robe"} >= {
        s.name for s in schema if s.num_embeddings >= 200
    }
    if any(c.method == "robe" for c in plan.configs.values()):
        assert budget - used < 4
    assert len({c for c in plan.configs.values() if c.method == "robe"}) <= 1


def test_an_array_is_never_larger_than_the_tables_it_stands_for() -> None:
    plan = rse.Plan.uniform(SCHEMA, "robe", budget="1GiB")
    assert plan["B"].method == "full"
    assert plan["A"].to_dict()["num_elements"] == 31_000 * 16
    assert rse.RobeConfig.for_budget(SCHEMA["A"], "1GiB").num_elements == 16_000


def test_budgets_of_one_feature_are_filled_to_the_last_element() -> None:
    for budget, elements in ((64, 16), (67, 16), (68, 17), (4000, 1000)):
        assert rse.RobeConfig.for_budget(SCHEMA["A"], budget).num_elements == elements
    with pytest.raises(BudgetError, match="needs at least 64 B"):
        rse.RobeConfig.for_budget(SCHEMA["A"], 63)
    assert rse.RobeConfig.for_budget(SCHEMA["A"], 63, block_size=8).num_elements == 15


def test_elements_start_with_the_authors_law_unless_the_features_own_is_explicit() -> None:
    array = rse.EmbeddingCollection(SCHEMA, rse.Plan.uniform(SCHEMA, "robe", num_elements=20_000)).table("robe")
    assert array.abs().max() <= 0.001
    assert abs(array.std().item() - 0.001 / 3**0.5) < 2e-5
    explicit = SCHEMA.with_init("normal:0.5")
    array = rse.EmbeddingCollection(explicit, rse.Plan.uniform(explicit, "robe", num_elements=20_000)).table("robe")
    assert abs(array.std().item() - 0.5) < 0.02


def test_a_table_that_an_array_can_hold_is_found_again() -> None:
    source = rse.RobeEmbedding(300, 8, num_elements=200, block_size=3, sign=True, dtype=torch.float64, init="normal:1")
    fitted = rse.RobeEmbedding.from_dense(source.materialize(), config=source.config)
    torch.testing.assert_close(fitted.materialize(), source.materialize(), rtol=1e-4, atol=1e-4)


def test_faults_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)2 faults.*at least 16, the length of a block; got 3.*without '\.' or '#'"
    ):
        rse.RobeConfig(num_elements=3, table="a#b").program(SCHEMA["A"])
    with pytest.raises(ConfigError, match="`block_size` must be an integer"):
        rse.RobeConfig(num_elements=3, block_size=0)
    with pytest.raises(BudgetError, match=r"'robe' needs at least 64 B for these 3.* 10 B available. Ways out: 1"):
        rse.Plan.uniform(SCHEMA, "robe", budget=10)
    mixed = rse.Plan(
        {"A": rse.RobeConfig(num_elements=50), "B": rse.RobeConfig(num_elements=60), "C": rse.FullConfig()}
    )
    with pytest.raises(ConfigError, match=r"shared table 'robe' is 50 x 1.* 60 x 1.* for 'B'"):
        rse.EmbeddingCollection(SCHEMA, mixed)
    apart = rse.Plan({**mixed.configs, "B": rse.RobeConfig(num_elements=60, table="other")})
    assert apart.footprint(SCHEMA).serve == 4 * (110 + 30_000 * 16)
