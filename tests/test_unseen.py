"""What becomes of ids never seen, against a definition in plain Python: drop-ins, collections, backends, updates."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed import SGD, Adam, EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core import hashing
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import CheckpointError, ConfigError, IdRangeError
from recsys_embed.kernels import reference
from recsys_embed.registry import MethodInfo, list_methods
from recsys_embed.testing import example

POLICIES = (None, "hash", "oov", "zero", "raise")
JUNK = (-1, -(2**63), 2**63 - 1, 2**31, 2**32 + 5)
N, WIDTH = 61, 4
U64 = 2**64


def plain_hash(value: int, salt: int, size: int) -> int:
    """The hash of an id into [0, size) with Python's integers (Steele, Lea and Flood 2014; Lemire 2019)."""
    z = ((value ^ salt) + 0x9E3779B97F4A7C15) % U64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % U64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % U64
    return ((z ^ (z >> 31)) * size) >> 64


def stands_for(value: int, spec: FeatureSpec, hashes: bool) -> int | None:
    """The id whose vector an id gets, None for zeros."""
    n = spec.num_embeddings
    if spec.ids == "raw" or 0 <= value < n:
        return value
    if hashes and spec.unseen in (None, "hash"):
        return value
    if spec.unseen == "oov":
        return n
    if spec.unseen == "zero":
        return None
    if spec.unseen == "hash":
        return plain_hash(value % U64, hashing.salt(0, spec.name, "unseen") % U64, n)
    raise IndexError(value)


def vector(module: CompressedEmbedding, value: int | None) -> Tensor:
    """The vector of an id in range, by the program's readable definition where it is one."""
    if value is None:
        return next(module.parameters()).new_zeros(module.output_dim)
    if module.config.computes:
        return module.lookup(torch.tensor([value]))[0]
    tables = {t.name: module.table(t.name) for t in module.program.tables}
    return reference.lookup(module.program, tables, torch.tensor([value]), module.kernel.index)[0]


def pooled(
    vectors: Sequence[Tensor | None], mode: str, weights: Sequence[Any], width: int, dtype: torch.dtype
) -> Tensor:
    """A bag of vectors; None are skipped."""
    found = [v * w for v, w in zip(vectors, weights, strict=True) if v is not None]
    if not found:
        return torch.zeros(width, dtype=dtype)
    stacked = torch.stack(found)
    return stacked.max(0).values if mode == "max" else getattr(stacked, mode)(0)


def same(got: Tensor, wanted: Tensor, module: torch.nn.Module) -> None:
    """Outputs and gradients of every parameter agree."""
    torch.testing.assert_close(got, wanted)
    factor = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads: list[list[Tensor]] = []
    for out in (got, wanted):
        if not out.requires_grad:
            continue
        found = torch.autograd.grad((out * factor).sum(), parameters, allow_unused=True)
        grads.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)])
    if len(grads) == 1:  # the definition reads no row, so nothing may reach one
        grads.append([torch.zeros_like(p) for p in parameters])
    if grads:
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


IDS = st.one_of(
    st.integers(0, N - 1),
    st.sampled_from((0, 5)),
    st.integers(N, N + 3),
    st.sampled_from(JUNK),
    st.integers(-(2**63), 2**63 - 1),
)
METHODS = pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)


def options_of(method: MethodInfo) -> Iterator[dict[str, Any]]:
    """The method's default, and options whose lookup the module itself runs."""
    yield {}
    if method.name == "compositional":
        yield {"combine": "path", "hidden": 1, "num_collisions": 6}
        yield {"bag": "pooled", "num_collisions": 6}


@cache
def built(method: MethodInfo, policy: Any, mode: str | None, padding: int | None, options: tuple[Any, ...]) -> Any:
    """A drop-in, kept for further examples."""
    given = {"unseen": policy, "padding_idx": padding, "mode": mode, "dtype": torch.float64, **dict(options)}
    return method.embedding_cls(N, WIDTH, **given) if options else example(method, N, WIDTH, **given)


@METHODS
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=8, deadline=None)
@given(ids=st.lists(IDS, max_size=6), cut=st.integers(0, 6), padding=st.sampled_from([None, 0, 5]), data=st.data())
def test_drop_ins_follow_the_definition(
    method: MethodInfo, policy: Any, ids: list[int], cut: int, padding: int | None, data: st.DataObject
) -> None:
    extra = data.draw(st.sampled_from(list(options_of(method))))
    given_weights = [data.draw(st.floats(-2, 2, width=32)) for _ in ids]
    for mode in (None, "sum", "mean", "max"):
        module = built(method, policy, mode, padding, tuple(extra.items()))
        module.reset_unseen_counts()
        tensor = torch.tensor(ids, dtype=torch.int64)
        arguments: tuple[Any, ...] = (tensor,)
        cut = min(cut, len(ids))
        weights = None
        if mode is not None:
            weights = torch.tensor(given_weights, dtype=torch.float64) if mode == "sum" else None
            arguments = (tensor, torch.tensor([0, cut]), weights)
        try:
            found = [stands_for(i, module.spec, module.config.accepts_raw) for i in ids]
        except IndexError:
            with pytest.raises(IdRangeError, match=rf"\[0, {N}\).*'embedding'"):
                module(*arguments)
            continue
        got = module(*arguments)
        vectors = [vector(module, f) for f in found]
        if mode is None:
            # The full table stores its padding row, as torch does; no padding row has a gradient.
            keeps = 1.0 if method.name == "full" else 0.0
            rows = [v.detach() * keeps if i == padding else v for i, v in zip(ids, vectors, strict=True)]
            wanted = torch.stack(rows) if rows else got.detach()
        else:
            if extra.get("bag") == "pooled":
                continue  # combines pooled tables; its bags have a test of their own
            kept = [None if i == padding or f is None else v for i, f, v in zip(ids, found, vectors, strict=True)]
            scale = given_weights if mode == "sum" else [1.0] * len(ids)
            bags = [
                pooled(kept[part], mode, scale[part], module.output_dim, torch.float64)
                for part in (slice(0, cut), slice(cut, None))
            ]
            wanted = torch.stack(bags)
        same(got, wanted, module)
        if module.unseen.counting:
            looked = [i for i in ids if i != padding]
            unseen = sum(not 0 <= i < N for i in looked)
            assert module.unseen_counts() == {"embedding": (unseen, len(looked))}


SCHEMA = Schema(
    [
        FeatureSpec("a", N, WIDTH, unseen="zero"),
        FeatureSpec("b", 30, WIDTH, unseen="hash", pooling="mean"),
        FeatureSpec("c", 90, WIDTH, unseen="oov", pooling="max"),
        FeatureSpec("d", 90, WIDTH, pooling="max"),
        FeatureSpec("e", 70, WIDTH, unseen="zero", pooling="mean"),
        FeatureSpec("f", 70, WIDTH, unseen="zero", pooling="max"),
    ]
)


def plan_of(method: MethodInfo, schema: Schema = SCHEMA, **options: Any) -> Plan:
    need = sum(method.config_cls.sized(s, 1, **options).footprint(s).serve for s in schema)
    whole = sum(s.num_embeddings for s in schema) * WIDTH * 4
    return Plan.uniform(schema, method.name, budget=max(need, whole // 2), full_below=1, **options)


def good(spec: FeatureSpec, method: MethodInfo, values: list[int]) -> list[int]:
    """Ids that do not raise."""
    wild = spec.unseen not in (None, "raise") or method.config_cls.accepts_raw
    return values if wild else [v % spec.num_embeddings for v in values]


@METHODS
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(0, 5))
def test_collections_follow_the_definition(method: MethodInfo, seed: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plan = plan_of(method)
    ours = EmbeddingCollection(SCHEMA, plan, dtype=torch.float64)
    oracle = EmbeddingCollection(SCHEMA, plan, dtype=torch.float64, backend="reference")
    dense = ours.bundle.dense_tables()

    def one(spec: FeatureSpec, value: int) -> Tensor | None:
        found = stands_for(value, spec, plan[spec.name].accepts_raw)
        if found is None:
            return None
        if spec.name not in ours.bundle.programs:
            module = ours.bundle._module(spec.name)
            held = {t.name: module.table(t.name) for t in module.program.tables}
            return reference.lookup(module.program, held, torch.tensor([found]))[0]
        program = ours.bundle.programs[spec.name]
        tables = {}
        for t in program.tables:
            key = t.name if t.shared else f"{spec.name}.{t.name}"
            tables[t.name] = dense[key] if t.dense else ours.table(key)
        return reference.lookup(program, tables, torch.tensor([found]))[0]

    def draw(spec: FeatureSpec, count: int) -> list[int]:
        values = torch.randint(0, 2 * spec.num_embeddings, (count,), generator=generator).tolist()
        junk = torch.randint(0, 4 * len(JUNK), (count,), generator=generator).tolist()
        return good(spec, method, [JUNK[j] if j < len(JUNK) else v for v, j in zip(values, junk, strict=True)])

    columns = [draw(s, batch) for s in SCHEMA]
    ids = torch.tensor(columns, dtype=torch.int64).view(len(SCHEMA), batch).T
    width = ours.output_dim or 0
    zeros = torch.zeros(width * ours.num_vectors // len(SCHEMA), dtype=torch.float64)
    rows = [zeros if (v := one(s, value)) is None else v for s, c in zip(SCHEMA, columns, strict=True) for value in c]
    wanted = torch.stack(rows).view(len(SCHEMA), batch, -1).transpose(0, 1) if rows else ours(ids).detach()
    for coll in (ours, oracle):
        out = coll(ids)
        torch.testing.assert_close(out, wanted.reshape(out.shape))
    same(ours(ids), wanted.reshape(out.shape), ours)

    lengths = torch.randint(0, 4, (len(SCHEMA), batch), generator=generator)
    bags = [[draw(s, int(n)) for n in row] for s, row in zip(SCHEMA, lengths, strict=True)]
    values = torch.tensor([v for row in bags for bag in row for v in bag], dtype=torch.int64)
    offsets = torch.nn.functional.pad(lengths.reshape(-1).cumsum(0), (1, 0))
    parts = [
        pooled([one(s, v) for v in bag], s.pooling, [1.0] * len(bag), len(zeros), torch.float64)
        for s, row in zip(SCHEMA, bags, strict=True)
        for bag in row
    ]
    wanted = (
        torch.stack(parts).view(len(SCHEMA), batch, -1).transpose(0, 1) if parts else ours(values, offsets).detach()
    )
    ours.reset_unseen_counts()
    for coll in (ours, oracle):
        out = coll(values, offsets)
        torch.testing.assert_close(out, wanted.reshape(out.shape))
    same(ours(values, offsets), wanted.reshape(out.shape), ours)
    counted = {
        s.name: (2 * sum(not 0 <= v < s.num_embeddings for bag in row for v in bag), 2 * sum(len(bag) for bag in row))
        for s, row in zip(SCHEMA, bags, strict=True)
    }
    assert ours.unseen_counts() == counted


@pytest.mark.parametrize(
    "options", [{"combine": "path", "hidden": 1}, {"bag": "pooled"}, {"bag": "pooled", "combine": "sum"}]
)
def test_collections_of_methods_with_a_head(options: dict[str, Any]) -> None:
    coll = EmbeddingCollection(SCHEMA, Plan.uniform(SCHEMA, "compositional", num_collisions=6, **options))
    columns = [torch.tensor(good(s, rse.get_method("compositional"), [3, *JUNK, s.num_embeddings])) for s in SCHEMA]
    out = coll(torch.stack(columns, 1))
    cls = rse.get_method("compositional").embedding_cls
    alone = [
        cls(s.num_embeddings, s.embedding_dim, config=coll.plan[s.name], name=s.name, init=s.init, unseen=s.unseen)(c)
        for s, c in zip(SCHEMA, columns, strict=True)
    ]
    torch.testing.assert_close(out, torch.stack(alone, 1))
    bags = {s.name: c.view(-1, 1) for s, c in zip(SCHEMA, columns, strict=True)}
    torch.testing.assert_close(coll(bags), out)
    longer = {s.name: bags[s.name] for s in SCHEMA}
    for name in ("a", "e", "f"):
        longer[name] = torch.cat([bags[name], torch.full_like(bags[name], -9)], 1)
    torch.testing.assert_close(coll(longer), out)
    assert not out[1:, 0].any()
    out[1:, 0].sum().backward()
    assert not any(p.grad.any() for n, p in coll.named_parameters() if p.grad is not None)


@METHODS
def test_zeros_move_no_row(method: MethodInfo) -> None:
    """Not even optimizers that move every row they are shown: fused Adam, and a sparse one."""
    schema = Schema([FeatureSpec("a", N, WIDTH, unseen="zero"), FeatureSpec("b", N, WIDTH, unseen="zero")])
    plan = plan_of(method, schema)
    fused = EmbeddingCollection(schema, plan, optimizer=Adam(lr=0.1))
    fused(torch.tensor([[3, 4], [5, 6]])).square().sum().backward()
    before = copy.deepcopy(fused.state_dict()), copy.deepcopy(fused.optimizer_state_dict()["state"])
    (fused(torch.tensor([[-1, N], [2**40, -7]])).sum() + 0 * next(iter(fused.parameters())).sum()).backward()
    for name, value in fused.state_dict().items():
        assert torch.equal(value, before[0][name]) or name.endswith("_steps"), name
    for name, value in fused.optimizer_state_dict()["state"].items():
        assert torch.equal(value, before[1][name]), name
    for options in ({"sparse": True}, {"sparse": True, "mode": "mean"}):
        module = example(method, N, WIDTH, unseen="zero", **options)
        module(torch.tensor([[-1, N, 2**40]])).sum().backward()
        for name, p in module.named_parameters():
            if p.grad is not None and p.grad.is_sparse:
                assert p.grad.coalesce().indices().numel() == 0, name
    for backend in ("auto", "torch", "reference"):
        sparse = EmbeddingCollection(schema, plan, sparse=True, backend=backend)
        sparse(torch.tensor([[-1, N], [2**40, -7]])).sum().backward()
        for name, p in sparse.named_parameters():
            if p.grad is not None and p.grad.is_sparse:
                assert p.grad.coalesce().indices().numel() == 0, (backend, name)


@METHODS
@pytest.mark.parametrize("policy", ["hash", "oov"])
def test_fused_steps_are_plain_ones(method: MethodInfo, policy: Any) -> None:
    schema = Schema([FeatureSpec("a", N, WIDTH, unseen=policy), FeatureSpec("b", 30, WIDTH, unseen=policy)])
    plan = plan_of(method, schema)
    ids = torch.tensor([[-1, 5], [N, -9], [2**40, 30], [7, 5]])
    plain, fused = EmbeddingCollection(schema, plan), EmbeddingCollection(schema, plan, optimizer=SGD(0.1))
    for coll in (plain, fused):
        coll(ids).square().sum().backward()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            after = fused.get_parameter(name)
            expected = p - 0.1 * p.grad if name in fused.storages and p.grad is not None else p
            torch.testing.assert_close(after, expected, msg=name)


@METHODS
def test_the_row_of_unseen_ids_keeps_the_initializers_of_the_others(method: MethodInfo) -> None:
    for init in ("sqrt_rows", "xavier", "normal:0.5"):
        plain = example(method, N, WIDTH, init=init)
        initializers = {t.name: t.init for t in plain.program.tables}
        other = method.embedding_cls(N, WIDTH, config=_sized_alike(method, plain), init=init, unseen="oov")
        assert {t.name: t.init for t in other.program.tables} == initializers


def _sized_alike(method: MethodInfo, module: CompressedEmbedding) -> Any:
    """The module's configuration, or another of its kind that takes one more id."""
    try:
        module.config.program(FeatureSpec("embedding", N, WIDTH, unseen="oov"))
    except ConfigError:
        return example(method, N, WIDTH, unseen="oov").config
    return module.config


@METHODS
def test_trained_tables_give_unseen_ids_their_mean(method: MethodInfo) -> None:
    weight = torch.randn(N, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(N) % 7
    config = example(method, N, WIDTH, unseen="oov").config
    module = method.embedding_cls.from_dense(weight, counts=counts, config=config, unseen="oov")
    assert module.materialize().shape == (N, module.output_dim)
    assert module.unseen_counts() == {"embedding": (0, 0)}
    if method.name == "full":
        torch.testing.assert_close(module.materialize()[counts > 0], weight[counts > 0])
        mean = (weight * counts.unsqueeze(1)).sum(0) / counts.sum()
        torch.testing.assert_close(module(torch.tensor([-5]))[0], mean)


def test_pretrained_tables() -> None:
    weight = torch.randn(5, 3)
    for policy in POLICIES:
        module = rse.get_method("full").embedding_cls.from_pretrained(weight, unseen=policy)  # type: ignore[attr-defined]
        torch.testing.assert_close(module(torch.arange(5)), weight)
        assert module.unseen_counts() == {"embedding": (0, 5 * (policy in ("hash", "oov", "zero")))}
    oov = rse.get_method("full").embedding_cls.from_pretrained(weight, unseen="oov")  # type: ignore[attr-defined]
    torch.testing.assert_close(oov(torch.tensor([5])), weight.mean(0, keepdim=True))


# -- what is declared -------------------------------------------------------------------------------------------------


def test_schemas_round_trip_and_read_what_was_written_before() -> None:
    schema = Schema([FeatureSpec(f"f{i}", 10, 4, unseen=p) for i, p in enumerate(POLICIES)])
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    old = {"features": [{"name": "a", "num_embeddings": 3, "embedding_dim": 2}]}
    assert Schema.from_dict(old)["a"].unseen is None
    # A schema that declares nothing is written as ever, so runs of before are recognised.
    assert "unseen" not in Schema.from_dict(old).to_dict()["features"][0]


@pytest.mark.parametrize("policy", ["oov", "zero", "raise"])
def test_raw_ids_are_never_unseen(policy: Any) -> None:
    with pytest.raises(ConfigError, match="every int64 is an id"):
        FeatureSpec("a", 10, 4, ids="raw", unseen=policy)
    schema = Schema([FeatureSpec("a", 10, 4, ids="raw", unseen="hash"), FeatureSpec("b", 10, 4, unseen=policy)])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, "hash", num_buckets=3)).count_unseen()
    coll(torch.tensor([[-(2**63), 3], [2**63 - 1, 4]]))
    assert coll.unseen_counts() == {"a": (0, 2), "b": (0, 2)}


def test_wrong_policies_are_named() -> None:
    with pytest.raises(ConfigError, match="`unseen` must be one of hash, oov, zero, raise"):
        FeatureSpec("a", 10, 4, unseen="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`unseen`"):
        rse.make_embedding("hash", 10, 4, num_buckets=3, unseen=[])
    with pytest.raises(ConfigError, match="one more id"):
        FeatureSpec("a", 2**31 - 1, 4, unseen="oov")
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        with pytest.raises(ConfigError, match="unseen='zero'"):
            rse.make_embedding("full", 10, 4, unseen="zero", **option)
        rse.make_embedding("full", 10, 4, unseen="oov", **option)(torch.tensor([10]))


@pytest.mark.parametrize(
    "ids", [torch.tensor(12), torch.tensor([[1, -1], [12, 3]]).T, torch.tensor([12], dtype=torch.int32)]
)
@pytest.mark.parametrize("method", ["full", "lowdim", "hash"])
@pytest.mark.parametrize("policy", ["hash", "oov", "zero"])
def test_any_shape_and_both_widths_of_integers(method: str, policy: Any, ids: Tensor) -> None:
    module = rse.make_embedding(method, 10, 4, budget=300, unseen=policy)
    out = module(ids)
    assert out.shape == (*ids.shape, 4)
    flat = torch.stack([module(i.long().view(1))[0] for i in ids.reshape(-1)])
    torch.testing.assert_close(out.reshape(-1, 4), flat)


def test_training_runs_declare_it() -> None:
    from recsys_embed.train.config import TrainConfig
    from recsys_embed.train.inputs import schema_of

    class Data:
        @staticmethod
        def schema(width: int) -> Schema:
            return Schema([FeatureSpec("a", 10, width)])

    config = TrainConfig(unseen="zero")
    assert schema_of(Data, config)["a"].unseen == "zero"
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="`unseen` must be one of hash, oov, zero, raise"):
        TrainConfig(unseen="drop")  # type: ignore[arg-type]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def collection(policy: Any) -> EmbeddingCollection:
    schema = Schema([FeatureSpec("a", 10, 4, unseen=policy), FeatureSpec("b", 10, 4)])
    return EmbeddingCollection(schema, Plan.uniform(schema, "hash", num_buckets=3))


@pytest.mark.parametrize("build", [collection, lambda p: rse.make_embedding("hash", 10, 4, num_buckets=3, unseen=p)])
def test_states_move_between_policies_that_store_the_same_rows(build: Any) -> None:
    for saved in POLICIES:
        for here in POLICIES:
            state = build(saved).state_dict()
            assert not [k for k in state if "count" in k]
            if (saved == "oov") == (here == "oov"):
                build(here).load_state_dict(state)
            else:
                with pytest.raises(CheckpointError, match=rf"unseen: saved {saved!r}, here {here!r}"):
                    build(here).load_state_dict(state)


# -- counting ---------------------------------------------------------------------------------------------------------


def test_counting_is_asked_for_where_nothing_is_replaced() -> None:
    module = rse.make_embedding("hash", 10, 4, num_buckets=3)
    module(torch.tensor([3, 11]))
    assert module.unseen_counts() == {"embedding": (0, 0)}
    module.count_unseen()(torch.tensor([3, 11]))
    assert module.unseen_counts()["embedding"] == (1, 2)
    assert module.unseen_counts()["embedding"].looked_up == 2
    module.count_unseen(False)(torch.tensor([3, 11]))
    assert module.unseen_counts() == {"embedding": (1, 2)}
    module.reset_unseen_counts()
    assert module.unseen_counts() == {"embedding": (0, 0)}
    strict = rse.make_embedding("full", 10, 4, unseen="raise").count_unseen()
    strict(torch.tensor([3, 4]))
    with pytest.raises(IdRangeError):
        strict(torch.tensor([3, 10]))
    assert strict.unseen_counts() == {"embedding": (0, 2)}, "a refused call is no lookup"


def test_counts_follow_the_module() -> None:
    coll = collection("oov")
    coll(torch.tensor([[10, 3]]))
    for twin in (copy.deepcopy(coll), pickle.loads(pickle.dumps(coll)), coll.half()):
        assert twin.unseen_counts()["a"] == (1, 1)
    lazy = EmbeddingCollection(coll.schema, coll.plan, device="meta").to_empty(device="cpu")
    lazy.reset_parameters()
    assert lazy.unseen_counts() == {"a": (0, 0), "b": (0, 0)}
    with torch.inference_mode():
        lazy(torch.tensor([[10, 3]]))
    assert lazy.unseen_counts()["a"] == (1, 1)


@pytest.mark.crossed
@pytest.mark.parametrize("policy", ["hash", "oov", "zero", "raise"])
@pytest.mark.parametrize(("method", "options"), [("full", {}), ("compositional", {"num_collisions": 5})])
def test_compiled_and_exported_programs_follow_the_policy(method: str, options: dict[str, Any], policy: Any) -> None:
    schema = Schema([FeatureSpec("a", 50, 4, unseen=policy), FeatureSpec("b", 30, 4)])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, method, **options)).eval()
    bad = torch.tensor([[50, 3], [-1, 4], [2**40, 29]])
    ids = bad % torch.tensor([50, 30]) if policy == "raise" else bad
    torch._dynamo.reset()
    compiled = torch.compile(coll, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), coll(ids))
    if policy != "raise":
        assert coll.unseen_counts()["a"] == (6, 6), "compiled programs count too"
    exported = torch.export.export(coll, (ids,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    coll.reset_unseen_counts()
    program = exported.module()
    wanted = coll(ids).repeat(3, 1, 1)
    before = {name: b.clone() for name, b in program.named_buffers()}
    torch.testing.assert_close(program(ids.repeat(3, 1)), wanted)
    for name, b in program.named_buffers():
        assert torch.equal(b, before[name]), f"an exported program has no state to change; {name} changed"
    if policy == "raise":
        with pytest.raises(RuntimeError, match="outside the range"):
            program(bad)


@METHODS
@pytest.mark.parametrize("mode", [None, "sum"])
def test_an_unseen_id_that_hashes_to_the_padding_is_no_padding(method: MethodInfo, mode: str | None) -> None:
    module = built(method, "hash", mode, 5, ())
    unseen = next(i for i in range(-1, -1000, -1) if stands_for(i, module.spec, False) == 5)
    if module.config.accepts_raw:
        pytest.skip("hashes unseen ids by itself")
    out = module(torch.tensor([[unseen]]))
    torch.testing.assert_close(out.view(-1), vector(module, 5).detach().view(-1))
    assert out.requires_grad
    assert not module(torch.tensor([[5]])).any() or (method.name == "full" and mode is None)
