"""What the complementary-partitions paper claims (Shi et al., KDD 2020), and where its code is not followed."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.heads import per_class_mlp
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.kernels import reference
from recsys_embed.methods.compositional import CompositionalConfig, CompositionalEmbedding
from recsys_embed.plan import Plan
from recsys_embed.registry import MethodInfo, config_from_dict
from recsys_embed.testing import EMBEDDING_CHECKS
from tests.methods.complementary import PARTITIONS, SHAPES, classes_by_definition, make_spec

COMBINES = ("mul", "sum", "concat", "feature", "path")


# -- faults ---------------------------------------------------------------------------------------------------------


def test_all_faults_at_once() -> None:
    config = CompositionalConfig(
        partition="chinese_remainder", moduli=(6, 4, 9), num_partitions=2, combine="concat", num_collisions=5
    )
    with pytest.raises(ConfigError) as caught:
        config.program(make_spec(1000, 1))
    text = str(caught.value)
    assert text.startswith("5 faults in CompositionalConfig, feature 'C1'")
    for part in (
        "`embedding_dim` must be at least the 2 tables that 'concat' joins; got 1",
        "`moduli` must be as many as `num_partitions`, 2; got 3",
        "`moduli` must be pairwise coprime for 'chinese_remainder'; got 6 and 4 share 2, 6 and 9 share 3",
        "`moduli` must have a product >= 1000, the number of ids; got 216",
        "`num_collisions` and `moduli` both size the tables",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"`num_collisions` or `moduli` is missing; .*`budget`"),
        ({"num_collisions": 0}, r"`num_collisions` must be an integer >= 1, or None; got 0"),
        ({"num_collisions": 101}, r"`num_collisions` must be in \[1, 100\]; got 101"),
        ({"num_collisions": 4, "num_partitions": 3}, r"must be 2 for partition 'quotient_remainder'; got 3"),
        ({"moduli": (10, 9)}, r"product >= 100, the number of ids; got 90"),
        ({"moduli": (10, 10), "affine": True}, r"product >= 101, the prime of the affine map of 100 ids; got 100"),
        ({"moduli": (100,)}, r"`moduli` must be 2 or more integers >= 1; got \(100,\)"),
        ({"moduli": (50, 0)}, r"`moduli` must be 2 or more integers >= 1"),
        ({"moduli": (50, 2.0)}, r"`moduli` must be a non-empty list of integers"),
        ({"moduli": "ab"}, r"`moduli` must be a non-empty list of integers, or None; got 'ab'"),
        ({"combine": "path", "bag": "pooled", "num_collisions": 4}, r"`bag` must be 'per_id' for combine 'path'"),
        ({"partition": "quotient"}, r"`partition` must be one of quotient_remainder, generalized"),
        ({"modulo": 4}, r"did you mean 'moduli'"),
    ],
)
def test_faults_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompositionalConfig.from_params(options).program(make_spec(100))


def test_size_options_and_a_budget_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="leave them out to size by bytes"):
        CompositionalEmbedding(1000, 8, budget=8000, num_collisions=4)


# -- combination ----------------------------------------------------------------------------------------------------


def _oracle(module: CompositionalEmbedding, ids: list[int]) -> Tensor:
    """Vectors by a loop over ids in float64."""
    config, moduli = module.config, module.config.moduli_of(module.spec)
    assert moduli is not None
    affine = module.program.row_lookups[0].transform.affine  # type: ignore[attr-defined]
    values = {name: p.detach().double() for name, p in module.named_parameters()}
    out = []
    for x in ids:
        classes = classes_by_definition(config.partition, moduli, x, affine)
        if config.combine == "path":
            v = values["part0"][classes[0]]
            for j, c in enumerate(classes[1:], start=1):
                w1, b1, w2, b2 = (
                    values[f"part{j}_{n}"][c] for n in ("hidden_weight", "hidden_bias", "out_weight", "out_bias")
                )
                v = (v @ w1 + b1).clamp_min(0) @ w2 + b2
            out.append(v)
            continue
        rows = [values[f"part{j}"][c] for j, c in enumerate(classes)]
        if config.combine == "mul":
            out.append(torch.stack(rows).prod(0))
        elif config.combine == "sum":
            out.append(torch.stack(rows).sum(0))
        else:
            out.append(torch.cat(rows))
    return torch.stack(out)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(("partition", "k"), SHAPES)
def test_lookup_is_the_definition(partition: str, k: int, combine: str, affine: bool) -> None:
    n = 30_011
    module = CompositionalEmbedding(
        n,
        11,
        partition=partition,
        num_partitions=k,
        combine=combine,
        affine=affine,
        num_collisions=12,
        hidden=5,
        dtype=torch.float64,
    )
    assert module.config.moduli_of(module.spec) is not None
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-1, 1)
    ids = [0, 1, 12, n - 1, n - 2, 7, 7, 15_000, *range(100, 160)]
    out = module(torch.tensor(ids))
    torch.testing.assert_close(out, _oracle(module, ids), rtol=1e-12, atol=1e-12)
    assert out.shape[1] == (11 * k if combine == "feature" else 11)


@pytest.mark.parametrize("k", [2, 3])
def test_gradients_of_a_product_are_the_other_factors(k: int) -> None:
    module = CompositionalEmbedding(
        1000, 4, partition="generalized", num_partitions=k, num_collisions=20, dtype=torch.float64, mode="sum"
    )
    ids = torch.tensor([[3, 3, 999], [500, 3, 1]])
    upstream = torch.randn(2, 4, dtype=torch.float64)
    module(ids).backward(upstream)
    moduli = module.config.moduli_of(module.spec)
    assert moduli is not None
    for j in range(k):
        expected = torch.zeros_like(module.table(f"part{j}"))
        for bag, row in enumerate(ids.tolist()):
            for x in row:
                classes = classes_by_definition("generalized", moduli, x)
                others = [module.table(f"part{i}")[c].detach() for i, c in enumerate(classes) if i != j]
                expected[classes[j]] += upstream[bag] * torch.stack(others).prod(0)
        torch.testing.assert_close(module.table(f"part{j}").grad, expected, rtol=1e-12, atol=1e-12)


def test_concatenated_vectors_are_unique_and_so_are_products() -> None:
    for combine in ("concat", "mul", "sum"):
        module = CompositionalEmbedding(10_000, 16, combine=combine, num_collisions=100)
        table = module.materialize()
        assert len(table.unique(dim=0)) == 10_000, combine
    assert module.footprint().serve == 200 * 16 * 4, "10,000 vectors from 2 sqrt(n) rows"


# -- bags -----------------------------------------------------------------------------------------------------------


def _pair(**options: Any) -> tuple[CompositionalEmbedding, CompositionalEmbedding]:
    options = {"num_collisions": 10, "dtype": torch.float64, **options}
    per_id, pooled = (CompositionalEmbedding(500, 6, bag=b, **options) for b in ("per_id", "pooled"))
    pooled.load_state_dict({k: v for k, v in per_id.state_dict().items() if k != "_extra_state"}, strict=False)
    return per_id, pooled


def test_pooled_bags_are_products_of_sums_and_differ_from_sums_of_products() -> None:
    per_id, pooled = _pair(mode="sum")
    ids = torch.tensor([[3, 417], [12, 13]])
    q, r = per_id.table("part0"), per_id.table("part1")
    own = (q[ids // 10] * r[ids % 10]).sum(1)
    dlrm = q[ids // 10].sum(1) * r[ids % 10].sum(1)
    torch.testing.assert_close(per_id(ids), own)
    torch.testing.assert_close(pooled(ids), dlrm)
    assert not torch.allclose(own, dlrm)
    torch.testing.assert_close(pooled(ids[:, :1]), per_id(ids[:, :1]))
    for module, expected in ((per_id, own), (pooled, dlrm)):
        weight = torch.randn(2, 6, dtype=torch.float64)
        got = torch.autograd.grad((module(ids) * weight).sum(), [module.table("part0"), module.table("part1")])
        want = torch.autograd.grad((expected * weight).sum(), [q, r], retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_weights_of_pooled_bags_act_on_every_factor() -> None:
    per_id, pooled = _pair(mode="sum")
    ids, weights = torch.tensor([[123]]), torch.tensor([[3.0]], dtype=torch.float64)
    torch.testing.assert_close(per_id(ids, None, weights), 3 * per_id(ids))
    torch.testing.assert_close(pooled(ids, None, weights), 9 * per_id(ids))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("combine", ["mul", "sum"])
def test_pooled_form_in_every_mode(mode: Any, combine: str) -> None:
    per_id, pooled = _pair(mode=mode, combine=combine, padding_idx=5)
    ids, offsets = torch.tensor([3, 417, 5, 12, 13, 14]), torch.tensor([0, 3, 3])
    rows = [(per_id.table("part0")[i // 10], per_id.table("part1")[i % 10]) for i in (3, 417, 12, 13, 14)]

    def pool(values: list[Tensor]) -> Tensor:
        stacked = torch.stack(values)
        return stacked.max(0)[0] if mode == "max" else getattr(stacked, mode)(0)

    bags = []
    for members in (rows[:2], rows[2:]):
        q, r = pool([m[0] for m in members]), pool([m[1] for m in members])
        bags.append(q * r if combine == "mul" else q + r)
    expected = torch.stack([bags[0], torch.zeros_like(bags[0]), bags[1]])
    torch.testing.assert_close(pooled(ids, offsets), expected)
    if combine == "sum" and mode != "max":
        torch.testing.assert_close(pooled(ids, offsets), per_id(ids, offsets))


# -- networks per class ---------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 600), st.integers(0, 2**31), st.booleans())
@settings(max_examples=30)
def test_grouped_networks_equal_a_loop(classes: int, n: int, seed: int, skewed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, weights = draw(n, 3), [draw(classes, 3, 5), draw(classes, 5), draw(classes, 5, 2), draw(classes, 2)]
    which = torch.zeros(n).long() if skewed else torch.randint(0, classes, (n,), generator=generator)
    out = per_class_mlp(x, which, *weights)
    w1, b1, w2, b2 = (w[which] for w in weights)
    hidden = torch.einsum("nd,ndh->nh", x, w1) + b1
    expected = torch.einsum("nh,nho->no", hidden.clamp_min(0), w2) + b2
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    g = draw(n, 2).detach()
    got = torch.autograd.grad((out * g).sum(), [x, *weights])
    want = torch.autograd.grad((expected * g).sum(), [x, *weights])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_parameters_of_networks_are_counted() -> None:
    config = CompositionalConfig(combine="path", num_collisions=4, hidden=16)
    spec = make_spec(100_000, 16)
    # |P_1| rows of the base, and 4 networks 16 -> 16 -> 16 with biases.
    assert config.footprint(spec).serve == 4 * (25_000 * 16 + 4 * (16 * 16 + 16 + 16 * 16 + 16))
    assert (
        sum(p.nbytes for p in CompositionalEmbedding(100_000, 16, config=config).parameters())
        == config.footprint(spec).serve
    )
    assert config.moduli_of(make_spec(150, 16)) is None, "networks larger than the table they replace are not used"


# -- initial weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["sqrt_rows", "normal:1", "uniform:0.02", "xavier"])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(("partition", "k"), [("quotient_remainder", 2), ("generalized", 3)])
def test_outputs_start_with_mean_and_std_of_a_plain_table(partition: str, k: int, combine: str, init: str) -> None:
    n, d = 4000, 16
    tables = [
        CompositionalEmbedding(
            n, d, partition=partition, num_partitions=k, combine=combine, num_collisions=8, init=init, seed=s, hidden=32
        ).materialize()
        for s in range(8)
    ]
    values = torch.stack(tables).double()
    distribution, scale = make_spec(n, d, init).initial_distribution()
    std = scale if distribution == "normal" else scale / math.sqrt(3)
    # Rows repeat in tables of 8 rows, and networks share weights: the spread of an estimate is about 5 %.
    assert abs(values.std() / std - 1) < 0.08
    assert abs(values.mean()) < 0.08 * std


def test_products_start_with_the_variance_of_a_plain_table_exactly() -> None:
    for n in (10, 1000):
        program = CompositionalConfig(num_collisions=3).program(make_spec(n, 4, "normal:2"))
        initializers = [t.init for t in program.tables]
        assert (initializers[0].distribution, initializers[1].distribution) == ("normal", "uniform")
        second = initializers[0].scale ** 2 * (initializers[1].loc ** 2 + initializers[1].scale ** 2 / 3)
        assert math.isclose(second, 4.0)
        assert initializers[1].loc == 1.0
        assert math.isclose(initializers[1].scale, n**-0.5)


def test_initializers_of_other_codes() -> None:
    spec = make_spec(10_000, 16)
    for table in CompositionalConfig(num_collisions=50, initializer="dlrm_bug").program(spec).tables:
        values = table.init.fill_(torch.empty(1000, 16), seed=1)
        assert 0.01 <= values.min() < 0.011, "the bound that was meant as a width is the lower one"
        assert 0.999 < values.max() <= 1.0
        assert abs(values.mean() - 0.505) < 0.01
    tables = CompositionalConfig(num_collisions=50, initializer="xavier").program(spec).tables
    scales = [math.sqrt(2 / (t.rows + 16)) for t in tables]
    assert [(t.init.distribution, t.init.scale) for t in tables] == [("normal", scale) for scale in scales]


# -- sizes ----------------------------------------------------------------------------------------------------------


@st.composite
def _requests(draw: st.DrawFn) -> tuple[rse.FeatureSpec, dict[str, Any]]:
    partition = draw(st.sampled_from(PARTITIONS))
    k = 2 if partition == "quotient_remainder" else draw(st.integers(2, 6))
    n = draw(st.one_of(st.integers(1, 300), st.integers(1, 200_000)))
    params = {
        "partition": partition,
        "num_partitions": k,
        "combine": draw(st.sampled_from(COMBINES)),
        "affine": draw(st.booleans()),
        "hidden": draw(st.integers(1, 16)),
        "threshold": draw(st.sampled_from([0, 0, 50])),
    }
    return make_spec(n, draw(st.integers(6, 20))), params


@given(_requests())
@settings(max_examples=100)
def test_sizes_grow_and_never_pass_the_plain_table(request: tuple[rse.FeatureSpec, dict[str, Any]]) -> None:
    spec, params = request
    plain = spec.num_embeddings * spec.embedding_dim * 4
    top = CompositionalConfig.max_size(spec, **params)
    sizes = range(1, top + 1) if top < 60 else sorted({1, 2, 3, top // 3, top // 2, top - 2, top - 1, top})
    bytes_ = [CompositionalConfig.sized(spec, s, **params).footprint(spec).serve for s in sizes]
    assert all(a < b for a, b in itertools.pairwise(bytes_))
    assert bytes_[-1] == plain, "the largest size is the full table"


@given(_requests(), st.floats(0, 1.2))
@settings(max_examples=100)
def test_budgets_are_never_exceeded_and_well_used(
    request: tuple[rse.FeatureSpec, dict[str, Any]], fraction: float
) -> None:
    spec, params = request
    budget = max(1, int(fraction * spec.num_embeddings * spec.embedding_dim * 4))
    smallest = CompositionalConfig.sized(spec, 1, **params).footprint(spec).serve
    if smallest > budget:
        with pytest.raises(BudgetError, match=f"at least {format_bytes(smallest)} for"):
            CompositionalConfig.for_budget(spec, budget, **params)
        return
    config = CompositionalConfig.for_budget(spec, budget, **params)
    assert smallest <= config.footprint(spec).serve <= budget
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if config.num_collisions and config.num_collisions > 2 and params["combine"] == "mul":
        # The fewest collisions that fit, as CAFE's closed form has them.
        rows, n = budget // (4 * spec.embedding_dim), config._range(spec)
        c = math.ceil((rows - math.sqrt(rows * rows - 4 * n)) / 2) if rows * rows >= 4 * n else None
        fewest = next(c for c in range(1, n + 1) if -(-n // c) + c <= rows)
        assert config.num_collisions == fewest
        assert c is None or abs(c - fewest) <= 1


@pytest.mark.parametrize("n", [100, 9_999, 10_131_227])
def test_most_compression_is_about_half_the_root(n: int) -> None:
    spec = make_spec(n, 16)
    rows = CompositionalConfig.sized(spec, 1).footprint(spec).serve // 64
    assert rows == min(-(-n // c) + c for c in range(1, math.isqrt(n) + 3))
    cubic = CompositionalConfig.sized(spec, 1, partition="generalized", num_partitions=3).footprint(spec).serve // 64
    assert 3 * n ** (1 / 3) <= cubic <= 3 * n ** (1 / 3) + 4
    coprime = CompositionalConfig.sized(spec, 1, partition="chinese_remainder").footprint(spec).serve // 64
    assert rows <= coprime <= rows + 3


@pytest.mark.parametrize(("n", "compressed"), [(3, False), (5, False), (200, False), (201, True), (10_000, True)])
def test_small_features_stay_plain(n: int, compressed: bool) -> None:
    config = CompositionalConfig(num_collisions=4, threshold=200)
    names = [t.name for t in config.program(make_spec(n)).tables]
    assert names == (["part0", "part1"] if compressed else ["weight"])
    # Without a threshold it is the size that decides: 5 ids would take 2 + 4 rows.
    if n >= 4:
        kept = CompositionalConfig(num_collisions=4).moduli_of(make_spec(n)) is None
        assert kept == (n == 5)
    module = CompositionalEmbedding(n, 8, config=config)
    assert module.footprint().serve <= n * 8 * 4
    assert module.materialize().shape == (n, 8)


# -- a trained table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["mul", "sum", "concat"])
@pytest.mark.parametrize(("partition", "k"), [("quotient_remainder", 2), ("chinese_remainder", 2), ("generalized", 3)])
def test_from_dense_recovers_what_can_be_represented(partition: str, k: int, combine: str) -> None:
    options: dict[str, Any] = {"partition": partition, "num_partitions": k, "combine": combine, "num_collisions": 20}
    source = CompositionalEmbedding(600, 6, **options, seed=3)
    target = source.materialize().double()
    fitted = CompositionalEmbedding.from_dense(target, **options)
    error = (fitted.materialize() - target).square().mean() / target.square().mean()
    assert error < 1e-6


def test_from_dense_of_networks_beats_the_mean_of_each_class() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4000, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    fitted = CompositionalEmbedding.from_dense(target, combine="path", num_collisions=2, hidden=32)
    groups = target.view(2000, 2, 8)
    by_mean = (groups - groups.mean(1, keepdim=True)).square().mean()
    assert (fitted.materialize() - target).square().mean() < by_mean


# -- collections ----------------------------------------------------------------------------------------------------


def _collection(optimizer: Any = None, **options: Any) -> tuple[rse.Schema, rse.EmbeddingCollection]:
    schema = rse.Schema([make_spec(n, 8, name=f"C{n}") for n in (30, 5000, 200, 800, 3)])
    plan = Plan.uniform(schema, "compositional", num_collisions=3, threshold=200, **options)
    return schema, rse.EmbeddingCollection(schema, plan, optimizer, dtype=torch.float64)


def _per_feature(schema: rse.Schema, coll: rse.EmbeddingCollection, name: str, ids: Tensor) -> Tensor:
    """A feature of a collection by the readable definition."""
    program = coll.plan[name].program(schema[name])
    dense = coll.bundle.dense_tables()
    tables = {t.name: dense[key] if (key := f"{name}.{t.name}") in dense else coll.table(key) for t in program.tables}
    return reference.lookup(program, tables, ids)


@pytest.mark.parametrize("options", [{"combine": c} for c in COMBINES] + [{"bag": "pooled"}], ids=str)
def test_collection_with_plain_and_compressed_features(options: dict[str, Any]) -> None:
    schema, coll = _collection(**options)
    sizes = torch.tensor([s.num_embeddings for s in schema])
    ids = (torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) * sizes).long()
    out = coll(ids)
    vectors = [2 if options.get("combine") == "feature" and s.num_embeddings > 200 else 1 for s in schema]
    assert coll.num_vectors == sum(vectors)
    assert out.shape == (40, sum(vectors), 8)
    expected = [_per_feature(schema, coll, n, ids[:, i]).view(40, -1, 8) for i, n in enumerate(schema.names)]
    torch.testing.assert_close(out, torch.cat(expected, 1), rtol=1e-12, atol=1e-12)
    assert coll.footprint().weights == 2 * coll.plan.footprint(schema).serve, "float64 is twice float32"


def test_pooled_bags_in_a_collection_are_those_of_the_module() -> None:
    schema, coll = _collection(bag="pooled")
    bags = {s.name: torch.arange(6).view(2, 3) * 7 % s.num_embeddings for s in schema}
    out = coll(bags)
    for i, s in enumerate(schema):
        module = CompositionalEmbedding(
            s.num_embeddings, 8, config=coll.plan[s.name], name=s.name, mode="sum", dtype=torch.float64
        )
        with torch.no_grad():
            for table in module.program.tables:
                module.table(table.name).copy_(coll.table(f"{s.name}.{table.name}"))
        torch.testing.assert_close(out[:, i], module(bags[s.name]), rtol=1e-12, atol=1e-12)
    _, per_id = _collection()
    compressed = [i for i, s in enumerate(schema) if s.num_embeddings > 200]
    assert not torch.allclose(out[:, compressed], per_id(bags)[:, compressed])


# -- the contract, for every option ---------------------------------------------------------------------------------


def _variant(**defaults: Any) -> MethodInfo:
    """The method with other defaults, so that the contract's checks build it that way."""

    class Config(CompositionalConfig):
        @classmethod
        def from_params(cls, params: dict[str, Any]) -> Any:
            return CompositionalConfig.from_params({**defaults, **params})

        @classmethod
        def for_budget(cls, spec: rse.FeatureSpec, budget: int | str, **params: Any) -> Any:
            return CompositionalConfig.for_budget(spec, budget, **{**defaults, **params})

        @classmethod
        def sized(cls, spec: rse.FeatureSpec, size: int, **params: Any) -> Any:
            return CompositionalConfig.sized(spec, size, **{**defaults, **params})

    class Embedding(CompositionalEmbedding):
        config_cls = Config

        @classmethod
        def from_dense(cls, weight: Tensor, **options: Any) -> Any:
            return CompositionalEmbedding.from_dense(weight, **options)

    return MethodInfo("compositional", Embedding, Config, "variant", ())


_SKIP = {
    "names_follow_the_key",
    "config_is_data",
    "names_of_earlier_versions_are_read",
    "runs_in_a_collection",
    "stands_beside_others_in_a_collection",
    "state_round_trips_and_refuses_others",
}


@pytest.mark.crossed
@pytest.mark.parametrize("check", [c for c in EMBEDDING_CHECKS if c.__name__ not in _SKIP], ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "defaults",
    [
        {"combine": "path", "hidden": 8},
        {"combine": "feature"},
        {"partition": "generalized", "num_partitions": 3, "combine": "concat"},
        {"partition": "chinese_remainder", "combine": "sum", "affine": True},
    ],
    ids=str,
)
def test_options_keep_the_contract(defaults: dict[str, Any], check: Any) -> None:
    check(_variant(**defaults))
