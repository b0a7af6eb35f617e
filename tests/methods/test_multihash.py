"""multihash: every form against an independent formula in float64; thinc's keys, hash embeddings and head rows."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed import EmbeddingCollection, FeatureSpec, MultihashConfig, MultihashEmbedding, Plan, Schema
from recsys_embed.core.hashing import hash_rows, hash_signs, salt
from recsys_embed.errors import BudgetError, ConfigError, UnknownNameError
from recsys_embed.optim import RowwiseAdagrad
from recsys_embed.registry import config_from_dict

N, D = 500, 12
IDS = torch.arange(N)


def build(**options: Any) -> MultihashEmbedding:
    return MultihashEmbedding(N, D, **{"num_buckets": 40, **options}).double()


def keys(use: str, k: int, size: int, ids: torch.Tensor = IDS) -> torch.Tensor:
    """``[n, k]``: hash j of every id."""
    return torch.stack([hash_rows(ids, salt(0, "embedding", use, j), size) for j in range(k)], 1)


# --- plain k-hash ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("combine", ["sum", "mean", "concat"])
def test_k_rows_combined(combine: str, sign: bool, separate: bool, k: int) -> None:
    emb = build(num_hashes=k, combine=combine, separate=separate, sign=sign)
    at = keys("row", k, 40)
    tables = [emb.table(f"weight_{j}" if separate else "weight") for j in range(k)]
    assert tables[0].shape == (40, D // k if combine == "concat" else D)
    parts = [tables[j][at[:, j]] for j in range(k)]
    if sign:
        parts = [p * hash_signs(IDS, salt(0, "embedding", "sign", j)).unsqueeze(1) for j, p in enumerate(parts)]
    expected = (
        torch.cat(parts, 1) if combine == "concat" else torch.stack(parts).sum(0) / (k if combine == "mean" else 1)
    )
    torch.testing.assert_close(emb(IDS), expected)


def test_ids_rarely_share_all_rows() -> None:
    """Pairs with equal vectors: about M^-2 of all (methods.md 1.2), against M^-1 with one hash."""
    emb = MultihashEmbedding(2000, 4, num_buckets=50)
    _, counts = emb.materialize().unique(dim=0, return_counts=True)
    pairs = float((counts * (counts - 1)).sum() / 2)
    # A shared table cannot tell (a, b) from (b, a), which doubles the rate.
    expected = 2 * 2000 * 1999 / 2 / 50**2
    assert abs(pairs - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_hashes": 3},
        {"num_hashes": 3, "combine": "mean"},
        {"num_hashes": 3, "combine": "concat"},
        {"num_hashes": 4, "separate": True, "sign": True},
        {"weights": "flat"},
        {"weights": "original", "combine": "mean"},
        {"weights": "original", "append_weights": "inside"},
        {"weights": "indep", "append_weights": "outside"},
        {"weights": "flat", "append_weights": "inside", "combine": "concat"},
        {"num_frequent": 1000, "combine": "concat", "separate": True},
    ],
)
def test_outputs_start_with_the_variance_of_a_plain_table(options: dict[str, Any]) -> None:
    for init, std in (("uniform:0.3", 0.3 / math.sqrt(3)), ("normal:0.02", 0.02)):
        out = [
            MultihashEmbedding(2000, 24, num_buckets=900, init=init, seed=s, **options).materialize() for s in range(3)
        ]
        deviation = torch.stack(out).double().std(dim=(0, 1))
        assert abs(float(deviation.mean()) / std - 1) < 0.06, f"{init}: {deviation}"
        assert float(deviation.max()) < 1.25 * std, f"{init}: {deviation}"
        assert float(deviation.min()) > 0.75 * std, f"{init}: {deviation}"


def test_named_initializers() -> None:
    """Of the released codes: Svenstrup et al.'s Keras layer, the library cce, thinc."""
    big = {"num_buckets": 400, "num_weights": 5000}
    keras = build(preset="svenstrup", **big)
    assert abs(float(keras.weight.detach().std()) - 0.1) < 0.005
    assert abs(float(keras.importance.detach().std()) - 5e-4) < 3e-5
    cce = build(preset="cce", **big)
    for table, bound in ((cce.weight, D**-0.5), (cce.importance, 1.0), (build(preset="thinc").weight, 0.1)):
        assert 0.97 * bound < float(table.detach().abs().max()) <= bound


# --- hash embeddings ------------------------------------------------------------------------------------------------


def importance(emb: MultihashEmbedding, form: str, k: int, rows: int) -> torch.Tensor:
    """``[N, k]`` from the stored ``[rows * k, 1]``, by each form's own definition."""
    matrix = emb.importance.view(rows, k)
    if form == "original":
        return matrix[keys("weight", 1, rows)[:, 0]]
    if form == "indep":
        u = keys("weight", k, rows)
        return torch.stack([matrix[u[:, j], j] for j in range(k)], 1)
    return matrix.view(-1)[keys("weight", k, rows * k)]


@pytest.mark.parametrize("append", [None, "inside", "outside"])
@pytest.mark.parametrize("combine", ["sum", "mean", "concat"])
@pytest.mark.parametrize("form", ["original", "indep", "flat"])
@pytest.mark.parametrize("sparse", [False, True])
def test_hash_embedding_forward_and_both_gradients(form: str, combine: str, append: str | None, sparse: bool) -> None:
    k, rows = 3, 70
    emb = build(
        num_hashes=k,
        combine=combine,
        weights=form,
        num_weights=rows,
        append_weights=append,
        sparse=sparse,
        initializer="cce",
    )
    width = D - k if append == "inside" else D
    assert emb.weight.shape == (40, width // k if combine == "concat" else width)
    assert emb.importance.shape == (rows * k, 1)
    assert emb.output_dim == (D + k if append == "outside" else D)
    ids = torch.tensor([0, 7, 7, 499])
    out = emb(ids)
    w = importance(emb, form, k, rows)[ids]
    parts = [w[:, j : j + 1] * emb.weight[keys("row", k, 40)[ids, j]] for j in range(k)]
    expected = (
        torch.cat(parts, 1) if combine == "concat" else torch.stack(parts).sum(0) / (k if combine == "mean" else 1)
    )
    if append:
        expected = torch.cat([expected, w / (math.sqrt(D) if append == "inside" else 1)], 1)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(out, [emb.weight, emb.importance], upstream)
    wanted = torch.autograd.grad(expected, [emb.weight, emb.importance], upstream)
    assert all(g.is_sparse == sparse for g in got)
    for g, e in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.to_dense() if sparse else g, e)


def test_gradients_are_those_of_the_paper() -> None:
    """dP[u, j] = <g, E[h_j]> and dE[h_j] += P[u, j] g, written out for one id."""
    emb = build(weights="original", num_weights=70, initializer="cce")
    x, g = 123, torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, rows = int(keys("weight", 1, 70)[x, 0]), keys("row", 2, 40)[x].tolist()
    emb(torch.tensor(x)).backward(g)
    d_pool, d_weights = torch.zeros_like(emb.weight), torch.zeros(70, 2, dtype=torch.float64)
    for j in range(2):
        d_pool[rows[j]] += emb.importance.detach().view(70, 2)[u, j] * g
        d_weights[u, j] = emb.weight.detach()[rows[j]] @ g
    torch.testing.assert_close(emb.weight.grad, d_pool)
    torch.testing.assert_close(emb.importance.grad.view(70, 2), d_weights)


def test_gradcheck() -> None:
    emb = MultihashEmbedding(
        30, 4, num_buckets=5, weights="flat", num_weights=11, append_weights="inside", initializer="cce"
    ).double()

    def run(weight: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(emb, {"weight": weight, "importance": scalars}, (IDS[:30],))
        return out

    assert torch.autograd.gradcheck(run, (emb.weight, emb.importance))


def test_weights_of_the_three_forms_come_from_one_or_k_hashes() -> None:
    """Two ids that share u share all weights under "original" alone."""
    n, rows = 3000, 50
    shared = {}
    for form in ("original", "indep", "flat"):
        program = MultihashConfig(num_buckets=40, weights=form, num_weights=rows).program(FeatureSpec("f", n, 4))
        at = torch.stack([p.weight.transform.rows(torch.arange(n)) for p in program.row_lookups if p.weight], 1)
        assert 0 <= int(at.min()) <= int(at.max()) < rows * 2
        if form != "flat":
            assert torch.equal(at % 2, torch.tensor([0, 1]).expand(n, 2))
        shared[form] = len(at.unique(dim=0))
    assert shared["original"] == rows
    assert shared["indep"] > 0.6 * rows**2
    assert shared["flat"] > 0.8 * n


def test_default_number_of_weights_follows_the_guideline() -> None:
    emb = build(weights="original")
    assert emb.importance.shape == (10 * 40 * 2, 1)


def test_outside_cannot_be_fitted() -> None:
    with pytest.raises(ConfigError, match="append_weights='outside'"):
        MultihashEmbedding.from_dense(torch.randn(50, 4), num_buckets=9, weights="flat", append_weights="outside")
    fitted = MultihashEmbedding.from_dense(torch.randn(50, 4), num_buckets=25, weights="flat", append_weights="inside")
    assert torch.isfinite(fitted.materialize()).all()


# --- thinc ----------------------------------------------------------------------------------------------------------

# mmh3.hash_bytes(struct.pack("<Q", key), seed, x64arch=True) as four little-endian uint32.
MMH3 = {
    (0, 0): (3428303819, 685728695, 3303603794, 4065689084),
    (1, 0): (4211459146, 4457399, 3547175942, 1032506804),
    (2**40 + 3, 7): (623007057, 821872277, 1293080303, 403186894),
    (2**64 - 1, 2**32 - 1): (88181733, 672240216, 4087153151, 3796020537),
}


@pytest.mark.parametrize(("key", "seed"), MMH3)
@pytest.mark.parametrize("rows", [7, 1000, 5000])
def test_thinc_sums_the_rows_of_its_four_keys(key: int, seed: int, rows: int) -> None:
    spec_rows = 10_000
    emb = MultihashEmbedding(spec_rows, 6, config=MultihashConfig.thinc(rows, seed=seed)).double()
    (signed,) = struct.unpack("<q", struct.pack("<Q", key))
    assert emb.weight.shape == (rows, 6)
    expected = emb.weight[[w % rows for w in MMH3[key, seed]]].sum(0)
    torch.testing.assert_close(emb(torch.tensor([signed]))[0], expected)


def test_thinc_adds_the_gradient_once_per_key_even_where_keys_agree() -> None:
    """MMH3[0, 0] % 3 is (2, 0, 1, 0): row 0 is read twice."""
    at = [w % 3 for w in MMH3[0, 0]]
    assert len(set(at)) < 4
    emb = MultihashEmbedding(10, 2, preset="thinc", num_buckets=3)
    emb(torch.tensor([0])).backward(torch.tensor([[1.0, -2.0]]))
    counts = torch.bincount(torch.tensor(at), minlength=3).float()
    assert int(counts.max()) >= 2
    torch.testing.assert_close(emb.weight.grad, counts.unsqueeze(1) * torch.tensor([1.0, -2.0]))


def test_thinc_is_salted_by_its_seed_alone() -> None:
    first, other = (MultihashEmbedding(100, 4, preset="thinc", num_buckets=50, name=n, seed=3) for n in ("a", "b"))
    other.load_state_dict({k: v for k, v in first.state_dict().items() if k == "weight"}, strict=False)
    assert torch.equal(first.materialize(), other.materialize())


def test_presets_are_shorthands_that_options_override() -> None:
    assert MultihashConfig.from_params({"preset": "thinc", "num_buckets": 9, "seed": 5}) == MultihashConfig.thinc(9, 5)
    mean = MultihashConfig.from_params({"preset": "thinc", "num_buckets": 9, "combine": "mean", "num_hashes": 2})
    assert (mean.hash, mean.combine, mean.num_hashes) == ("murmur", "mean", 2)
    assert config_from_dict(mean.to_dict()) == mean
    with pytest.raises(UnknownNameError, match="did you mean 'thinc'"):
        MultihashConfig.from_params({"preset": "think", "num_buckets": 9})
    assert MultihashEmbedding(10_000, 16, preset="thinc", budget="64KiB").config.num_buckets == 1024


# --- frequency split ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combine", "separate"), [("sum", False), ("sum", True), ("concat", True)], ids=["sum", "sum-separate", "concat"]
)
def test_head_ids_own_their_vector_and_the_others_hash_past_them(combine: str, separate: bool) -> None:
    head = 60
    emb = build(num_frequent=head, combine=combine, separate=separate)
    shapes = {n: tuple(p.shape) for n, p in emb.named_parameters()}
    at = keys("row", 2, 40)
    if combine == "concat":
        assert shapes == {"weight_0": (100, 6), "weight_1": (100, 6)}
        full = torch.cat([emb.weight_0[:head], emb.weight_1[:head]], 1)
        tail = torch.cat([emb.weight_0[head + at[:, 0]], emb.weight_1[head + at[:, 1]]], 1)
    elif separate:
        assert shapes == {"weight_0": (100, D), "weight_1": (40, D)}
        full, tail = emb.weight_0[:head], emb.weight_0[head + at[:, 0]] + emb.weight_1[at[:, 1]]
    else:
        assert shapes == {"weight": (100, D)}
        full, tail = emb.weight[:head], emb.weight[head + at[:, 0]] + emb.weight[head + at[:, 1]]
    torch.testing.assert_close(emb(IDS[:head]), full)
    torch.testing.assert_close(emb(IDS[head:]), tail[head:])


@pytest.mark.parametrize("options", [{}, {"separate": True}, {"separate": True, "combine": "concat"}])
def test_no_gradient_crosses_between_head_and_tail(options: dict[str, Any]) -> None:
    emb = build(num_frequent=60, **options)
    emb(IDS[60:]).square().sum().backward()
    for name, p in emb.named_parameters():
        if p.shape[0] == 100:
            assert not p.grad[:60].any(), f"tail ids reached the private rows of {name}"
    emb.zero_grad()
    emb(torch.tensor([5, 5])).sum().backward()
    touched = {n: p.grad.any(1).nonzero().flatten().tolist() for n, p in emb.named_parameters() if p.grad is not None}
    assert all(rows in ([5], []) for rows in touched.values()), touched
    assert [5] in touched.values()
    assert all(float(p.grad.abs().max()) in (0.0, 2.0) for p in emb.parameters() if p.grad is not None)


def test_head_in_a_fused_collection_leaves_absent_rows_alone() -> None:
    schema = Schema([FeatureSpec("a", 100, 4), FeatureSpec("b", 80, 4)])
    coll = EmbeddingCollection(
        schema, Plan.uniform(schema, "multihash", num_buckets=10, num_frequent=20), RowwiseAdagrad(lr=0.1)
    )
    before = {k: coll.table(k).detach().clone() for k in coll.tables}
    coll(torch.tensor([[3, 19]])).sum().backward()
    moved = {k: (coll.table(k) != v).any(1).nonzero().flatten().tolist() for k, v in before.items()}
    assert moved == {"a.weight": [3], "b.weight": [19]}


def test_frequent_share_splits_a_budget() -> None:
    spec = FeatureSpec("C1", 10_000, 16)
    config = MultihashConfig.for_budget(spec, 64_000, frequent_share=0.25)
    assert (config.num_frequent, config.num_buckets) == (250, 750)
    schema = Schema([spec, FeatureSpec("C2", 300, 16)])
    plan = Plan.uniform(schema, "multihash", budget=100_000, frequent_share=0.25, combine="concat", separate=True)
    assert plan.footprint(schema).serve <= 100_000
    for share in (1.0, -0.1, "half"):
        with pytest.raises(ConfigError, match="`frequent_share`"):
            MultihashConfig.for_budget(spec, 64_000, frequent_share=share)


# --- budgets and errors ---------------------------------------------------------------------------------------------


@given(
    st.integers(2, 3000),
    st.sampled_from([8, 12, 24]),
    st.integers(1, 600_000),
    st.sampled_from(
        [
            {},
            {"num_hashes": 4, "separate": True},
            {"combine": "concat", "num_hashes": 4},
            {"weights": "original"},
            {"weights": "flat", "num_hashes": 3, "append_weights": "inside"},
            {"weights": "indep", "append_weights": "outside"},
            {"weights": "flat", "num_weights": 100},
            {"preset": "thinc"},
            {"frequent_share": 0.3},
            {"num_frequent": 1},
        ]
    ),
)
def test_budgets_are_filled_and_never_exceeded(n: int, width: int, budget: int, options: dict[str, Any]) -> None:
    spec = FeatureSpec("C1", n, width)
    try:
        config = MultihashConfig.for_budget(spec, budget, **options)
    except BudgetError:
        assert MultihashConfig.sized(spec, 1, **options).footprint(spec).serve > budget
        return
    size = config.footprint(spec).serve
    assert size <= budget
    buckets = config.num_buckets + (config.num_frequent if "frequent_share" in options else 0)
    if buckets < MultihashConfig.max_size(spec, **options):
        more = MultihashConfig.sized(spec, buckets + 1, **options).footprint(spec).serve
        assert size <= more
        assert more > budget, "one row more would have fitted"


def test_a_budget_is_half_rows_and_half_weights() -> None:
    spec = FeatureSpec("C1", 1_000_000, 16)
    for options in ({"weights": "original"}, {"weights": "flat", "num_hashes": 4, "separate": True}):
        config = MultihashConfig.for_budget(spec, "1MiB", **options)
        tables = {t.name: 4 * t.rows * t.width for t in config.program(spec).tables}
        weights = tables.pop("importance")
        assert abs(weights - 2**19) < 2000
        assert abs(sum(tables.values()) - 2**19) < 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_buckets": 501}, r"`num_buckets` must be in \[1, 500\]; got 501"),
        ({"num_hashes": 5, "combine": "concat"}, "`num_hashes` must divide embedding_dim 12"),
        ({"num_hashes": 5, "hash": "murmur"}, r"`num_hashes` must be in \[1, 4\] with hash='murmur'"),
        ({"hash": "murmur", "seed": -1}, r"`seed` must be in \[0, 4294967295\]"),
        ({"num_weights": 9}, "`num_weights` needs `weights`"),
        ({"append_weights": "inside"}, "`append_weights` needs `weights`"),
        ({"weights": "flat", "append_weights": "inside", "num_hashes": 12}, "leaves no column"),
        ({"weights": "flat", "num_weights": 2**30, "num_hashes": 3}, r"`num_weights` must be in \[1, "),
        ({"num_frequent": 500}, r"`num_frequent` must be in \[0, 499\]; got 500"),
        ({"num_frequent": 5, "combine": "mean"}, "`num_frequent` goes with combine='sum' or 'concat'"),
        ({"num_frequent": 5, "weights": "flat"}, "`num_frequent` goes with"),
        ({"num_frequent": 5, "combine": "concat"}, "needs separate=True"),
        ({"num_hashes": 0}, r"`num_hashes` must be an integer in \[1, 64\]; got 0"),
    ],
)
def test_errors_name_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_head_refuses_raw_ids_and_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError, match="2 faults") as error:
        MultihashConfig(num_buckets=9, num_frequent=3, combine="mean").program(FeatureSpec("C1", 100, 4, ids="raw"))
    assert "raw ids" in str(error.value)
