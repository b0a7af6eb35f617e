"""mixeddim: the alpha rule by hand, blocks against a loop over ids, budgets, and the optimum of the fit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recsys_embed import EmbeddingCollection, FeatureSpec, MixeddimConfig, MixeddimEmbedding, Plan, Schema
from recsys_embed.errors import BudgetError, ConfigError, UnknownNameError
from recsys_embed.method_parts.width_rule import WidthRule
from recsys_embed.optim import SGD, unfused_parameters

SIZES = {"tiny": 100, "a": 10_000, "b": 100_000, "c": 1_000_000}
SCHEMA = Schema([FeatureSpec(name, n, 16) for name, n in SIZES.items()])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dims(plan: Plan) -> dict[str, Any]:
    return {n: plan[n].to_dict().get("dims", "full") for n in plan}


# -- widths by popularity ---------------------------------------------------------------------------------------------


def test_the_rule_by_hand() -> None:
    # 160 / sqrt(100) = 16, 160 / sqrt(10_000) = 1.6, 160 / sqrt(1e6) = 0.16
    assert WidthRule((100, 10_000, 10**6), (1, 1, 1), 16).widths(0.5, 160) == [16, 2, 1]
    # Twice the queries are half the rows: 160 / sqrt(50) = 22.6; 160 / sqrt(10_000 / 8) = 4.5
    assert WidthRule((100, 10_000), (2, 8), 64).widths(0.5, 160) == [23, 5]
    assert WidthRule((100, 10_000), (1, 1), 64).widths(0.0, 7) == [7, 7]
    assert WidthRule((10, 1000), (1, 1000), 64).widths(0.5, 10) == [3, 3], "never wider than a more frequent block"


def test_rounding() -> None:
    rows, ones = (1,) * 6, (1.0,) * 6
    cases = ((2.9, 3, 4, 4), (1.4, 1, 1, 4), (5.9, 6, 8, 4), (6.0, 6, 8, 8), (17, 17, 16, 16), (22, 22, 22, 22))
    for scale, integer, power, four in cases:
        for rounding, width in (("integer", integer), ("power_of_two", power), ("multiple_of_4", four)):
            assert WidthRule(rows, ones, 22, rounding).widths(0.3, scale) == [width] * 6  # type: ignore[arg-type]


def authors_rule(sizes: Tensor, alpha: float, d0: int, powers: bool) -> list[int]:
    """``md_solver`` of DLRM in its own terms: lambda = d0 * n_min^alpha, the smallest table d0 wide, at least 1."""
    n, order = sizes.double().sort()
    width = d0 * n[0] ** alpha * n**-alpha
    width[0] = d0
    width.clamp_(min=1.0)
    width = 2 ** torch.round(torch.log2(width)) if powers else torch.round(width)
    return [int(w) for w in width[order.argsort()]]


@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=8), alpha=st.floats(0, 1), powers=st.booleans())
def test_widths_are_those_of_the_authors_solver(sizes: list[int], alpha: float, powers: bool) -> None:
    rules = [WidthRule((n,), (1.0,), 16, "power_of_two" if powers else "integer") for n in sizes]
    scale = 16 * min(sizes) ** alpha
    found = [r.widths(alpha, scale)[0] for r in rules]
    for n, got, wanted in zip(sizes, found, authors_rule(torch.tensor(sizes), alpha, 16, powers), strict=True):
        exact = scale * n**-alpha
        # Halves round either way, and so do what lies next to them.
        edge = abs(exact % 1 - 0.5) < 1e-9 or abs(torch.tensor(exact).log2().item() % 1 - 0.5) < 1e-6
        assert got == wanted or edge


def test_equal_traffic_blocks() -> None:
    counts = torch.tensor([1, 1, 8, 1, 1, 4, 1, 7])  # 24 in all: 8 | 7 and 4 reach over the second mark | 1 x 5
    assert MixeddimConfig.equal_traffic(counts, 3) == (1, 2)
    assert MixeddimConfig.equal_traffic(counts, 2) == (2,)
    assert MixeddimConfig.equal_traffic(torch.tensor([100, 1, 1]), 5) == (1,), "one id is more than a block's worth"
    zipf = 1 / torch.arange(1, 100_001, dtype=torch.float64)
    blocks = MixeddimConfig.equal_traffic(zipf[torch.randperm(100_000, generator=generator())], 4)
    edges = [0, *torch.tensor(blocks).cumsum(0).tolist(), 100_000]
    shares = [float(zipf[a:b].sum() / zipf.sum()) for a, b in pairwise(edges)]
    assert all(abs(share - 0.25) < 0.05 for share in shares)
    for wrong in ((counts, 1), (torch.zeros(5), 2)):
        with pytest.raises(ConfigError, match="`num_blocks` must be at least 2"):
            MixeddimConfig.equal_traffic(*wrong)


# -- the lookup -------------------------------------------------------------------------------------------------------

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((6,), None),
    ((2,), None),
    ((6, 2), (5,)),
    ((6, 3, 1), (3, 10)),
    ((4, 2, 1), (3, 10)),
]


@pytest.mark.parametrize("order", ["ids", "counts"])
@pytest.mark.parametrize(("widths", "blocks"), SHAPES)
def test_every_block_is_a_table_with_a_linear_layer(widths: Any, blocks: Any, order: Any) -> None:
    """The authors' module: a table per block, and ``nn.Linear`` without bias where it is narrower than the output."""
    counts = torch.randperm(40, generator=generator())
    emb = MixeddimEmbedding(40, 6, dims=widths, blocks=blocks, order=order, dtype=torch.float64).assign_(counts)
    rank = counts.argsort(descending=True).tolist() if order == "counts" else list(range(40))
    edges = [0, *torch.tensor(blocks or ()).long().cumsum(0).tolist(), 40]
    at = 0
    for b, (start, stop) in enumerate(pairwise(edges)):
        members, rows = sorted(rank[start:stop]), emb.table(f"block_{b}" if blocks else "weight")
        assert rows.shape == (stop - start, widths[b])
        linear = None
        if widths[b] < 6:
            linear = nn.Linear(widths[b], 6, bias=False, dtype=torch.float64)
            linear.weight.data.copy_(emb.projection[at : at + widths[b]].T)
            at += widths[b]
        table = nn.Embedding.from_pretrained(rows.detach())
        for place, i in enumerate(members):
            expected = table(torch.tensor(place))
            expected = expected if linear is None else linear(expected)
            torch.testing.assert_close(emb(torch.tensor(i)), expected)
    held = sum(p.numel() for p in emb.parameters())
    rows_held = sum((stop - start) * d for start, stop, d in zip(edges, edges[1:], widths, strict=False))
    assert held == rows_held + 6 * sum(d for d in widths if d < 6) == emb.footprint().weights // 8
    assert hasattr(emb, "projection") == any(d < 6 for d in widths)


def test_bags_pool_in_the_low_dimension() -> None:
    """Pooling commutes with the matrix, so a bag costs one product: twice the ids, the same products."""
    schema = Schema([FeatureSpec("a", 50, 32, pooling="mean"), FeatureSpec("b", 60, 32)])
    plan = Plan({"a": MixeddimConfig(dims=(32, 4), blocks=(5,)), "b": MixeddimConfig(dims=(4,))})
    coll = EmbeddingCollection(schema, plan, dtype=torch.float64)
    seen: list[tuple[int, ...]] = []
    einsum = torch.einsum

    def spy(equation: str, value: Tensor, matrix: Tensor) -> Tensor:
        seen.append(tuple(value.shape))
        return einsum(equation, value, matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "einsum", spy)
        bags = coll({"a": torch.arange(30).view(3, 10), "b": torch.arange(15).view(3, 5)})
    assert sorted(seen) == [(3, 1, 4), (3, 1, 4)]
    single = coll(torch.stack([torch.arange(30), torch.arange(30)], 1))
    torch.testing.assert_close(bags[:, 0], single[:, 0].view(3, 10, 32).mean(1))
    torch.testing.assert_close(bags[:, 1], single[:15, 1].view(3, 5, 32).sum(1))


@pytest.mark.parametrize(("widths", "blocks"), [((1,), None), ((4,), None), ((16, 4, 1), (60, 120)), ((9, 2), (100,))])
def test_every_block_starts_with_the_variance_of_a_plain_table(widths: Any, blocks: Any) -> None:
    modules = [MixeddimEmbedding(300, 16, dims=widths, blocks=blocks, init="sqrt_rows", seed=s) for s in range(150)]
    values = torch.stack([m.materialize() for m in modules]).double()
    edges = [0, *torch.tensor(blocks or ()).long().cumsum(0).tolist(), 300]
    for start, stop in pairwise(edges):
        assert abs(float(values[:, start:stop].std()) * (3 * 300) ** 0.5 - 1) < 0.06


def test_the_authors_initializer() -> None:
    """Rows and matrix of a table are Xavier's; blocks give outputs the variance that tables of their size would."""
    emb = MixeddimEmbedding(2000, 16, dims=(4,), initializer="xavier")
    for table, bound in ((emb.weight, (6 / 2004) ** 0.5), (emb.projection, (6 / 20) ** 0.5)):
        assert bound * 0.9 < table.abs().max() <= bound
    assert MixeddimEmbedding(2000, 16, dims=(16,), initializer="xavier").weight.abs().max() <= (6 / 2016) ** 0.5
    modules = [
        MixeddimEmbedding(600, 16, dims=(16, 8, 2), blocks=(100, 200), initializer="xavier", seed=s) for s in range(100)
    ]
    values = torch.stack([m.materialize() for m in modules]).double()
    for start, stop, d in ((0, 100, 16), (100, 300, 8), (300, 600, 2)):
        variance = 2 / (stop - start + d) * (d * 2 / (d + 16) if d < 16 else 1)
        assert abs(float(values[:, start:stop].var()) / variance - 1) < 0.12


def test_in_a_fused_collection_tables_update_and_the_matrix_has_gradients() -> None:
    schema = Schema([FeatureSpec("a", 20, 4), FeatureSpec("b", 30, 4)])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, "mixeddim", dims=(4, 2, 1), blocks=(3, 5)), SGD(lr=0.1))
    before = {key: coll.table(key).detach().clone() for key, t in coll.tables.items() if not t.dense}
    coll(torch.tensor([[1, 7], [19, 7]])).sum().backward()
    moved = {k: (coll.table(k) != v).any(1).nonzero().flatten().tolist() for k, v in before.items()}
    assert {k: v for k, v in moved.items() if v} == {"a.block_0": [1], "a.block_2": [11], "b.block_1": [4]}
    (head,) = unfused_parameters(coll)
    assert head.shape == (2, 3, 4)
    assert head.grad.abs().sum(2).bool().tolist() == [[False, False, True], [True, True, False]]


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_a_budget_widens_all_blocks_by_the_rule() -> None:
    spec = FeatureSpec("C1", 101_000, 16)
    config = MixeddimConfig.sized(spec, 16, blocks=(1000,), alpha=0.3)
    assert (config.dims, config.blocks) == ((16, 4), (1000,))  # 16 * 100 ** -0.3 = 4.02
    assert MixeddimConfig.sized(spec, 16, blocks=(1000,), alpha=0.5).dims == (16, 2)
    # The first block serves 9 of 10 lookups: 16 * (100 * 9) ** -0.3 = 2.08
    assert MixeddimConfig.sized(spec, 16, blocks=(1000,), shares=(0.9, 0.1)).dims == (16, 2)
    joined = MixeddimConfig.sized(spec, 16, blocks=(1000,), alpha=0.0)
    assert (joined.dims, joined.blocks) == ((16,), None), "blocks of one width are one table"
    assert MixeddimConfig.sized(spec, 9, blocks=(1000,), rounding="power_of_two").dims == (8, 2)
    assert MixeddimConfig.sized(spec, 9, blocks=(1000,), rounding="multiple_of_4").dims == (8, 4)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 3000), width=st.integers(1, 12), order=st.sampled_from(["ids", "counts"]))
def test_bytes_never_shrink_with_the_size(data: st.DataObject, n: int, width: int, order: Any) -> None:
    cuts = data.draw(st.sets(st.integers(1, max(1, n - 1)), max_size=3)) if n > 1 else set()
    edges = [0, *sorted(cuts)]
    options: dict[str, Any] = {
        "order": order,
        "alpha": data.draw(st.floats(0, 1)),
        "blocks": tuple(b - a for a, b in pairwise(edges)) or None,
        "rounding": data.draw(st.sampled_from(["integer", "power_of_two", "multiple_of_4"])),
    }
    spec = FeatureSpec("C1", n, width)
    sizes = [MixeddimConfig.sized(spec, s, **options).footprint(spec).serve for s in range(1, width + 1)]
    assert sizes == sorted(sizes)
    assert MixeddimConfig.sized(spec, width, **options).dims[0] == width
    budget = data.draw(st.integers(sizes[0], sizes[-1] + 10))
    got = MixeddimConfig.for_budget(spec, budget, **options).footprint(spec).serve
    assert got == max(s for s in sizes if s <= budget)
    assert sizes[-1] <= 4 * n * width + 12 * 4 * -(-n // 64) + (4 * width * width * 3 if cuts else 0)


def greedy(sizes: list[int], width: int, budget: int, alpha: float) -> tuple[list[int], int]:
    """Widths and bytes of the rule as its scale grows, one step after another, leaving out those that do not fit."""

    def cost(i: int, w: int) -> int:
        return 4 * min(sizes[i] * w + w * width * (w < width), sizes[i] * width)

    widths, frozen = [1] * len(sizes), set()
    total = sum(cost(i, 1) for i in range(len(sizes)))
    # w becomes w + 1 where scale * n ** -alpha passes w + 0.5; the full width is taken where it is reached exactly.
    steps = [(min(w + 0.5, width) * n**alpha, i) for i, n in enumerate(sizes) for w in range(1, width)]
    for _, i in sorted(steps):
        grown = total - cost(i, widths[i]) + cost(i, widths[i] + 1)
        if grown > budget:
            frozen.add(i)
        if i not in frozen:
            widths[i] += 1
            total = grown
    return widths, total


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(200, 10**6), min_size=1, max_size=6, unique=True),
    ratio=st.floats(1.0, 14.0),
    alpha=st.floats(0.05, 1),
)
def test_plans_follow_the_rule_across_tables(sizes: list[int], ratio: float, alpha: float) -> None:
    schema = Schema([FeatureSpec(f"f{i}", n, 16) for i, n in enumerate(sizes)])
    budget = int(sum(sizes) * 64 / ratio)
    widths, total = greedy(sizes, 16, budget, alpha)
    if total > budget:
        with pytest.raises(BudgetError):
            Plan.uniform(schema, "mixeddim", budget=budget, alpha=alpha)
        return
    plan = Plan.uniform(schema, "mixeddim", budget=budget, alpha=alpha)
    assert plan.footprint(schema).serve == total
    for name, n, width in zip(schema.names, sizes, widths, strict=True):
        narrow = n * width + width * 16 < n * 16
        assert dims(plan)[name] == ((width,) if narrow else "full")


def test_plans_by_hand() -> None:
    plan = Plan.uniform(SCHEMA, "mixeddim", budget=9_000_000, alpha=0.5)
    # c's second column comes at a scale of 1500, with b at 5, and does not fit; a and b take what is left.
    assert dims(plan) == {"tiny": "full", "a": "full", "b": (10,), "c": (1,)}
    even = Plan.uniform(SCHEMA, "mixeddim", budget=20_000_000, alpha=0.0)
    assert dims(even) == {"tiny": "full", "a": (9,), "b": (9,), "c": (4,)}, "one more column of c does not fit"
    capped = Plan.uniform(SCHEMA, "mixeddim", budget=9_000_000, alpha=0.5, d0=8)
    assert dims(capped) == {"tiny": "full", "a": (8,), "b": (8,), "c": (1,)}
    assert set(dims(Plan.uniform(SCHEMA, "mixeddim", budget="1GiB")).values()) == {"full"}
    small = Schema([FeatureSpec("x", 10_000, 16), FeatureSpec("y", 10_000, 16), FeatureSpec("tiny", 100, 16)])
    budget = 4 * (12 * 10_016 + 16 * 100)
    # Four times the queries are a quarter of the rows, and at alpha = 1/2 twice the width.
    asked = Plan.uniform(small, "mixeddim", budget=budget, alpha=0.5, queries={"x": 4})
    assert dims(asked) == {"x": (8,), "y": (4,), "tiny": "full"}
    # Without room for it, the tiny table follows the rule as well.
    least = Plan.uniform(small, "mixeddim", budget=4 * (2 * 10_016 + 116), alpha=0.5)
    assert dims(least) == {"x": (1,), "y": (1,), "tiny": (1,)}


def test_a_plan_can_find_alpha_instead() -> None:
    """The smallest compressed table is d0 wide, others d0 * (n_min / n) ** alpha with alpha falling from 1."""
    schema = Schema([FeatureSpec("a", 10_000, 64), FeatureSpec("b", 20_000, 64), FeatureSpec("c", 40_000, 64)])
    for alpha in (0.5, 0.8):
        b, c = round(64 * 2**-alpha), round(64 * 4**-alpha)
        budget = 4 * (64 * 10_000 + b * 20_064 + c * 40_064) + 1000
        plan = Plan.uniform(schema, "mixeddim", budget=budget, alpha=None)
        assert dims(plan) == {"a": "full", "b": (b,), "c": (c,)}
    capped = Plan.uniform(schema, "mixeddim", budget=4 * (32 * 10_064 + 16 * 20_064 + 8 * 40_064), alpha=None, d0=32)
    assert dims(capped) == {"a": (32,), "b": (16,), "c": (8,)}
    with pytest.raises(BudgetError, match=r"needs at least .* 2. a smaller `d0`"):
        Plan.uniform(schema, "mixeddim", budget=4_000_000, alpha=None)


def test_plans_share_out_between_the_blocks_of_all_tables() -> None:
    blocks = {"c": (1000, 30_000), "b": (500,)}
    plan = Plan.uniform(SCHEMA, "mixeddim", budget=9_000_000, alpha=0.5, blocks=blocks)
    # n / k of c's blocks is 3000, 90_000 and 2.9e6, of b's 1000 and 199_000, of a 10_000. At a scale of 2557 c's last
    # block would get a second column, which does not fit, with 2557 / 300 = 8.5 for the second.
    assert dims(plan) == {"tiny": "full", "a": "full", "b": (16, 8), "c": (16, 9, 1)}
    assert plan["c"].to_dict()["blocks"] == (1000, 30_000)
    shares = {"c": (0.01, 0.01, 0.98)}
    skewed = Plan.uniform(SCHEMA, "mixeddim", budget=9_000_000, alpha=0.5, blocks=blocks, shares=shares)
    assert skewed["c"].to_dict()["blocks"] == (1000,), "a block asked for less than the next is no wider"
    ids = torch.tensor([[99, 9999, 99_999, 999_999]])
    assert EmbeddingCollection(SCHEMA, plan)(ids).shape == (1, 4, 16)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    ratio=st.floats(1.0, 30.0),
    alpha=st.none() | st.floats(0, 1),
    rounding=st.sampled_from(["integer", "power_of_two", "multiple_of_4"]),
    parts=st.integers(1, 3),
)
def test_no_plan_exceeds_its_budget(
    sizes: list[int], ratio: float, alpha: float | None, rounding: Any, parts: int
) -> None:
    schema = Schema([FeatureSpec(f"f{i}", n, 16) for i, n in enumerate(sizes)])
    budget = max(1, int(sum(sizes) * 64 / ratio))
    blocks = {f"f{i}": tuple(4**j for j in range(1, parts)) for i, n in enumerate(sizes) if n > 50 and parts > 1}
    options: dict[str, Any] = {"alpha": alpha, "rounding": rounding, "blocks": blocks, "order": "counts"}
    try:
        plan = Plan.uniform(schema, "mixeddim", budget=budget, **options)
    except BudgetError:
        return
    plan.check(schema)
    assert plan.footprint(schema).serve <= budget


# -- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["ids", "counts"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("widths", "blocks"), SHAPES)
def test_every_block_is_fitted_to_its_singular_value_bound(
    widths: Any, blocks: Any, weighted: bool, order: Any
) -> None:
    target = torch.randn(40, 6, dtype=torch.float64, generator=generator())
    counts = torch.randperm(40, generator=generator(1)).double() + 1 if weighted else None
    emb = MixeddimEmbedding.from_dense(target, dims=widths, blocks=blocks, order=order, counts=counts)
    importance = torch.ones(40, dtype=torch.float64) if counts is None else counts
    counted = weighted and order == "counts"
    rank = importance.argsort(descending=True) if counted else torch.arange(40)
    edges = [0, *torch.tensor(blocks or ()).long().cumsum(0).tolist(), 40]
    best = 0.0
    for b, (start, stop) in enumerate(pairwise(edges)):
        ids = rank[start:stop]
        scaled = target[ids] * importance[ids].sqrt().unsqueeze(1)
        best += float(torch.linalg.svdvals(scaled)[widths[b] :].square().sum())
    error = ((emb.materialize() - target).square().sum(1) * importance).sum().item()
    assert error == pytest.approx(best, rel=1e-9, abs=1e-18)


def test_a_block_without_counts_is_fitted_all_the_same() -> None:
    target = torch.randn(40, 6, dtype=torch.float64, generator=generator())
    counts = torch.zeros(40)
    counts[:10] = 5
    emb = MixeddimEmbedding.from_dense(target, dims=(6, 3), blocks=(10,), counts=counts)
    torch.testing.assert_close(emb.materialize()[:10], target[:10])
    best = torch.linalg.svdvals(target[10:])[3:].square().sum()
    torch.testing.assert_close((emb.materialize() - target)[10:].square().sum(), best)


def test_fit_sees_every_part_of_a_block() -> None:
    """The energy of column 0 lies at the start of the block and that of column 1 at its end."""
    target = torch.randn(150_000, 3, dtype=torch.float64, generator=generator())
    target[10:1000, 0] *= 30
    target[-1000:, 1] *= 30
    emb = MixeddimEmbedding.from_dense(target, dims=(3, 2), blocks=(10,))
    best = torch.linalg.svdvals(target[10:])[2:].square().sum()
    torch.testing.assert_close((emb.materialize() - target).square().sum(), best, rtol=1e-9, atol=1e-20)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dims": (17,)}, r"`dims` must fall, within \[1, 16\], the feature's width; got \(17,\)"),
        ({"dims": (4, 0), "blocks": (10,)}, "`dims` must fall"),
        ({"dims": (4, 4), "blocks": (10,)}, "`dims` must fall"),
        ({"dims": (2, 4), "blocks": (10,)}, "`dims` must fall"),
        ({"dims": (4, 2)}, "`dims` must hold 1 widths, one per block; got 2"),
        ({"dims": (4,), "blocks": (10,)}, "`dims` must hold 2 widths, one per block; got 1"),
        ({"dims": (4, 2), "blocks": (100,)}, "`blocks` must be integers >= 1 that leave some of the 100 ids"),
        ({"dims": (4, 2), "blocks": (0,)}, "`blocks` must be integers >= 1"),
        ({"dims": (4, 2), "blocks": (1.5,)}, "`blocks` must be a non-empty list of integers"),
        ({"dims": ()}, "`dims` must be a non-empty list of integers"),
        ({"dims": (17, 2), "blocks": (200, 3)}, r"(?s)3 faults.*`blocks`.*hold 3 widths.*must fall"),
    ],
)
def test_wrong_blocks_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MixeddimConfig.from_params(options).program(FeatureSpec("C1", 100, 16))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": 1.5}, r"`alpha` must be a number in \[0, 1\]; got 1.5"),
        ({"alpha": "big"}, "`alpha` must be a number"),
        ({"blocks": (100,)}, r"`blocks` must be integers >= 1.*'C1'"),
        ({"blocks": (2.0,)}, "`blocks` must be integers"),
        ({"blocks": (10,), "shares": (1.0,)}, "`shares` must be 2 numbers > 0"),
        ({"blocks": (10,), "shares": (1.0, 0.0)}, "`shares` must be 2 numbers > 0"),
        ({"rounding": "up"}, "`rounding` must be one of integer, power_of_two, multiple_of_4"),
    ],
)
def test_wrong_ways_of_sizing_are_named(options: dict[str, Any], text: str) -> None:
    spec = FeatureSpec("C1", 100, 16)
    with pytest.raises(ConfigError, match=text):
        MixeddimConfig.for_budget(spec, "1MiB", **options)
    planned = {k: {"C1": v} if k in ("blocks", "shares") else v for k, v in options.items()}
    with pytest.raises(ConfigError, match=text):
        Plan.uniform(Schema([spec]), "mixeddim", budget="1MiB", **planned)


def test_wrong_plans_are_named() -> None:
    for options, text in (
        ({"queries": {"a": 0}}, "`queries` must be a number > 0; got 0"),
        ({"d0": 0}, "`d0` must be an integer >= 1"),
        ({"blocks": (3, 4)}, "`blocks` of a plan must be given per feature name"),
        ({"blocks": (3, 4), "alpha": 2}, "2 faults"),
    ):
        with pytest.raises(ConfigError, match=text):
            Plan.uniform(SCHEMA, "mixeddim", budget="10MiB", **options)
    with pytest.raises(ConfigError, match=r"feature in `queries`.*did you mean 'tiny'"):
        Plan.uniform(SCHEMA, "mixeddim", budget="10MiB", queries={"tinny": 2})
    with pytest.raises(UnknownNameError, match="did you mean 'order'"):
        Plan.uniform(SCHEMA, "mixeddim", budget="10MiB", orders="ids")
