"""FBGEMM's tables as a backend: its values, gradients and updates are those of the others, and the rest is refused."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import BackendError, IdRangeError
from recsys_embed.kernels import dispatch, fbgemm
from recsys_embed.kernels.bag_rows import divide
from recsys_embed.kernels.precision import Layout
from recsys_embed.optim import FusedOptimizer
from recsys_embed.registry import get_method
from recsys_embed.testing import poisoned_memory

WHY = fbgemm.why_not()
pytestmark = pytest.mark.skipif(WHY is not None, reason=f"fbgemm: {WHY}")
# Sums of rows: plain, several to a row, several rows to an id, side by side, narrower, and of one table for all.
PLANS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("hash", {}),
    ("hash", {"sign": True}),
    ("multihash", {}),
    ("multihash", {"sign": True}),
    ("multihash", {"combine": "mean", "separate": True}),
    ("compositional", {"combine": "add"}),
    ("compositional", {"combine": "concat"}),
    ("unified", {}),
    ("lowdim", {}),
    ("adaptive", {}),
    ("freqcut", {}),
]
EACH = pytest.mark.parametrize("method", PLANS, ids=lambda m: "-".join([m[0], *map(str, m[1].values())]))
RULES = [rse.SGD(lr=0.1), rse.Adagrad(lr=0.1, eps=1e-2), rse.RowwiseAdagrad(lr=0.1)]
RULE = pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)


def plan_of(method: tuple[str, dict[str, Any]], schema: Schema, part: float = 0.5) -> Plan:
    name, params = method
    if name == "full":
        return Plan.full(schema)
    config = get_method(name).config_cls
    need = sum(config.sized(s, 1, **params).footprint(s).serve for s in schema)
    bytes_of_all = sum(4 * s.num_embeddings * s.embedding_dim for s in schema)
    return Plan.uniform(schema, name, budget=max(need, int(part * bytes_of_all)), full_below=1, **params)


def ids_of(schema: Schema, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=generator) for s in schema], 1)


def bags_of(schema: Schema, batch: int, seed: int = 0, longest: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(schema), batch), generator=generator)
    values = [
        torch.randint(0, s.num_embeddings, (int(n),), generator=generator)
        for s, n in zip(schema, lengths.sum(1), strict=True)
    ]
    return torch.cat(values), torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))


def schema_of(dim: int, **options: Any) -> Schema:
    return Schema([FeatureSpec(f"C{i}", n, dim, **options) for i, n in enumerate((60, 900, 2, 300))])


@EACH
@RULE
@pytest.mark.parametrize("dim", [16, 10])
def test_steps_are_the_rule_on_summed_gradients(method: Any, rule: FusedOptimizer, dim: int) -> None:
    schema = schema_of(dim)
    plan = plan_of(method, schema)
    with poisoned_memory():
        ours = EmbeddingCollection(schema, plan, rule, backend="fbgemm")
        oracle = EmbeddingCollection(schema, plan, rule, backend="torch").double()
    for step in range(4):
        given = (ids_of(schema, 80, step),) if step % 2 else bags_of(schema, 50, step)
        got, wanted = ours(*given), oracle(*given)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
        upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        got.backward(upstream.float())
        wanted.backward(upstream)
    for name in ours.storages:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(oracle, name), rtol=2e-4, atol=2e-5)
        for key in rule.state:
            state, right = getattr(ours, f"{name}_{key}"), getattr(oracle, f"{name}_{key}")
            torch.testing.assert_close(state.double(), right.double(), rtol=2e-4, atol=2e-5)


@EACH
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    dim=st.sampled_from([2, 4, 7, 12, 32]),
    batch=st.sampled_from([0, 1, 7, 200]),
    pooling=st.sampled_from(["sum", "mean", "max"]),
    seed=st.integers(0, 9),
)
def test_vectors_and_gradients_are_those_of_the_definition(
    method: Any, sizes: list[int], dim: int, batch: int, pooling: Any, seed: int
) -> None:
    specs = [FeatureSpec(f"C{i}", n, dim, pooling=pooling, unseen="zero" if i else None) for i, n in enumerate(sizes)]
    schema = Schema(specs)
    plan = plan_of(method, schema)
    ours = EmbeddingCollection(schema, plan, backend="fbgemm")
    oracle = EmbeddingCollection(schema, plan, backend="reference").double()
    ids = ids_of(schema, batch, seed)
    ids[:, 1:][torch.rand(batch, len(sizes) - 1, generator=torch.Generator().manual_seed(seed)) < 0.1] = 10**6
    for given in ((ids,), bags_of(schema, batch, seed)):
        got, wanted = ours(*given), oracle(*given)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
        upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        got.backward(upstream.float())
        wanted.backward(upstream)
    for (name, p), q in zip(ours.named_parameters(), oracle.parameters(), strict=True):
        assert p.grad is not None, name
        # Up to a thousand gradients of one row, added up in float32.
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=5e-5)


@RULE
@pytest.mark.parametrize(("first", "second"), [("fbgemm", "native"), ("native", "fbgemm"), ("fbgemm", "torch")])
@pytest.mark.parametrize("dim", [16, 6])
def test_training_goes_on_where_another_backend_left_off(
    rule: FusedOptimizer, first: str, second: str, dim: int
) -> None:
    schema = schema_of(dim)
    plan = plan_of(("compositional", {"combine": "add"}), schema)
    alone = EmbeddingCollection(schema, plan, rule, backend="torch")
    one = EmbeddingCollection(schema, plan, rule, backend=first, seed=3)
    one.load_state_dict(alone.state_dict())

    def train(coll: EmbeddingCollection, steps: range) -> None:
        for step in steps:
            coll.lr = 0.1 / (step + 1)
            out = coll(ids_of(schema, 60, step))
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(step)))

    train(alone, range(5))
    train(one, range(3))
    other = EmbeddingCollection(schema, plan, rule, backend=second, seed=4)
    other.load_state_dict(one.state_dict())
    saved = one.optimizer_state_dict()
    other.load_optimizer_state_dict(saved)
    assert other.optimizer_state_dict()["steps"] == dict.fromkeys(other.storages, 3)
    for name in saved["state"]:
        assert torch.equal(saved["state"][name], other.optimizer_state_dict()["state"][name])
    train(other, range(3, 5))
    assert other.lr == alone.lr
    for name in alone.storages:
        torch.testing.assert_close(getattr(other, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
        for key in rule.state:
            mine, right = getattr(other, f"{name}_{key}"), getattr(alone, f"{name}_{key}")
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_per_sample_weights_learn_too() -> None:
    schema = schema_of(8)
    ids, offsets = bags_of(schema, 30)
    grads = []
    for backend in ("fbgemm", "torch"):
        coll = EmbeddingCollection(schema, optimizer=rse.SGD(lr=0.1), backend=backend)
        weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(0)).requires_grad_()
        coll(ids, offsets, weights).square().sum().backward()
        grads += [weights.grad, coll.width8.detach()]
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[3])


@EACH
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("dim", [8, 6])
def test_bags_are_added_up_as_they_are_read(
    method: Any, pooling: Any, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights included, and several threads; where it pools by itself torch has nothing left to pool."""
    schema = schema_of(dim, pooling=pooling, unseen="zero")
    plan = plan_of(method, schema)
    # A small epsilon would make a whole step of what remains of gradients that cancel.
    rule = rse.Adagrad(lr=0.1, eps=1e-2)
    ours, oracle = (EmbeddingCollection(schema, plan, rule, backend=b) for b in ("fbgemm", "torch"))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for step in range(3):
            ids, offsets = bags_of(schema, 200, step)
            ids[torch.rand(len(ids), generator=torch.Generator().manual_seed(step)) < 0.1] = 10**9
            weights = (torch.rand(len(ids)),) if pooling == "sum" and step else ()
            wanted = oracle(ids, offsets, *weights)
            with monkeypatch.context() as without:
                without.setattr("recsys_embed.collection.lookup_bundle.pool_vectors", None)
                got = ours(ids, offsets, *weights)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(step))
            got.backward(upstream)
            wanted.backward(upstream)
        for name in ours.storages:
            torch.testing.assert_close(getattr(ours, name), getattr(oracle, name), rtol=2e-4, atol=2e-5)
    finally:
        torch.set_num_threads(threads)


def test_several_lookups_before_their_backwards() -> None:
    """Tables move between the backwards; gradients are those of the rows that each lookup read."""
    schema = schema_of(8)
    colls = [EmbeddingCollection(schema, optimizer=rse.SGD(lr=0.5), backend=b) for b in ("fbgemm", "torch")]
    for coll in colls:
        outs = [coll(ids_of(schema, 40, seed)) for seed in range(2)]
        (outs[0].sin().sum() * 2 + outs[1].square().sum()).backward()
    torch.testing.assert_close(colls[0].width8, colls[1].width8, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [rse.SGD(lr=0.1), None], ids=repr)
@pytest.mark.parametrize("dim", [8, 6])
def test_a_graph_that_is_not_retained_has_one_backward(optimizer: FusedOptimizer | None, dim: int) -> None:
    coll = EmbeddingCollection(Schema([FeatureSpec("a", 50, dim)]), None, optimizer, backend="fbgemm")
    loss = coll(torch.tensor([[3]])).sum()
    loss.backward()
    once = coll.table("a.weight").clone()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert torch.equal(coll.table("a.weight"), once)


def test_nothing_is_updated_in_evaluation() -> None:
    schema = schema_of(8)
    coll = EmbeddingCollection(schema, optimizer=rse.SGD(lr=0.5), backend="fbgemm").eval()
    assert not coll(ids_of(schema, 9)).requires_grad
    coll.train()
    with torch.no_grad():
        assert not coll(ids_of(schema, 9)).requires_grad
    assert coll(ids_of(schema, 9)).requires_grad


def test_copies_are_independent() -> None:
    schema = schema_of(8)
    coll = EmbeddingCollection(schema, plan_of(("unified", {}), schema), rse.SGD(lr=1.0), backend="fbgemm")
    ids = ids_of(schema, 16)
    before = coll(ids).detach().clone()
    twins = [copy.deepcopy(coll), pickle.loads(pickle.dumps(coll))]
    coll(ids).sum().backward()
    for twin in twins:
        assert torch.equal(twin(ids), before)
        twin(ids).sum().backward()
        assert torch.equal(twin(ids), coll(ids))


def test_traced_programs_run_in_torch() -> None:
    schema = schema_of(8)
    coll = EmbeddingCollection(schema, backend="fbgemm")
    ids = ids_of(schema, 6)
    out = coll(ids)
    torch.testing.assert_close(torch.export.export(coll, (ids,)).module()(ids), out)
    torch.testing.assert_close(torch.compile(coll, backend="eager", fullgraph=True)(ids), out)
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(coll, {"width8": w}, ids[:1]))(coll.width8)
    assert jacobian.sum() == 4 * 8


@EACH
@pytest.mark.parametrize("bad", [-1, 2, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_ids_out_of_range_are_named_and_left_alone(method: Any, bad: int) -> None:
    schema = Schema([FeatureSpec("good", 900, 8), FeatureSpec("bad", 2, 8)])
    coll = EmbeddingCollection(schema, plan_of(method, schema, 1.0), rse.SGD(lr=0.1), backend="fbgemm")
    ids = torch.tensor([[0, 0], [9, bad], [3, 1]])
    given = ids.clone()
    if coll.plan["bad"].accepts_raw:
        torch.testing.assert_close(coll(ids), EmbeddingCollection(schema, coll.plan, backend="reference")(ids))
    else:
        with pytest.raises(IdRangeError, match="'bad'"):
            coll(ids)
        with pytest.raises(IdRangeError, match="'bad'"):
            coll(torch.tensor([3, bad]), torch.tensor([0, 1, 2]))
    assert torch.equal(ids, given)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"optimizer": rse.Adam()}, "no CPU kernel for Adam.*SGD, Adagrad and RowwiseAdagrad.*'native'"),
        ({"optimizer": rse.SGD(weight_decay=0.1)}, "no weight decay.*'native'"),
        ({"optimizer": rse.SGD(weight_decay=0.1, rows="all")}, "touched rows.*'native'"),
        ({"dtype": torch.float64}, "float32 tables on the CPU; got torch.float64"),
        ({"sparse": True}, "no sparse gradients"),
        ({"optimizer": rse.Adam(), "dtype": torch.bfloat16}, "2 faults in backend 'fbgemm'"),
    ],
    ids=str,
)
def test_what_it_does_not_do_is_refused_with_the_alternative(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        EmbeddingCollection(schema_of(8), backend="fbgemm", **options)


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [
        ("compositional", {"combine": "mul"}, "'C0': its rows are multiplied"),
        ("memcom", {}, "learned weights"),
        ("robe", {}, "runs"),
    ],
)
def test_methods_that_are_no_sums_are_refused_by_feature(name: str, params: dict[str, Any], reason: str) -> None:
    schema = schema_of(8)
    with pytest.raises(BackendError, match=rf"(?s){reason}.*"):
        EmbeddingCollection(schema, plan_of((name, params), schema, 0.7), backend="fbgemm")


def test_tables_that_moved_are_refused() -> None:
    coll = EmbeddingCollection(schema_of(8), backend="fbgemm").double()
    with pytest.raises(BackendError, match=r"have become torch\.float64"):
        coll(ids_of(coll.schema, 3))


def test_it_runs_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EmbeddingCollection(schema_of(8)).backend != "fbgemm"
    (found,) = [b for b in dispatch.available_backends() if b.name == "fbgemm"]
    assert found.available
    fails = lambda name: (_ for _ in ()).throw(OSError("libtbb.so.2"))  # noqa: E731
    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises(ImportError, match=r"libtbb\.so\.2"):
        EmbeddingCollection(schema_of(8), backend="fbgemm")


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda r: (r[0], r[0] + r[1])), min_size=1)
)
def test_tables_hold_what_features_read_and_overlap_no_other(ranges: list[tuple[int, int]]) -> None:
    tables = divide(ranges)
    assert all(t[0] <= r[0] and r[1] <= t[1] for t, r in zip(tables, ranges, strict=True))
    assert len([t for t, _ in itertools.groupby(tables)]) == len(set(tables)), "features of one table are neighbours"
    for a, b in itertools.combinations(set(tables), 2):
        assert a[1] <= b[0] or b[1] <= a[0]
    if len(set(ranges)) == len(ranges) and all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(ranges))):
        assert tables == ranges, "no more is joined than has to be"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.01], ids=lambda k: f"kept {k}")
def test_exports_are_served_by_its_inference_tables(
    precision: Any, kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = Schema([FeatureSpec("a", 3000, 16), FeatureSpec("b", 40, 16), FeatureSpec("c", 700, 16)])
    coll = EmbeddingCollection(schema)
    with torch.no_grad():
        table = coll.table("a.weight")
        table[torch.rand(len(table), generator=torch.Generator().manual_seed(0)) >= kept] = 0.0
    rse.export(coll, tmp_path / "c.safetensors", precision=precision)
    ours, plain = (rse.load(tmp_path / "c.safetensors", backend=b) for b in ("fbgemm", "torch"))
    ids = torch.cat([ids_of(schema, 500), torch.tensor([[2999, 39, 699], [0, 0, 0]])])
    torch.testing.assert_close(ours(ids), plain(ids), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours(*bags_of(schema, 20)), plain(*bags_of(schema, 20)), rtol=1e-6, atol=1e-6)
    with pytest.raises(IdRangeError, match="'b'"):
        ours(torch.tensor([[0, 40, 0]]))
    for name in plain.storages if plain.served is not None else ():
        stored, other = ours.served[name], plain.served[name]
        pruned = any(p.form != "all" for p in stored.parts)
        assert (stored.places is not None) == pruned
        assert stored.nbytes == other.nbytes + 4 * stored.rows * pruned, "what indices take is counted"
        assert ours.footprint().index - plain.footprint().index == 4 * stored.rows * pruned
        # It is FBGEMM that reads: torch decodes the last rows at most, whose registers would end beyond the table.
        monkeypatch.setattr("recsys_embed.kernels.stored_tables.positions", None)
        monkeypatch.setattr(Layout, "decode", lambda self, rows: pytest.fail("decoded by torch"))
        stored(torch.arange(100))


def test_rows_that_do_not_exist_are_refused_before_the_kernel() -> None:
    layout = Layout("int8", 16)
    reader = fbgemm.RowReader(layout)
    data = layout.encode(torch.randn(100, 16))
    places = torch.tensor([-1, 3, 99], dtype=torch.int32)
    got = reader.remapped(data, torch.tensor([2, 0, 1]), places)
    assert torch.equal(got, torch.cat([layout.decode(data[99:]), torch.zeros(1, 16), layout.decode(data[3:4])]))
    for bad in (-1, 3, 2**40):
        with pytest.raises(IndexError, match=r"rows must be in \[0, 3\)"):
            reader.remapped(data, torch.tensor([0, bad]), places)
    with pytest.raises(IndexError, match=r"rows must be in \[0, 100\)"):
        reader(data, torch.tensor([100]))
    assert reader.remapped(data[:2], torch.tensor([0, 0]), places).eq(0).all(), "all of a small table"


@pytest.mark.parametrize("kind", ["INT8", "INT4", "FP16"])
def test_pruned_tables_are_read_as_its_own_module_reads_them(kind: str) -> None:
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    layout = Layout(kind.lower(), 16)
    data = layout.encode(torch.randn(300, 16))
    places = torch.full((1000,), -1, dtype=torch.int32)
    places[torch.randperm(1000)[:300].sort()[0]] = torch.arange(300, dtype=torch.int32)
    theirs = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", 300, 16, getattr(SparseType, kind), EmbeddingLocation.HOST)],
        device="cpu",
        output_dtype=SparseType.FP32,
        index_remapping=[places],
        row_alignment=1,
    )
    theirs.initialize_weights()
    theirs.split_embedding_weights(split_scale_shifts=False)[0][0].copy_(data.view(torch.uint8))
    rows = torch.randint(0, 1000, (700,))
    got = fbgemm.RowReader(layout).remapped(data, rows, places)
    assert torch.equal(got, theirs(rows.int(), torch.arange(701, dtype=torch.int32)))
    assert bool((got == 0).all(1).eq(places[rows] < 0).all()), "absent rows are zeros, and no others"
