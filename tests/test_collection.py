"""The collection against one drop-in per feature, over random schemas, plans and input forms."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.collection.optimizer_state import weights_alone
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import Initializer, Table
from recsys_embed.errors import CheckpointError, ConfigError, IdRangeError, UnknownNameError
from recsys_embed.features import MAX_ROWS
from recsys_embed.kernels.storage import stack_tables
from recsys_embed.optim import SGD
from recsys_embed.registry import config_from_dict, list_methods

PARAMS: dict[str, list[dict[str, Any]]] = {
    "full": [{}],
    "hash": [{"num_buckets": 5}, {"num_buckets": 3, "sign": True}, {"num_buckets": 4, "hash": "mod"}],
    "lowdim": [{"dim": 2}],
    "unified": [{"num_buckets": 11, "dim": 2, "num_hashes": 2}, {"num_buckets": 7, "combine": "sum", "table": "t"}],
    "multihash": [{"num_buckets": 5}, {"num_buckets": 4, "num_hashes": 3, "combine": "mean"}],
    "compositional": [
        {"num_collisions": 3},
        {"num_collisions": 3, "combine": "concat"},
        {"num_collisions": 3, "combine": "sum", "bag": "pooled"},
        {"num_collisions": 8, "combine": "path", "hidden": 2},
    ],
    "memcom": [{"num_buckets": 5}, {"num_buckets": 3, "bias": True}],
    "robe": [{"num_elements": 17, "block_size": 3}, {"num_elements": 13, "sign": True, "wrap": False, "table": "r"}],
    "mixeddim": [
        {"dims": (2,)},
        {"dims": (4, 1), "blocks": (3,)},
        {"dims": (3, 2, 1), "blocks": (2, 3), "order": "counts"},
    ],
    "adaptive": [{"num_frequent": 2, "num_buckets": 3}, {"num_frequent": 3, "num_buckets": 2, "order": "counts"}],
    "freqcut": [{"num_frequent": 4}, {"num_frequent": 5, "order": "counts"}],
}
KNOWN = [{"method": m.name, **p} for m in list_methods() for p in PARAMS.get(m.name, [])]


@st.composite
def planned(draw: st.DrawFn) -> tuple[Schema, Plan]:
    """A schema and a plan with mixed methods, poolings and widths."""
    specs, configs = [], {}
    for i in range(draw(st.integers(1, 6))):
        spec = FeatureSpec(
            f"f{i}",
            draw(st.integers(6, 40)),
            draw(st.sampled_from([4, 6])),
            pooling=draw(st.sampled_from(["sum", "mean", "max"])),
            init="normal:1",
        )
        config = config_from_dict(draw(st.sampled_from(KNOWN)))
        while config.check(spec) or (config.method == "unified" and config.to_dict()["combine"] == "sum"):
            # Shared rows of one width for features of another are refused, which another test shows.
            config = config_from_dict(draw(st.sampled_from(KNOWN)))
        specs.append(spec)
        configs[spec.name] = config
    return Schema(specs), Plan(configs)


def drop_in(spec: FeatureSpec, config: MethodConfig, mode: str | None = None, **options: Any) -> torch.nn.Module:
    return rse.make_embedding(
        config.method,
        spec.num_embeddings,
        spec.embedding_dim,
        config=config,
        name=spec.name,
        init=spec.init,
        mode=mode,
        **options,
    )


def bags_of(schema: Schema, batch: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for spec in schema:
        lengths = torch.randint(0, 4, (batch,), generator=generator)
        ids = torch.randint(0, spec.num_embeddings, (int(lengths.sum()),), generator=generator)
        out[spec.name] = (ids, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    return out


def flat(bags: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    lengths = torch.cat([offsets.diff() for _, offsets in bags.values()])
    return torch.cat([v for v, _ in bags.values()]), torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def join(parts: list[Tensor], coll: EmbeddingCollection) -> Tensor:
    joined = torch.cat(parts, 1)
    return joined if coll.output_dim is None else joined.view(joined.shape[0], coll.num_vectors, coll.output_dim)


@settings(max_examples=40)
@given(planned(), st.integers(0, 5), st.integers(0, 99))
def test_collections_are_their_drop_ins(given_plan: tuple[Schema, Plan], batch: int, seed: int) -> None:
    schema, plan = given_plan
    coll = EmbeddingCollection(schema, plan, dtype=torch.float64)
    reference = EmbeddingCollection(schema, plan, dtype=torch.float64, backend="reference")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in schema], 1)
    alone = [drop_in(s, plan[s.name], dtype=torch.float64)(ids[:, i]) for i, s in enumerate(schema)]
    torch.testing.assert_close(coll(ids), join(alone, coll))
    torch.testing.assert_close(reference(ids), join(alone, coll))

    bags = bags_of(schema, batch, seed)
    pooled = [
        drop_in(s, plan[s.name], s.pooling, dtype=torch.float64, include_last_offset=True)(*bags[s.name])
        for s in schema
    ]
    expected = join(pooled, coll)
    for module in (coll, reference):
        torch.testing.assert_close(module(*flat(bags)), expected)
    grads = torch.autograd.grad(coll(bags).square().sum(), list(coll.parameters()), allow_unused=True)
    rights = torch.autograd.grad(reference(bags).square().sum(), list(reference.parameters()), allow_unused=True)
    for grad, right in zip(grads, rights, strict=True):
        assert (grad is None) == (right is None)
        if grad is not None:
            torch.testing.assert_close(grad, right)


class FakeJagged:
    """The few methods of torchrec's KeyedJaggedTensor that the collection calls."""

    def __init__(self, bags: dict[str, tuple[Tensor, Tensor]], weights: dict[str, Tensor] | None = None) -> None:
        self.bags, self.given = bags, weights

    def keys(self) -> list[str]:
        return list(self.bags)

    def weights_or_none(self) -> Tensor | None:
        return None if self.given is None else torch.cat(list(self.given.values()))

    def values(self) -> Tensor:
        return torch.cat([v for v, _ in self.bags.values()])

    def offsets(self) -> Tensor:
        return torch.nn.functional.pad(torch.cat([o.diff() for _, o in self.bags.values()]).cumsum(0), (1, 0))

    def variable_stride_per_key(self) -> bool:
        return len({len(o) for _, o in self.bags.values()}) > 1


SCHEMA = Schema([FeatureSpec("a", 30, 4), FeatureSpec("b", 500, 4), FeatureSpec("c", 50, 4)])
MIXED = Plan(
    {
        "a": config_from_dict({"method": "full"}),
        "b": config_from_dict({"method": "hash", "num_buckets": 20}),
        "c": config_from_dict({"method": "unified", "num_buckets": 20}),
    }
)


def mixed(**options: Any) -> EmbeddingCollection:
    return EmbeddingCollection(SCHEMA, MIXED, **options)


def test_all_forms_of_input_agree() -> None:
    coll, bags = mixed(), bags_of(SCHEMA, 7, 0)
    out = coll(*flat(bags))
    small = {k: (v.int(), o.int()) for k, (v, o) in bags.items()}
    shuffled = {k: bags[k] for k in ("c", "a", "b")}
    extra = {**shuffled, "unrelated": bags["a"]}
    values, offsets = flat(bags)
    for form in (bags, small, shuffled, extra, FakeJagged(extra)):
        assert torch.equal(coll(form), out)
    assert torch.equal(coll(values.int(), offsets.int()), out)
    ids = torch.tensor([[1, 499, 2], [29, 0, 49]])
    single = coll(ids)
    assert torch.equal(coll(ids.int()), single)
    assert torch.equal(coll(ids.t().contiguous().t()), single)
    assert torch.equal(coll(ids.t().reshape(-1), torch.arange(7)), single)
    assert torch.equal(coll({"a": ids[:, 0], "b": ids[:, 1:2], "c": ids[:, 2]}), single)


def test_weights_of_samples() -> None:
    coll, bags = mixed(), bags_of(SCHEMA, 5, 1)
    values, offsets = flat(bags)
    weights = torch.linspace(-1, 2, len(values), requires_grad=True)
    out = coll(values, offsets, weights)
    split = dict(zip(bags, weights.split([len(v) for v, _ in bags.values()]), strict=True))
    alone = [drop_in(s, MIXED[s.name], "sum", include_last_offset=True)(*bags[s.name], split[s.name]) for s in SCHEMA]
    torch.testing.assert_close(out, torch.stack(alone, 1))
    (grad,) = torch.autograd.grad(out.square().sum(), weights, retain_graph=True)
    (right,) = torch.autograd.grad(torch.stack(alone, 1).square().sum(), weights)
    torch.testing.assert_close(grad, right)
    order = ("b", "c", "a")
    jagged = FakeJagged({k: bags[k] for k in order}, {k: split[k] for k in order})
    torch.testing.assert_close(coll(jagged), out)
    with pytest.raises(ConfigError, match="pooling 'sum'"):
        EmbeddingCollection(Schema([FeatureSpec("a", 30, 4, pooling="max")]))(
            torch.tensor([1]), torch.tensor([0, 1]), torch.ones(1)
        )
    assert coll(values, offsets, torch.full_like(weights, float("nan"))).isnan().any(), "NaN weights stay visible"


@pytest.mark.skipif(importlib.util.find_spec("torchrec") is None, reason="torchrec is not installed")
def test_keyed_jagged_tensors_of_torchrec() -> None:
    from torchrec import KeyedJaggedTensor

    coll, bags = mixed(), bags_of(SCHEMA, 5, 2)
    order = ("b", "c", "a")
    values, offsets = flat({k: bags[k] for k in order})
    for weights in (None, torch.linspace(-1, 2, len(values))):
        jagged = KeyedJaggedTensor(list(order), values, weights=weights, offsets=offsets)
        split = (
            None if weights is None else dict(zip(order, weights.split([len(bags[k][0]) for k in order]), strict=True))
        )
        assert torch.equal(coll(jagged), coll(FakeJagged({k: bags[k] for k in order}, split)))


def test_no_samples() -> None:
    none = torch.zeros(0, 3, dtype=torch.int64)
    wide = EmbeddingCollection(Schema([FeatureSpec("a", 5, 2), FeatureSpec("b", 5, 3), FeatureSpec("c", 5, 3)]))
    for coll, shape in ((mixed(), (0, 3, 4)), (mixed(backend="reference"), (0, 3, 4)), (wide, (0, 8))):
        assert coll(none).shape == shape
        assert coll(dict.fromkeys("abc", none[:, 0])).shape == shape
        assert coll(none[:, 0], torch.zeros(1, dtype=torch.int64)).shape == shape
    assert not mixed()(dict.fromkeys("abc", torch.zeros(2, 0, dtype=torch.int64))).any()


def test_features_keep_their_vectors_when_others_come_go_or_move() -> None:
    ids = torch.tensor([[1, 499, 2], [29, 0, 49]])
    base = mixed()(ids)
    for names in ("ab", "bc", "cba", "b"):
        specs = [SCHEMA[n] for n in names] + [FeatureSpec("new", 70, 4)]
        plan = Plan({**{n: MIXED[n] for n in names}, "new": config_from_dict({"method": "hash", "num_buckets": 9})})
        columns = [ids[:, "abc".index(n)] for n in names] + [ids[:, 0]]
        out = EmbeddingCollection(Schema(specs), plan)(torch.stack(columns, 1))
        for place, name in enumerate(names):
            assert torch.equal(out[:, place], base[:, "abc".index(name)]), (names, name)
    assert not torch.equal(mixed(seed=1)(ids), base)


def test_shared_tables_are_one() -> None:
    schema = Schema([FeatureSpec(n, 1000, 4) for n in "abc"])
    plan = Plan.uniform(schema, "unified", num_buckets=50)
    coll = EmbeddingCollection(schema, plan)
    assert list(coll.tables) == ["unified"]
    assert coll.footprint().weights == plan.footprint(schema).weights == 4 * 50 * 4
    assert sum(p.numel() for p in coll.parameters()) == 50 * 4
    ids = torch.arange(300).view(100, 3)
    assert not torch.equal(coll(ids)[:, 0], coll(ids)[:, 1]), "features hash on their own"
    with pytest.raises(ConfigError, match=r"shared table 'unified' is 50 x 4.*60 x 4.*for 'b'"):
        EmbeddingCollection(
            schema, Plan({**plan.configs, "b": config_from_dict({"method": "unified", "num_buckets": 60})})
        )


@settings(max_examples=15)
@given(planned(), st.sampled_from([None, SGD(), rse.Adam(), rse.RowwiseAdagrad()]))
def test_bytes_are_those_of_the_state_dict(given_plan: tuple[Schema, Plan], rule: Any) -> None:
    schema, plan = given_plan
    coll = EmbeddingCollection(schema, plan, rule)
    with weights_alone():
        stored = {k: v for k, v in coll.state_dict().items() if not k.endswith("_extra_state")}
    assert sum(v.nbytes for v in stored.values()) == coll.footprint().serve == plan.footprint(schema).serve
    whole = {k: v for k, v in coll.state_dict().items() if not k.endswith(("_extra_state", "_steps"))}
    assert sum(v.nbytes for v in whole.values()) == coll.footprint().serve + coll.footprint().optimizer
    held = sum(v.nbytes for v in coll.optimizer_state_dict()["state"].values())
    assert held == coll.footprint().optimizer == plan.footprint(schema, rule).optimizer
    assert plan.footprint(schema, itemsize=2).weights * 2 == coll.footprint().weights
    assert plan.footprint(schema, itemsize=2).index == coll.footprint().index


def test_storages_stay_below_the_rows_that_32_bits_count() -> None:
    init = Initializer("constant")
    sizes = {"a": 3, "b": MAX_ROWS - 3, "c": 1, "d": MAX_ROWS, "e": 5, "f": MAX_ROWS - 7}
    tables = {k: Table(k, n, 8, init) for k, n in sizes.items()} | {"g": Table("g", 9, 4, init)}
    shapes, places = stack_tables(tables)
    taken: dict[str, list[tuple[int, int]]] = {}
    for key, table in tables.items():
        place = places[key]
        assert shapes[place.storage][1] == table.width
        taken.setdefault(place.storage, []).append((place.offset, place.offset + table.rows))
    for storage, spans in taken.items():
        edges = sorted(spans)
        assert edges[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(edges)), "end to end, no overlap"
        assert edges[-1][1] == shapes[storage][0] <= MAX_ROWS
    assert len(taken) == len(shapes) == 5
    schema = Schema([FeatureSpec(n, 2**31 - 10, 4) for n in "abc"])
    coll = EmbeddingCollection(schema, device="meta", optimizer=rse.Adam())
    assert len(coll.storages) == 3
    assert coll(torch.zeros(7, 3, dtype=torch.int64, device="meta")).shape == (7, 3, 4)


def test_ids_out_of_range_name_their_feature() -> None:
    coll = mixed()
    assert torch.isfinite(coll(torch.tensor([[0, -5, 2**62]]))).all(), "hashed features take any id"
    for bad in (-1, 30, 2**40, -(2**63)):
        for ids in (
            torch.tensor([[0, 0, 0], [bad, 0, 0]]),
            {"a": torch.tensor([bad]), "b": torch.tensor([0]), "c": torch.tensor([0])},
        ):
            with pytest.raises(IdRangeError, match=r"\[0, 30\).*feature 'a'"):
                coll(ids)
    two = EmbeddingCollection(SCHEMA)
    with pytest.raises(IndexError, match=r"\[0, 50\); got values from 0 to 50 \(feature 'c'"):
        two(torch.tensor([[0, 0, 0], [1, 1, 50]]))
    with pytest.raises(IndexError, match="feature 'b'"):
        two(torch.tensor([0, 500, 50]), torch.arange(4))


def test_wrong_calls_say_what_is_wrong() -> None:
    coll, one = mixed(), torch.tensor([1])
    bag = (torch.tensor([1, 2]), torch.tensor([0, 2]))
    for ids, rest, text in (
        (torch.zeros(2, 2, dtype=torch.int64), (), r"\[B, 3\]"),
        (torch.zeros(2, 3), (), "float32"),
        (torch.zeros(3, dtype=torch.int64), (), "offsets"),
        (torch.tensor(1), (), "offsets"),
        (torch.zeros(1, 1, 3, dtype=torch.int64), (), r"\(1, 1, 3\)"),
        ([[1, 2, 3]], (), "got list"),
        (None, (), "NoneType"),
        (torch.zeros(3, dtype=torch.int64), (torch.arange(3),), "rise from 0"),
        (torch.zeros(4, dtype=torch.int64), (torch.arange(5),), r"3 \* B \+ 1 entries; got 5"),
        (torch.zeros(3, dtype=torch.int64), (torch.arange(4).float(),), "float32"),
        (torch.zeros(3, dtype=torch.int64), (torch.arange(4), torch.ones(2)), r"shape of ids, \(3,\)"),
        ({"a": one, "b": one}, (), "missing: c"),
        ({}, (), "3 features are missing"),
        ({"a": one, "b": one, "c": torch.tensor([1, 2])}, (), "one batch size.*'c': 2"),
        ({"a": one, "b": one, "c": torch.zeros(1, 1, 1, dtype=torch.int64)}, (), "feature 'c'"),
        ({"a": one, "b": one, "c": torch.tensor([1.0])}, (), "float32.*'c'"),
        ({"a": one, "b": one, "c": [1]}, (), "list.*'c'"),
        ({"a": one, "b": one, "c": ([1], [0, 1])}, (), "list.*'c'"),
        ({"a": one, "b": one, "c": (torch.tensor([1, 2]), torch.tensor([0, 1]))}, (), "number of ids, 2.*'c'"),
        ({"a": bag, "b": bag, "c": bag}, (torch.arange(4),), "go with 1-D ids"),
        (FakeJagged({"a": bag, "b": bag}), (), "missing: c"),
        (FakeJagged({"a": bag, "b": bag, "c": (one, torch.tensor([0, 1, 1]))}), (), "one batch size"),
        (FakeJagged({"a": bag, "b": bag, "c": (one.float(), torch.tensor([0, 1]))}), (), "float32"),
    ):
        with pytest.raises(ConfigError, match=text):
            coll(ids, *rest)


def test_wrong_constructions_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 faults.*'c' has no entry.*names 'd'"):
        EmbeddingCollection(SCHEMA, Plan({"a": MIXED["a"], "b": MIXED["b"], "d": MIXED["c"]}))
    with pytest.raises(UnknownNameError, match="did you mean 'torch'"):
        mixed(backend="torhc")
    with pytest.raises(ConfigError, match="cannot fuse"):
        mixed(backend="reference", optimizer=SGD())


@pytest.mark.crossed
@pytest.mark.parametrize("method", [m.name for m in list_methods()])
@pytest.mark.parametrize(
    "name", ["items", "type", "training", "weight", "forward", "ключ", "a b", "0", "_x", "__dict__"]
)
def test_features_may_have_any_name(name: str, method: str) -> None:
    schema = Schema([FeatureSpec(name, 40, 4), FeatureSpec("other", 40, 4)])
    for params in PARAMS.get(method, []):
        plan = Plan.uniform(schema, method, **params)
        coll = EmbeddingCollection(schema, plan)
        again = EmbeddingCollection(schema, plan, seed=5)
        again.load_state_dict(coll.state_dict())
        ids = torch.tensor([[1, 39], [5, 7]])
        assert torch.equal(again(ids), coll(ids))


def test_state_of_another_plan_or_schema_is_refused_before_any_weight_moves() -> None:
    coll = mixed()
    others = [
        EmbeddingCollection(
            SCHEMA, Plan({**MIXED.configs, "b": config_from_dict({"method": "hash", "num_buckets": 20, "seed": 1})})
        ),
        EmbeddingCollection(SCHEMA),
        EmbeddingCollection(Schema([SCHEMA["a"], SCHEMA["b"]]), Plan({n: MIXED[n] for n in "ab"})),
    ]
    for other in others:
        before = [p.detach().clone() for p in other.parameters()]
        with pytest.raises(CheckpointError, match="another configuration"):
            other.load_state_dict(coll.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    again = mixed(seed=7)
    again.load_state_dict(coll.state_dict())
    assert torch.equal(again(torch.tensor([[1, 2, 3]])), coll(torch.tensor([[1, 2, 3]])))


def test_state_of_another_order_of_features_is_refused() -> None:
    """The order of features fixes where their rows stand: loaded as it is, features would take each other's rows."""
    specs = [FeatureSpec("a", 30, 4), FeatureSpec("b", 30, 4)]
    state = EmbeddingCollection(Schema(specs)).state_dict()
    with pytest.raises(CheckpointError, match=r"order: saved \['a', 'b'\], here \['b', 'a'\]"):
        EmbeddingCollection(Schema(specs[::-1])).load_state_dict(state)


@pytest.mark.parametrize("rule", [None, SGD(lr=0.5), rse.Adam()], ids=repr)
def test_copies_and_moves(rule: Any) -> None:
    ids = torch.tensor([[1, 499, 2], [29, 0, 49]])
    coll = mixed(optimizer=rule)
    coll(ids).sum().backward()
    for twin in (copy.deepcopy(coll), pickle.loads(pickle.dumps(coll))):
        assert torch.equal(twin(ids), coll(ids))
        before = coll(ids).detach()
        twin(ids).square().sum().backward()
        if rule is not None:
            assert not torch.equal(twin(ids), coll(ids)), "the copy trains on its own"
        assert torch.equal(coll(ids), before)
    torch.testing.assert_close(copy.deepcopy(coll).double()(ids), coll(ids).double())
    low = copy.deepcopy(coll).to(torch.bfloat16)
    assert low(ids).dtype == torch.bfloat16
    low(ids).float().sum().backward()
    lazy = mixed(optimizer=rule, device="meta")
    assert lazy(ids.to("meta")).is_meta
    lazy.to_empty(device="cpu").reset_parameters()
    assert torch.equal(lazy(ids), mixed()(ids))


def test_compiles_whole_with_a_dynamic_batch() -> None:
    torch._dynamo.reset()
    coll = mixed()
    compiled = torch.compile(coll, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 8):
        ids = torch.arange(3 * batch).view(batch, 3) % 30
        torch.testing.assert_close(compiled(ids), coll(ids))
    compiled(ids).square().sum().backward()
    grads = [p.grad.clone() for p in coll.parameters()]
    coll.zero_grad()
    coll(ids).square().sum().backward()
    for p, grad in zip(coll.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_exports_with_a_dynamic_batch() -> None:
    coll = mixed()
    dynamic = {"ids": {0: torch.export.Dim("batch")}, "offsets": None, "per_sample_weights": None}
    program = torch.export.export(coll, (torch.ones(4, 3, dtype=torch.int64), None, None), dynamic_shapes=dynamic)
    ids = torch.arange(27).view(9, 3)
    torch.testing.assert_close(program.module()(ids, None, None), coll(ids))


def test_projections_keep_their_names_when_a_feature_pools_otherwise() -> None:
    names = []
    for pooling in ("sum", "mean"):
        schema = rse.Schema([rse.FeatureSpec("a", 100, 8), rse.FeatureSpec("b", 100, 8, pooling=pooling)])
        coll = rse.EmbeddingCollection(schema, rse.Plan.uniform(schema, "lowdim", dim=2))
        names.append({k: v.shape for k, v in coll.state_dict().items() if not k.endswith("_extra_state")})
        plain = rse.EmbeddingCollection(schema, coll.plan, backend="reference")
        ids = torch.tensor([[3, 99], [0, 7]])
        torch.testing.assert_close(coll(ids), plain(ids))
        bags = (torch.tensor([3, 4, 99, 7]), torch.tensor([0, 2, 2, 3, 4]))
        torch.testing.assert_close(coll(*bags), plain(*bags))
    assert names[0] == names[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_optimizer_state_stays_float32_when_weights_change_type(dtype: torch.dtype) -> None:
    schema = rse.Schema([rse.FeatureSpec("a", 5, 4)])
    coll = rse.EmbeddingCollection(schema, optimizer=rse.Adagrad(lr=0.0)).to(dtype)
    assert coll.table("a.weight").dtype == dtype
    for _ in range(300):
        (coll(torch.tensor([[2]])) * 16).sum().backward()
    assert coll.width4_sum.dtype == torch.float32
    assert coll.width4_sum[2].tolist() == [300 * 256.0] * 4


def test_backward_in_eval_mode_leaves_fused_tables_alone() -> None:
    schema = rse.Schema([rse.FeatureSpec("a", 5, 4), rse.FeatureSpec("b", 5, 4)])
    coll = rse.EmbeddingCollection(schema, rse.Plan.uniform(schema, "lowdim", dim=2), rse.SGD(lr=1.0)).eval()
    before = coll.table("a.weight").clone()
    coll(torch.tensor([[2, 3]])).sum().backward()
    assert torch.equal(coll.table("a.weight"), before)
    coll.train()(torch.tensor([[2, 3]])).sum().backward()
    assert not torch.equal(coll.table("a.weight"), before)


def test_a_jagged_tensor_with_a_key_twice_is_refused() -> None:
    sparse = pytest.importorskip("torchrec.sparse.jagged_tensor", reason="needs torchrec")
    values, lengths = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1])
    jagged = sparse.KeyedJaggedTensor.from_lengths_sync(keys=["a", "a", "b"], values=values, lengths=lengths)
    schema = rse.Schema([rse.FeatureSpec("a", 5, 4), rse.FeatureSpec("b", 5, 4)])
    with pytest.raises(ConfigError, match="a more than once"):
        rse.EmbeddingCollection(schema)(jagged)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_weights_of_bags_are_floats_of_any_type(backend: str) -> None:
    schema = Schema([FeatureSpec("a", 10, 8), FeatureSpec("b", 10, 8)])
    coll = EmbeddingCollection(schema, backend=backend)
    ids, offsets, weights = torch.arange(6), torch.tensor([0, 1, 3, 3, 6]), torch.rand(6)
    wanted = coll(ids, offsets, weights)
    torch.testing.assert_close(coll(ids, offsets, weights.double()), wanted)
    with pytest.raises(ConfigError, match=r"must be floats; got torch\.int64"):
        coll(ids, offsets, torch.ones(6, dtype=torch.int64))


def test_features_that_torch_pools_leave_the_indexes_of_the_others_in_their_places() -> None:
    """One set of ids is kept as a bitmap, the next as a list: neither is read as the other."""
    frequent = rse.get_method("freqcut").config_cls
    schema = Schema([FeatureSpec("a", 100, 4, pooling="max"), FeatureSpec("b", 2500, 4), FeatureSpec("c", 90, 4)])
    configs = {n: frequent(num_frequent=k, order="counts") for n, k in (("a", 60), ("b", 5), ("c", 50))}
    counts = {s.name: torch.randperm(s.num_embeddings) for s in schema}
    ids = [torch.randint(0, 100, (20,)), counts["b"].argsort()[-20:], torch.arange(20)]
    given = torch.cat(ids), torch.arange(0, 61, 4)
    found = [EmbeddingCollection(schema, Plan(configs), backend=b).assign_(counts)(*given) for b in ("auto", "torch")]
    torch.testing.assert_close(*found)
