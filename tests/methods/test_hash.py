"""hash: the hashing trick against its definition, signs, salts and budgets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed import FeatureSpec, HashConfig, HashEmbedding
from recsys_embed.errors import BudgetError, ConfigError

IDS = torch.tensor([0, 1, 999_999, 2**24 + 1, 2**40 + 3, 2**63 - 1])


def rows(config: HashConfig, spec: FeatureSpec, ids: torch.Tensor) -> torch.Tensor:
    (row_lookup,) = config.program(spec).row_lookups
    return row_lookup.transform.rows(ids)


def test_mod_is_the_remainder() -> None:
    emb = HashEmbedding(1_000_000, 4, num_buckets=1009, hash="mod")
    assert torch.equal(emb(IDS), emb.weight[[x % 1009 for x in IDS.tolist()]])


def test_mod_takes_negative_ids_as_python_does() -> None:
    emb = HashEmbedding(1_000_000, 4, num_buckets=1009, hash="mod")
    ids = torch.tensor([-1, -1010, -(2**63)])
    assert torch.equal(emb(ids), emb.weight[[x % 1009 for x in ids.tolist()]])


@pytest.mark.parametrize("sign", [False, True])
def test_output_is_the_signed_row_and_gradient_the_signed_sum(sign: bool) -> None:
    emb = HashEmbedding(100, 3, num_buckets=7, sign=sign, sparse=True).double()
    ids, out_grad = torch.arange(100), torch.randn(100, 3, dtype=torch.float64)
    at = rows(emb.config, emb.spec, ids)
    out = emb(ids)
    signs = (out / emb.weight[at])[:, :1].detach()
    assert set(signs.flatten().tolist()) == ({-1.0, 1.0} if sign else {1.0})
    out.backward(out_grad)
    grad = torch.zeros(7, 3, dtype=torch.float64).index_add_(0, at, signs * out_grad)
    assert emb.weight.grad.is_sparse
    torch.testing.assert_close(emb.weight.grad.to_dense(), grad)


def test_signs_make_inner_products_unbiased() -> None:
    """Weinberger et al. 2009, Lemma 2, over hash seeds: E <phi(u), phi(v)> = <u, v>, which needs the signs."""
    u, v = torch.rand(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, buckets, trials = torch.arange(30).unsqueeze(0), 8, 400
    found = {}
    for sign in (False, True):
        products = []
        for seed in range(trials):
            emb = HashEmbedding(30, buckets, num_buckets=buckets, sign=sign, seed=seed, mode="sum").double()
            with torch.no_grad():
                emb.weight.copy_(torch.eye(buckets))
                products.append((emb(ids, None, u[None]) * emb(ids, None, v[None])).sum())
        found[sign] = torch.stack(products)
    true = u @ v
    error = {sign: float((p.mean() - true) / (p.std() / math.sqrt(trials))) for sign, p in found.items()}
    assert abs(error[True]) < 4
    assert error[False] > 20
    collisions = (u.sum() * v.sum() - true) / buckets
    assert abs(float(found[False].mean() - true - collisions)) < 0.1 * float(collisions)


def test_signed_vectors_of_two_ids_are_uncorrelated() -> None:
    """E <e(x), e(y)> is 1/buckets of a row's squared norm without signs and 0 with them."""
    pairs, buckets = 20_000, 5
    means = {}
    for sign in (False, True):
        emb = HashEmbedding(2 * pairs, buckets, num_buckets=buckets, sign=sign)
        with torch.no_grad():
            emb.weight.copy_(torch.eye(buckets))
        out = emb.materialize()
        means[sign] = float((out[:pairs] * out[pairs:]).sum(1).mean())
    assert abs(means[False] - 1 / buckets) < 4 * math.sqrt(0.16 / pairs)
    assert abs(means[True]) < 4 * math.sqrt(0.2 / pairs)


def test_rows_start_with_the_law_of_the_original_cardinality() -> None:
    emb = HashEmbedding(10_000, 32, num_buckets=100, init="sqrt_rows")
    bound = 10_000**-0.5
    assert emb.weight.abs().max() <= bound
    assert emb.weight.abs().max() > 0.99 * bound
    assert abs(float(emb.weight.detach().std()) - bound / math.sqrt(3)) < 0.03 * bound


def test_salted_by_name_and_seed_and_nothing_else() -> None:
    ids, config = torch.arange(1000), HashConfig(num_buckets=500)
    first = rows(config, FeatureSpec("C1", 1000, 4), ids)
    assert torch.equal(first, rows(config, FeatureSpec("C1", 9999, 16, ids="raw"), ids))
    for other in (
        rows(config, FeatureSpec("C2", 1000, 4), ids),
        rows(HashConfig(num_buckets=500, seed=1), FeatureSpec("C1", 1000, 4), ids),
    ):
        assert float((first == other).double().mean()) < 0.02


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(1, 900_000))
def test_budgets_are_filled_to_the_last_row_and_never_exceeded(n: int, width: int, budget: int) -> None:
    spec = FeatureSpec("C1", n, width)
    if budget < 4 * width:
        with pytest.raises(BudgetError):
            HashConfig.for_budget(spec, budget)
        return
    config = HashConfig.for_budget(spec, budget)
    assert config.num_buckets == min(n, budget // (4 * width))


def test_errors_name_option_range_and_feature() -> None:
    with pytest.raises(ConfigError, match=r"`num_buckets` must be an integer in \[1, .*\]; got 0"):
        HashConfig(num_buckets=0)
    with pytest.raises(ConfigError, match=r"`num_buckets` must be in \[1, 10\]; got 11 .*'C3'"):
        HashConfig(num_buckets=11).program(FeatureSpec("C3", 10, 4))
    with pytest.raises(ConfigError, match="did you mean 'num_buckets'"):
        HashEmbedding(10, 4, num_bucket=3)
