"""The compiled CPU kernels against the readable definition: values, gradients, updates, bits, and ids of every kind."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core.precision import Precision
from recsys_embed.core.program import Hash, Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table, Weight
from recsys_embed.errors import BackendError, ConfigError, IdRangeError
from recsys_embed.kernels import dispatch
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.native import library as native_library
from recsys_embed.kernels.native import lookup as native
from recsys_embed.kernels.native.autograd import SingleLookup
from recsys_embed.kernels.native.output_pool import OutputPool
from recsys_embed.optim import FusedOptimizer, list_rules, make_rule
from tests.kernels.cases import (
    METHODS,
    assert_definition,
    assert_steps_agree,
    assert_two_lookups,
    ids_of,
    pair,
    plan_of,
)  # fmt: skip

LIBRARY = native_library.library()
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"native kernels: {LIBRARY}")
RULES = [make_rule(name, lr=0.1) for name in list_rules()]


@METHODS
@settings(max_examples=6, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    dim=st.sampled_from([1, 3, 4, 8, 12, 16, 33, 64]),
    batch=st.sampled_from([0, 1, 7, 300]),
    part=st.floats(0.05, 1.2),
    sparse=st.booleans(),
)
def test_vectors_and_gradients_are_those_of_the_definition(
    method: Any, sizes: list[int], dim: int, batch: int, part: float, sparse: bool
) -> None:
    schema = Schema([FeatureSpec(f"C{i}", n, dim) for i, n in enumerate(sizes)])
    assert_definition("native", schema, plan_of(method, schema, part), batch, sparse=sparse)


@METHODS
def test_every_instruction_set(method: Any, variant: str) -> None:
    schema = Schema([FeatureSpec("C1", 97, 16), FeatureSpec("C2", 1000, 16), FeatureSpec("C3", 5, 16)])
    plan = plan_of(method, schema)
    ours = EmbeddingCollection(schema, plan, rse.RowwiseAdagrad(lr=0.1), backend="native")
    other = EmbeddingCollection(schema, plan, rse.RowwiseAdagrad(lr=0.1), backend="torch").double()
    for step in range(3):
        ids = ids_of(schema, 50, step)
        got, wanted = ours(ids), other(ids)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
        got.square().sum().backward()
        wanted.square().sum().backward()


@METHODS
@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_a_step_is_the_rule_on_summed_gradients(method: Any, rule: FusedOptimizer) -> None:
    schema = Schema([FeatureSpec("C1", 60, 16), FeatureSpec("C2", 900, 16), FeatureSpec("C3", 2, 16)])
    assert_steps_agree(*pair("native", schema, plan_of(method, schema), rule), steps=4, batch=80)


@pytest.mark.parametrize("method", ["lowdim", "full"])
def test_features_of_many_widths_train_together(method: str) -> None:
    schema = Schema([FeatureSpec(f"C{i}", 100, 8 if method == "lowdim" else i) for i in range(1, 41)])
    plan = Plan({s.name: rse.LowdimConfig(dim=1 + i % 7) for i, s in enumerate(schema)}) if method == "lowdim" else None
    ours = EmbeddingCollection(schema, plan, rse.SGD(lr=0.1), backend="native")
    oracle = EmbeddingCollection(schema, plan, rse.SGD(lr=0.1), backend="torch")
    for step in range(2):
        for coll in (ours, oracle):
            coll(ids_of(schema, 30, step)).square().sum().backward()
    for name in ours.storages:
        torch.testing.assert_close(getattr(ours, name), getattr(oracle, name))


def test_weights_of_absent_rows_have_no_gradient() -> None:
    program = LookupProgram(
        (Table("w", 10, 4, Initializer("normal", 1.0)), Table("s", 20, 1, Initializer("constant", 0, 1.0))),
        (RowLookup("w", Hash(1, 7, num_frequent=3, frequent_absent=True), weight=Weight("s", MixedRadixDigit())),),
    )
    lookup = SingleLookup(program, IndexStore([program.indexes]), False)
    rows, weights = torch.randn(10, 4, requires_grad=True), torch.randn(20, 1, requires_grad=True)
    ids = torch.arange(20)
    for factor in (1e6, 1.0):  # what the first leaves in the kernels' memory
        rows.grad = weights.grad = None
        out = lookup(ids, [rows, weights], False)
        out.backward(torch.full_like(out, factor))
    assert torch.equal(weights.grad[:3], torch.zeros(3, 1))
    assert bool((weights.grad[3:] != 0).all())


def trained(method: Any, batch: int) -> list[Tensor]:
    schema = Schema([FeatureSpec("C1", 3, 16), FeatureSpec("C2", 20_000, 16), FeatureSpec("C3", 700, 16)])
    coll = EmbeddingCollection(schema, plan_of(method, schema), rse.Adagrad(lr=0.1), backend="native")
    outputs = []
    for step in range(2):
        out = coll(ids_of(schema, batch, step, repeat=10))
        outputs.append(out.detach().clone())
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(step)))
    return [*outputs, *(getattr(coll, name) for name in coll.storages)]


@pytest.mark.crossed
@METHODS
def test_bits_do_not_depend_on_the_number_of_threads(method: Any, threads: int) -> None:
    if plan_of(method, Schema([FeatureSpec("C1", 900, 16)]))["C1"].computes:
        pytest.skip("torch's products of matrices, whose last bits may depend on threads")
    torch.set_num_threads(1)
    alone = trained(method, 6000)
    torch.set_num_threads(threads)
    for a, b in zip(alone, trained(method, 6000), strict=True):
        assert torch.equal(a, b)


@pytest.mark.crossed
@METHODS
@pytest.mark.parametrize("bad", [-1, 10, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_ids_out_of_range_are_named_before_anything_is_read(method: Any, bad: int) -> None:
    schema = Schema([FeatureSpec("good", 10, 4), FeatureSpec("bad", 10, 4)])
    coll = EmbeddingCollection(schema, plan_of(method, schema, 1.0), backend="native")
    ids = torch.tensor([[0, 0], [9, bad], [3, 3]])
    if coll.plan["bad"].accepts_raw:
        torch.testing.assert_close(coll(ids), EmbeddingCollection(schema, coll.plan, backend="reference")(ids))
        return
    with pytest.raises(IdRangeError, match="'bad'"):
        coll(ids)


@pytest.mark.parametrize(("hot", "form"), [(300, "bitmap"), (20, "sorted")])
def test_ids_of_a_set_read_the_rows_of_their_ranks(hot: int, form: str) -> None:
    schema = Schema([FeatureSpec("a", 1000, 4)])
    plan = Plan({"a": rse.AdaptiveConfig(num_frequent=hot, num_buckets=7, order="counts")})
    coll = EmbeddingCollection(schema, plan, backend="native")
    assert [index.form for index in coll.bundle.programs["a"].indexes] == [form]
    counts = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    coll.assign_({"a": counts})
    members = (counts >= 1000 - hot).nonzero()
    assert torch.equal(coll(members)[:, 0], coll.table("a.weight")[:hot])
    others = (counts < 1000 - hot).nonzero()
    torch.testing.assert_close(
        coll(others), EmbeddingCollection(schema, plan, backend="torch").assign_({"a": counts})(others)
    )


def test_raw_ids_below_zero_have_the_remainders_of_python() -> None:
    schema = Schema([FeatureSpec("a", 100, 4, ids="raw")])
    coll = EmbeddingCollection(schema, Plan({"a": rse.HashConfig(num_buckets=7, hash="mod")}), backend="native")
    ids = [-1, -7, -8, -(2**63), -(2**63) + 1, 0, 5, 2**63 - 1]
    rows = torch.tensor([i % 7 for i in ids])
    assert torch.equal(coll(torch.tensor(ids).unsqueeze(1))[:, 0], coll.width4[rows])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_layout(dtype: torch.dtype) -> None:
    schema = Schema([FeatureSpec("a", 50, 8), FeatureSpec("b", 70, 8)])
    coll = EmbeddingCollection(schema, backend="native")
    ids = ids_of(schema, 64).to(dtype)
    wanted = coll(ids.long())
    assert torch.equal(coll(ids), wanted)
    assert torch.equal(coll(ids.T.contiguous().T), wanted)
    wide = torch.zeros(128, 5, dtype=dtype)
    wide[::2, 1:4:2] = ids
    assert torch.equal(coll(wide[::2, 1:4:2]), wanted)
    assert torch.equal(coll(ids[:1].expand(9, 2)), wanted[:1].expand(9, 2, 8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_drop_in_reads_ids_of_any_layout(dtype: torch.dtype) -> None:
    emb = rse.make_embedding("hash", 500, 8, budget="4KiB")
    ids = torch.randint(0, 500, (12,)).to(dtype)
    wanted = emb(ids)
    wide = torch.zeros(36, dtype=dtype)
    wide[::3] = ids
    assert torch.equal(emb(wide[::3]), wanted)
    assert torch.equal(emb(ids.view(3, 4).T), wanted.view(3, 4, 8).transpose(0, 1))
    assert torch.equal(emb(ids[:1].expand(9)), wanted[:1].expand(9, 8))
    assert torch.equal(emb(ids[0]), wanted[0])


def test_threads_that_serve_at_once_get_their_own_vectors() -> None:
    schema = Schema([FeatureSpec("a", 500, 16), FeatureSpec("b", 70, 16)])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, "hash", budget="8KiB"), backend="native")
    batches = [ids_of(schema, 16, seed) for seed in range(8)]
    with torch.no_grad():
        wanted = [coll(ids) for ids in batches]

    def serve(turn: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(coll(batches[turn]), wanted[turn]) for _ in range(200))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(serve, range(8)))


@pytest.mark.parametrize("shape", [(3, 4), (47, 2), (47, 8)])
def test_tables_of_another_shape_are_refused_before_memory_is_read(shape: tuple[int, int]) -> None:
    coll = EmbeddingCollection(Schema([FeatureSpec("a", 7, 4), FeatureSpec("b", 40, 4)]), backend="native")
    other, ids = torch.nn.Parameter(torch.ones(shape)), torch.tensor([[6, 39]])
    with pytest.raises(ConfigError, match=r"'width4' must be \[47, 4\], or of more rows; got"):
        torch.func.functional_call(coll, {"width4": other}, (ids,))
    coll.width4 = other
    with pytest.raises(ConfigError, match=r"'width4' must be \[47, 4\], or of more rows; got"):
        coll(ids)
    single = rse.HashEmbedding(100, 4, num_buckets=30)
    single.register_parameter("weight", other)
    with pytest.raises(ConfigError, match="'weight' must be"):
        single(torch.arange(100))


@pytest.mark.parametrize("change", ["load", "data", "parameter", "half and back", "grow"])
def test_tables_that_take_the_place_of_others_are_read(change: str) -> None:
    schema = Schema([FeatureSpec("a", 50, 8), FeatureSpec("b", 70, 8)])
    coll, other = (EmbeddingCollection(schema, backend="native", seed=s).requires_grad_(False) for s in (0, 1))
    ids = ids_of(schema, 6)
    with torch.no_grad():
        before, new = coll(ids), other.width8.detach().clone()
        if change == "load":
            coll.load_state_dict(other.state_dict())
        elif change == "data":
            coll.width8.data = new
        elif change == "parameter":
            coll.width8 = torch.nn.Parameter(new)
        elif change == "half and back":
            coll.load_state_dict(other.state_dict())
            coll.half().float()
        else:
            coll.width8.resize_(4096, 8)[: len(new)] = new
        got = coll(ids)
        assert not torch.equal(got, before)
        torch.testing.assert_close(got, other(ids), rtol=1e-3, atol=1e-3)


def test_what_the_kernels_do_not_do_runs_in_torch() -> None:
    schema = Schema([FeatureSpec("a", 50, 8), FeatureSpec("b", 70, 8)])
    coll = EmbeddingCollection(schema, backend="native")
    ids = ids_of(schema, 6)
    out = coll(ids)
    torch.testing.assert_close(coll(ids.T.reshape(-1), torch.arange(13)), out)
    torch.testing.assert_close(copy.deepcopy(coll).double()(ids), out.double())
    program = torch.export.export(coll, (ids,))
    torch.testing.assert_close(program.module()(ids), out)
    torch.testing.assert_close(torch.compile(coll, backend="eager", fullgraph=True)(ids), out)
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(coll, {"width8": w}, ids[:1]))(coll.width8)
    assert jacobian.sum() == 16


def test_copies_are_independent() -> None:
    schema = Schema([FeatureSpec("a", 50, 8), FeatureSpec("b", 70, 8)])
    plan = Plan.uniform(schema, "adaptive", budget="3KiB", full_below=1)
    coll = EmbeddingCollection(schema, plan, rse.SGD(lr=1.0), backend="native")
    coll.assign_({"b": torch.arange(70)})
    ids = ids_of(schema, 16)
    before = coll(ids).detach().clone()
    twins = [copy.deepcopy(coll), pickle.loads(pickle.dumps(coll))]
    coll(ids).sum().backward()
    coll.assign_({"b": torch.arange(70).flip(0)})
    del coll
    for twin in twins:
        assert torch.equal(twin(ids), before)
        twin(ids).sum().backward()
        assert not torch.equal(twin(ids), before)


def test_a_rule_of_ones_own_runs_in_torch() -> None:
    class Mine(rse.SGD):
        pass

    schema = Schema([FeatureSpec("a", 50, 8)])
    assert EmbeddingCollection(schema, optimizer=Mine(lr=0.1)).backend == "torch"
    with pytest.raises(BackendError, match=r"Mine.*backend 'torch'"):
        EmbeddingCollection(schema, optimizer=Mine(lr=0.1), backend="native")


def test_without_a_library_auto_is_torch_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_library, "library", lambda: "not built")
    dispatch.say_once.cache_clear()
    schema = Schema([FeatureSpec("a", 50, 8)])
    assert EmbeddingCollection(schema).backend == EmbeddingCollection(schema).backend == "torch"
    assert [r.getMessage() for r in caplog.records] == ["backend 'auto' is 'torch' here, not 'native': not built"]
    with pytest.raises(BackendError, match=r"not built.*'torch'"):
        EmbeddingCollection(schema, backend="native")


def test_outputs_in_use_are_never_handed_out_again() -> None:
    pool, shape = OutputPool(), (512, 256)
    held = [pool.take(shape).fill_(i) for i in range(6)]
    view = pool.take(shape).fill_(7)[3:5, 1]
    graph = torch.zeros((), requires_grad=True) * pool.take(shape).fill_(8)
    array = pool.take(shape).fill_(9).numpy()
    storage = pool.take(shape).fill_(10).untyped_storage()
    for _ in range(8):
        pool.take(shape).fill_(-1)
    assert [int(t[0, 0]) for t in held] == list(range(6))
    assert view.eq(7).all()
    assert (array == 9).all()
    assert torch.empty(0).set_(storage)[0] == 10
    graph.sum().backward()  # what autograd saved is as it was
    address = pool.take(shape).data_ptr()
    assert pool.take(shape).data_ptr() == address, "freed at once, so used again"
    assert pool.nbytes <= 4 * 4 * 512 * 256


def test_memory_that_other_processes_read_is_not_used_again() -> None:
    pool, shape = OutputPool(), (512, 256)
    sent = pool.take(shape).fill_(1).share_memory_()  # what a queue of torch.multiprocessing does
    address = sent.data_ptr()
    del sent
    assert all(pool.take(shape).data_ptr() != address for _ in range(8))
    assert pool.nbytes <= 4 * 4 * 512 * 256


@pytest.mark.parametrize("batch", [3, 3000])
@pytest.mark.parametrize("sparse", [False, True])
def test_defaults_of_torch_do_not_reach_the_kernels_memory(batch: int, sparse: bool) -> None:
    schema = Schema([FeatureSpec("a", 500, 32), FeatureSpec("b", 70, 32)])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, "memcom", budget="20KiB"), backend="native", sparse=sparse)
    ids = ids_of(schema, batch)
    wanted = coll(ids)
    wanted.backward(torch.ones_like(wanted))
    grads = [p.grad for p in coll.parameters()]
    coll.zero_grad()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = [coll(ids) for _ in range(2)]
            got[1].backward(torch.ones_like(wanted))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(g, wanted) for g in got)
    for parameter, grad in zip(coll.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad.to_dense(), grad.to_dense())


def test_outputs_of_two_steps_are_apart() -> None:
    schema = Schema([FeatureSpec("a", 5000, 64)])
    coll = EmbeddingCollection(schema, backend="native")
    first_ids, second_ids = ids_of(schema, 4000, 0), ids_of(schema, 4000, 1)
    first = coll(first_ids)
    kept = first.detach().clone()
    second = coll(second_ids)
    assert torch.equal(first, kept)
    (first.square().sum() + second.sum()).backward()
    table = coll.width64.detach()
    wanted = torch.zeros_like(table).index_add_(0, first_ids[:, 0], 2 * table[first_ids[:, 0]])
    wanted.index_add_(0, second_ids[:, 0], torch.ones(4000, 64))
    torch.testing.assert_close(coll.width64.grad, wanted)


@METHODS
@pytest.mark.parametrize("fused", [True, False])
def test_two_lookups_before_their_backwards(method: Any, fused: bool) -> None:
    """The tables move between the two backwards: each counts with the rows that its own lookup read."""
    schema = Schema([FeatureSpec("C1", 60, 16), FeatureSpec("C2", 900, 16)])
    ours, oracle = pair("native", schema, plan_of(method, schema), rse.SGD(lr=0.5) if fused else None)
    assert_two_lookups(ours, oracle, [ids_of(schema, 80, 0), ids_of(schema, 80, 1)])


@METHODS
def test_drop_ins_run_them_too(method: Any) -> None:
    spec = FeatureSpec("embedding", 300, 12)
    need = method.config_cls.sized(spec, 1).footprint(spec).serve
    options = {} if method.name == "full" else {"budget": max(need, 300 * 12 * 2)}
    ours = rse.make_embedding(method.name, 300, 12, **options)
    oracle = copy.deepcopy(ours).double()
    ids = torch.randint(0, 300, (40, 3), generator=torch.Generator().manual_seed(0))
    got, wanted = ours(ids), oracle(ids)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    got.square().sum().backward()
    wanted.square().sum().backward()
    if ours.config.computes:
        return
    for p, q in zip(ours.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5)
    if method.name != "full":
        assert "_Lookup" in str(type(ours._columns(ids.view(-1)).grad_fn))


class Narrow(type(Plan.full(Schema([FeatureSpec("C", 2, 2)]))["C"])):  # type: ignore[misc]
    """Full tables of half the width, and zeros."""

    def program(self, spec: FeatureSpec) -> LookupProgram:
        table = Table("weight", spec.num_embeddings, spec.embedding_dim // 2, Initializer.plain(spec))
        return LookupProgram(
            (table,), (RowLookup("weight", MixedRadixDigit()),), padding=spec.embedding_dim - table.width
        )


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_narrow_features_end_in_zeros(backend: str) -> None:
    schema = Schema([FeatureSpec("C1", 50, 16), FeatureSpec("C2", 7, 16, unseen="zero"), FeatureSpec("C3", 9, 16)])
    coll = EmbeddingCollection(
        schema, Plan({"C1": Narrow(), "C2": Narrow(), "C3": Plan.full(schema)["C3"]}), backend=backend
    )
    ids = ids_of(schema, 30)
    with torch.no_grad():
        for name in coll.storages:
            getattr(coll, name).add_(1.0)
    out = coll(ids)
    for i, spec in enumerate(schema):
        table = coll.table(f"{spec.name}.weight")
        assert torch.equal(out[:, i, : table.shape[1]], table[ids[:, i]])
        assert not out[:, i, table.shape[1] :].any()
    out.backward(torch.ones_like(out))
    counted = torch.zeros(50).index_add_(0, ids[:, 0], torch.ones(30))
    storage, offset = coll.places["C1.weight"]
    assert torch.equal(getattr(coll, storage).grad[offset : offset + 50], counted.unsqueeze(1).expand(50, 8))


def bags_of(schema: Schema, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values and offsets of bags of the given lengths, taken in turn."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    values = [
        torch.randint(0, s.num_embeddings, (n,), generator=generator)
        for i, s in enumerate(schema)
        for n in lengths[i % batch :] + lengths[: i % batch]
    ]
    sizes = [len(v) for v in values]
    return torch.cat(values), torch.tensor([0, *sizes]).cumsum(0)


@METHODS
@settings(max_examples=8, deadline=None)
@given(
    dim=st.sampled_from([1, 3, 8, 16, 33]),
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 130]), min_size=1, max_size=4),
    pooling=st.sampled_from(["sum", "mean"]),
    weighted=st.booleans(),
    unseen=st.sampled_from([None, "zero"]),
)
def test_bags_are_those_of_the_definition(
    method: Any, dim: int, lengths: list[int], pooling: str, weighted: bool, unseen: Any
) -> None:
    sizes = (90, 7, 400)
    schema = Schema([FeatureSpec(f"C{i}", n, dim, pooling=pooling, unseen=unseen) for i, n in enumerate(sizes)])
    plan = plan_of(method, schema)
    ours = EmbeddingCollection(schema, plan, rse.SGD(lr=0.1), backend="native")
    oracle = EmbeddingCollection(schema, plan, backend="reference").double()
    step = torch.optim.SGD(oracle.parameters(), lr=0.1)
    for seed in range(2):
        values, offsets = bags_of(schema, lengths, seed)
        if unseen:
            values[::3] = 1000
        weights = torch.rand(len(values), generator=torch.Generator().manual_seed(seed))
        weights = weights if weighted and pooling == "sum" else None
        got = ours(values, offsets, weights)
        wanted = oracle(values, offsets, None if weights is None else weights.double())
        torch.testing.assert_close(got.double(), wanted, rtol=3e-5, atol=1e-4)  # sums of 130 rows
        upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step.zero_grad()
        got.backward(upstream.float())
        wanted.backward(upstream)
        step.step()
        for name in ours.storages:
            ours_now, oracle_now = getattr(ours, name).double(), getattr(oracle, name)
            torch.testing.assert_close(ours_now, oracle_now, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for mine, theirs in zip(ours.parameters(), oracle.parameters(), strict=True):
                theirs.copy_(mine)


@pytest.mark.crossed
@METHODS
def test_bits_of_bags_do_not_depend_on_the_number_of_threads(method: Any, threads: int) -> None:
    if plan_of(method, Schema([FeatureSpec("C1", 900, 16)]))["C1"].computes:
        pytest.skip("torch's products of matrices, whose last bits may depend on threads")
    schema = Schema([FeatureSpec("C1", 3, 16), FeatureSpec("C2", 9_000, 16, pooling="mean"), FeatureSpec("C3", 70, 16)])
    values, offsets = bags_of(schema, [3, 0, 1, 7] * 500)
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        coll = EmbeddingCollection(schema, plan_of(method, schema), rse.Adagrad(lr=0.1), backend="native")
        out = coll(values, offsets)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        results.append([out.detach(), *(getattr(coll, name) for name in coll.storages)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_bags_of_ids_out_of_range_are_refused_by_name() -> None:
    schema = Schema([FeatureSpec("C1", 30, 8), FeatureSpec("C2", 5, 8)])
    coll = EmbeddingCollection(schema, rse.Plan.full(schema), rse.SGD(lr=0.1), backend="native")
    before = coll.state_dict()["width8"].clone()
    for bad in (5, -1, 2**40, -(2**63)):
        with pytest.raises(IdRangeError, match="C2"):
            coll(torch.tensor([29, 0, bad]), torch.tensor([0, 1, 3]))
    assert torch.equal(coll.state_dict()["width8"], before)


@pytest.mark.crossed(2)
@METHODS
@pytest.mark.parametrize("precision", get_args(Precision))
def test_exports_are_served_as_torch_decodes_them(method: Any, precision: Any, tmp_path: Path, variant: str) -> None:
    schema = Schema([FeatureSpec("C1", 97, 16), FeatureSpec("C2", 1000, 16, unseen="zero"), FeatureSpec("C3", 5, 16)])
    coll = EmbeddingCollection(schema, plan_of(method, schema), backend="native")
    with torch.no_grad():
        for p in coll.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    rse.export(coll, tmp_path / "e", precision=precision)
    ours, theirs = rse.load(tmp_path / "e"), rse.load(tmp_path / "e", backend="torch")
    ids = ids_of(schema, 60)
    ids[::7, 1] = 5000
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-6, atol=1e-6)
    bags = torch.cat([ids[:, 0], ids[:, 1], ids[:, 2]]), torch.arange(0, 181, 60).repeat_interleave(2)[:7]
    torch.testing.assert_close(ours(*bags), theirs(*bags), rtol=1e-5, atol=1e-5)
    if method.name == "full" and precision != "fp32":
        assert ours.served.direct(ours.storages) is not None, "the kernels read what is stored"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_decoded_exactly(dtype: torch.dtype, variant: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 16)
    coll = EmbeddingCollection(Schema([FeatureSpec("C1", len(every), 16)]), backend="native")
    lookup, out = coll.bundle.batched["native"].lookup, torch.empty(len(every), 16)
    # As lookups of exported rows do, whose types have just been checked.
    assert lookup.forward(native.Ids.matrix(torch.arange(len(every)).unsqueeze(1)), [every], [out], known=True)
    assert torch.equal(out.nan_to_num(7.0), every.float().nan_to_num(7.0))
    assert torch.equal(out.isnan(), every.isnan())
