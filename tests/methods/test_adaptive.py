"""adaptive: hot ids own rows and nobody else's, the others hash; what it stores and how a budget divides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys_embed import AdaptiveConfig, AdaptiveEmbedding, EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core import hashing
from recsys_embed.errors import ConfigError
from recsys_embed.optim import SGD


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def remap(counts: Tensor, hot: int, buckets: int, name: str = "embedding") -> list[int]:
    """Row of every id by DeepRec's definition: a remap array with a place for hot ids and a bucket for others."""
    by_count = sorted(range(len(counts)), key=lambda i: (-float(counts[i]), i))
    hot_ids = sorted(by_count[:hot])
    hashed = hashing.hash_rows(torch.arange(len(counts)), hashing.salt(0, name, "row", 0), buckets).tolist()
    return [hot_ids.index(i) if i in hot_ids else hot + hashed[i] for i in range(len(counts))]


def numbered(emb: AdaptiveEmbedding) -> list[int]:
    """The row that each id reads."""
    emb.weight.data.copy_(torch.arange(len(emb.weight)).unsqueeze(1).expand_as(emb.weight))
    return [int(x) for x in emb.materialize()[:, 0]]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), n=st.integers(2, 150))
def test_hot_ids_own_rows_and_the_rest_hash(data: st.DataObject, n: int) -> None:
    hot = data.draw(st.integers(0, n - 1))
    buckets = data.draw(st.integers(1, n - hot))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    ranks = torch.arange(n, 0, -1)
    options: dict[str, Any] = {"num_frequent": hot, "num_buckets": buckets}
    assert numbered(AdaptiveEmbedding(n, 2, **options)) == remap(ranks, hot, buckets)
    assert numbered(AdaptiveEmbedding(n, 2, order="counts", **options)) == remap(ranks, hot, buckets)
    assert numbered(AdaptiveEmbedding(n, 2, order="counts", **options).assign_(counts)) == remap(counts, hot, buckets)
    assert numbered(AdaptiveEmbedding(n, 2, **options).assign_(counts)) == remap(ranks, hot, buckets)


def test_a_hot_row_learns_from_its_own_id_alone() -> None:
    emb = AdaptiveEmbedding(500, 4, num_frequent=20, num_buckets=7, order="counts").assign_(torch.arange(500))
    emb(torch.arange(500)).sum().backward()
    uses = emb.weight.grad[:, 0]
    assert (uses[:20] == 1).all()
    assert uses[20:].sum() == 480


def test_rows_are_those_of_the_budget_formula_and_index_bytes_come_on_top() -> None:
    for n, hot, buckets, index in ((10_000, 500, 500, 1884), (10_000, 100, 900, 400), (64, 30, 4, 12)):
        spec = FeatureSpec("C1", n, 16)
        plain = AdaptiveConfig(num_frequent=hot, num_buckets=buckets).footprint(spec)
        assert (plain.weights, plain.index) == (4 * 16 * (hot + buckets), 0)
        counted = AdaptiveConfig(num_frequent=hot, num_buckets=buckets, order="counts").footprint(spec)
        assert (counted.weights, counted.index) == (plain.weights, index), "12 bytes per 64 ids, or 4 per hot id"


@given(
    n=st.integers(1, 5000),
    budget=st.integers(64, 400_000),
    share=st.none() | st.floats(0, 0.999),
    order=st.sampled_from(["ids", "counts"]),
)
def test_budgets_divide_between_hot_and_shared_rows(n: int, budget: int, share: float | None, order: Any) -> None:
    spec = FeatureSpec("C1", n, 16)
    given_share: dict[str, Any] = {} if share is None else {"frequent_share": share}
    config = AdaptiveConfig.for_budget(spec, budget, order=order, **given_share)
    rows, used = config.num_frequent + config.num_buckets, config.footprint(spec).serve
    assert used <= budget
    assert config.num_frequent == int((0.5 if share is None else share) * rows)
    assert rows == n or budget - used < 64 + 12, "less is left than one more row, and what its id takes in the index"


def test_with_the_hot_ids_given_the_budget_goes_to_the_others() -> None:
    spec = FeatureSpec("C1", 1000, 16)
    config = AdaptiveConfig.for_budget(spec, 64 * 150, num_frequent=100)
    assert (config.num_frequent, config.num_buckets) == (100, 50)
    assert AdaptiveConfig.for_budget(spec, "1GiB", num_frequent=100).num_buckets == 900


def test_a_fit_keeps_hot_rows_and_averages_the_others() -> None:
    target = torch.randn(200, 6, dtype=torch.float64, generator=generator())
    counts = torch.randint(1, 50, (200,), generator=generator(1)).double()
    emb = AdaptiveEmbedding.from_dense(target, counts=counts, num_frequent=30, num_buckets=9, order="counts")
    row = torch.tensor(remap(counts, 30, 9))
    total = torch.zeros(39, 6, dtype=torch.float64).index_add_(0, row, target * counts.unsqueeze(1))
    mass = torch.zeros(39, dtype=torch.float64).index_add_(0, row, counts)
    torch.testing.assert_close(emb.weight, total / mass.unsqueeze(1))
    hot = row < 30
    torch.testing.assert_close(emb.materialize()[hot], target[hot])


def test_in_a_collection_each_features_counts_decide() -> None:
    schema = Schema([FeatureSpec("a", 70, 4), FeatureSpec("b", 300, 4), FeatureSpec("c", 90, 4)])
    plan = Plan({
        "a": AdaptiveConfig(num_frequent=30, num_buckets=5, order="counts"),
        "b": AdaptiveConfig(num_frequent=10, num_buckets=6, order="counts"),
        "c": AdaptiveConfig(num_frequent=8, num_buckets=3),
    })  # fmt: skip
    counts = {s.name: torch.randint(0, 99, (s.num_embeddings,), generator=generator(i)) for i, s in enumerate(schema)}
    coll = EmbeddingCollection(schema, plan, SGD(0.1)).assign_(counts)
    ids = torch.stack([torch.randint(0, s.num_embeddings, (50,), generator=generator(9)) for s in schema], 1)
    out = coll(ids)
    rows = [
        remap(counts["a"], 30, 5, "a"),
        remap(counts["b"], 10, 6, "b"),
        remap(torch.arange(90, 0, -1), 8, 3, "c"),
    ]
    for f, name in enumerate(schema.names):
        assert torch.equal(out[:, f], coll.table(f"{name}.weight")[torch.tensor(rows[f])[ids[:, f]]])


def test_unseen_ids_are_never_hot() -> None:
    emb = AdaptiveEmbedding(100, 4, num_frequent=30, num_buckets=5, order="counts", unseen="oov").assign_(
        torch.ones(100)
    )
    emb(torch.tensor([100, -7])).sum().backward()
    touched = emb.weight.grad.any(1).nonzero().flatten().tolist()
    assert len(touched) == 1
    assert touched[0] >= 30


def test_faults_are_named() -> None:
    spec = FeatureSpec("C1", 10, 4)
    for options, text in (
        (
            {"num_frequent": 10, "num_buckets": 1},
            r"`num_frequent` must be in \[0, 9\]; got 10; with a budget use `frequent_share`",
        ),
        ({"num_frequent": 6, "num_buckets": 5}, r"`num_buckets` must be in \[1, 4\]"),
        ({"num_frequent": 6, "num_buckets": 0}, "`num_buckets` must be an integer in"),
        ({"num_frequent": 6, "num_buckets": 1, "order": "rank"}, "`order` must be one of ids, counts"),
    ):
        with pytest.raises(ConfigError, match=text):
            AdaptiveConfig.from_params(options).program(spec)
    shares: list[dict[str, Any]] = [{"frequent_share": share} for share in (1.0, -0.1, "half", True)]
    for wrong in (*shares, {"frequent_share": 0.5, "num_frequent": 3}):
        with pytest.raises(ConfigError, match="`frequent_share` must be a number in"):
            AdaptiveConfig.for_budget(spec, "1KiB", **wrong)
    with pytest.raises(ConfigError, match="`num_frequent` must be an integer"):
        AdaptiveConfig.for_budget(spec, "1KiB", num_frequent="3")
    with pytest.raises(ConfigError, match=r"needs vocabulary indices"):
        AdaptiveConfig(num_frequent=1, num_buckets=1).program(FeatureSpec("C1", 10, 4, ids="raw"))
