"""freqcut: kept ids have rows, all others one; it is a smaller vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_embed import FeatureSpec, FreqcutConfig, FreqcutEmbedding
from recsys_embed.errors import BudgetError, ConfigError


@settings(max_examples=50, deadline=None)
@given(data=st.data(), n=st.integers(1, 150), counted=st.booleans())
def test_it_is_a_plain_table_of_a_smaller_vocabulary(data: st.DataObject, n: int, counted: bool) -> None:
    kept = data.draw(st.integers(0, n - 1))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    emb = FreqcutEmbedding(n, 3, num_frequent=kept, order="counts" if counted else "ids").assign_(counts)
    rank = (lambda i: (-int(counts[i]), i)) if counted else (lambda i: i)
    vocabulary = sorted(sorted(range(n), key=rank)[:kept])
    row = torch.tensor([vocabulary.index(i) if i in vocabulary else kept for i in range(n)])
    assert emb.weight.shape == (kept + 1, 3)
    assert torch.equal(emb.materialize(), emb.weight[row])
    emb(torch.arange(n)).sum().backward()
    assert torch.equal(emb.weight.grad[:, 0], torch.bincount(row, minlength=kept + 1).float())


def test_keeping_all_but_one_is_a_plain_table() -> None:
    target = torch.randn(50, 4)
    emb = FreqcutEmbedding.from_dense(target, num_frequent=49)
    torch.testing.assert_close(emb.materialize(), target)


def test_rare_ids_are_fitted_by_their_weighted_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    counts = torch.randperm(50, generator=generator).double()
    emb = FreqcutEmbedding.from_dense(target, counts=counts, num_frequent=10, order="counts")
    rare = counts < 40
    torch.testing.assert_close(emb.materialize()[~rare], target[~rare])
    mean = (target * counts.unsqueeze(1))[rare].sum(0) / counts[rare].sum()
    torch.testing.assert_close(emb.materialize()[rare], mean.expand(40, 4))


@given(n=st.integers(1, 3000), budget=st.integers(1, 300_000))
def test_budgets_are_filled_to_the_last_row(n: int, budget: int) -> None:
    spec = FeatureSpec("C1", n, 16)
    if budget < 64:
        with pytest.raises(BudgetError, match="needs at least 64 B"):
            FreqcutConfig.for_budget(spec, budget)
        return
    config = FreqcutConfig.for_budget(spec, budget)
    assert config.num_frequent + 1 == min(n, budget // 64)
    counted = FreqcutConfig.for_budget(spec, budget, order="counts")
    index = min(4 * counted.num_frequent, 12 * -(-n // 64)) if counted.num_frequent else 0
    assert counted.footprint(spec).serve == 64 * (counted.num_frequent + 1) + index <= budget


def test_unseen_ids_are_rare_ones() -> None:
    for order in ("ids", "counts"):
        emb = FreqcutEmbedding(100, 4, num_frequent=30, order=order, unseen="oov").assign_(torch.arange(100))
        assert torch.equal(emb(torch.tensor([100])), emb.weight[30:])


def test_faults_are_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 faults.*`num_frequent` must be in \[0, 9\]; got 10"):
        FreqcutConfig(num_frequent=10).program(FeatureSpec("C1", 10, 4, ids="raw"))
    with pytest.raises(ConfigError, match="`num_frequent` must be an integer"):
        FreqcutConfig(num_frequent=-1)
