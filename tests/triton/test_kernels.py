"""The GPU kernels against the readable definition in float64: in triton's interpreter, or on a GPU."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core.row_format import TRAINED
from recsys_embed.embedding import compressed_embedding as embedding
from recsys_embed.errors import ConfigError, IdRangeError
from recsys_embed.kernels.triton import fields, status
from recsys_embed.optim import FusedOptimizer, list_rules, make_rule
from tests.kernels import cases
from tests.kernels.cases import METHODS, assert_definition, assert_steps_agree, assert_two_lookups, plan_of
from tests.test_low_precision import few_bits

update = pytest.importorskip("recsys_embed.kernels.triton.update", exc_type=ImportError)
rows = pytest.importorskip("recsys_embed.kernels.triton.rows", exc_type=ImportError)
pytestmark = pytest.mark.kernels
DEVICE = "cpu" if status.interpreted() else "cuda"
RULES = [
    *(make_rule(name, lr=0.1) for name in list_rules()),
    rse.RowwiseAdagrad(lr=0.1, weight_decay=0.1),
    rse.FTRL(lr=0.1, l1=0.2, l2=0.1),
    rse.RowwiseRMSprop(lr=0.1, ar_alpha=0.5),
    rse.Adam(lr=0.1, bias_correction="row"),
    rse.Adam(lr=0.1, weight_decay=0.1, rows="all"),
]


@pytest.fixture(params=["sorted", "small"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether small tables are sorted like large ones."""
    if request.param == "sorted":
        monkeypatch.setattr(fields, "_SMALL_BYTES", 0)
    return str(request.param)


def ids_of(schema: Schema, batch: int, seed: int = 0) -> Tensor:
    return cases.ids_of(schema, batch, seed, device=DEVICE)


def pair(schema: Schema, plan: Plan | None, rule: FusedOptimizer) -> tuple[EmbeddingCollection, EmbeddingCollection]:
    """A collection that the kernels run, and its oracle."""
    return cases.pair("triton", schema, plan, rule, DEVICE)


@METHODS
@settings(max_examples=3, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    dim=st.sampled_from([1, 3, 4, 12, 16]),
    batch=st.sampled_from([0, 1, 7, 33]),
    part=st.floats(0.05, 1.2),
    sparse=st.booleans(),
)
def test_vectors_and_gradients_are_those_of_the_definition(
    method: Any, sizes: list[int], dim: int, batch: int, part: float, sparse: bool
) -> None:
    schema = Schema([FeatureSpec(f"C{i}", n, dim) for i, n in enumerate(sizes)])
    assert_definition("triton", schema, plan_of(method, schema, part), batch, sparse=sparse, device=DEVICE)


@METHODS
def test_a_step_of_every_method(method: Any, path: str) -> None:
    schema = Schema([FeatureSpec("C1", 60, 8), FeatureSpec("C2", 900, 8), FeatureSpec("C3", 2, 8)])
    assert_steps_agree(*pair(schema, plan_of(method, schema), rse.RowwiseAdagrad(lr=0.1)), steps=2, batch=20)


@METHODS
def test_features_of_one_table_with_padding(method: Any, path: str) -> None:
    """Vectors, also unpooled ones, and one step of all lookups; an id out of range is refused, -1 as well."""
    specs = [FeatureSpec("item", 60, 8), FeatureSpec("last", 60, 8, table="item", padding_idx=3)]
    schema = Schema(specs)
    ours, oracle = pair(schema, plan_of(method, schema), rse.RowwiseAdagrad(lr=0.1))
    ids = ids_of(schema, 20)
    ids[::3, 1] = 3
    assert_steps_agree(ours, oracle, steps=1, batch=20, ids=ids)
    for coll in (ours, oracle):
        outs = coll(ids), coll.lookup("last", ids), coll.lookup("item", ids[:, 0])
        assert not outs[1][::3, 1].any()
        sum(out.square().sum() for out in outs).backward()
    for name in ours.storages:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(oracle, name), rtol=1e-4, atol=1e-5)
    if not plan_of(method, schema)["item"].accepts_raw:
        for wrong in (-1, 60):
            with pytest.raises(IdRangeError, match="last"):
                ours(torch.tensor([[0, wrong]], device=DEVICE))


@pytest.mark.parametrize("method", ["full", "memcom"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_step_of_every_rule(method: str, rule: FusedOptimizer, path: str) -> None:
    schema = Schema([FeatureSpec("C1", 40, 4), FeatureSpec("C2", 3, 4)])
    plan = Plan.full(schema) if method == "full" else Plan.uniform(schema, method, budget=400, full_below=1)
    assert_steps_agree(*pair(schema, plan, rule), steps=3, batch=12)


@pytest.mark.parametrize("precision", ["bf16", "8bit"])
@pytest.mark.parametrize("rule", [make_rule(name, lr=0.1) for name in list_rules() if name != "sgd"], ids=repr)
def test_state_of_few_bits_is_torchs(rule: FusedOptimizer, precision: Any, path: str) -> None:
    """Where rules compute equal numbers: sums of several may differ in the last bit of float32."""
    rule = replace(rule, state_precision=precision)
    schema = Schema([FeatureSpec("C1", 40, 4), FeatureSpec("C2", 3, 4)])
    ours, theirs = (EmbeddingCollection(schema, None, rule, backend=b, device=DEVICE) for b in ("triton", "torch"))
    ids = torch.stack([torch.randperm(40)[:24], torch.arange(24) % 3], 1).to(DEVICE)
    for step in range(3):
        for coll in (ours, theirs):
            out = coll(ids)
            out.backward(torch.arange(out.numel(), device=DEVICE).view_as(out).sin() * 10.0 ** (step - 2))
        for name, values in ours.optimizer_state_dict()["state"].items():
            same = values == theirs.optimizer_state_dict()["state"][name]
            assert float(same.float().mean()) > (0.99 if step else 1 - 1e-9), name


@pytest.mark.parametrize("combine", ["mul", "sum", "concat"])
def test_products_sums_and_concatenations(combine: str, path: str) -> None:
    schema = Schema([FeatureSpec("C1", 40, 8), FeatureSpec("C2", 900, 8)])
    plan = Plan.uniform(schema, "compositional", budget="4KiB", full_below=1, combine=combine)
    assert_steps_agree(*pair(schema, plan, rse.Adagrad(lr=0.1)), steps=2, batch=20)


@pytest.mark.parametrize("options", [{"sign": True}, {"sign": True, "block_size": 3}, {"block_size": 2}], ids=repr)
@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_that_overlap_and_pass_the_end(options: dict[str, Any], deterministic: bool) -> None:
    schema = Schema([FeatureSpec("C1", 40, 8), FeatureSpec("C2", 900, 8)])
    plan = Plan.uniform(schema, "robe", budget="200B", full_below=1, **options)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert_steps_agree(*pair(schema, plan, rse.Adam(lr=0.1)), steps=2, batch=20)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_long_runs_are_summed_over_many_pieces(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "_SMALL_BYTES", 0)
    monkeypatch.setattr(update, "_CHUNK", 4)
    monkeypatch.setattr(update, "_CUT", 16)
    schema = Schema([FeatureSpec("C1", 9, width), FeatureSpec("C2", 50, width)])
    # 8 sorts last of its table and 1 in the middle; both cover far more than the 16 chunks that are added up at once.
    first = torch.tensor([8] * 70 + [1] * 90 + [0, 2, 2, 3, 3, 3, 3, 3], device=DEVICE)
    ids = torch.stack([first, torch.arange(len(first), device=DEVICE) % 50], 1)[torch.randperm(len(first)).to(DEVICE)]
    assert_steps_agree(*pair(schema, None, rse.Adagrad(lr=0.1)), steps=2, batch=0, ids=ids)


def test_rows_wider_than_a_tile() -> None:
    schema = Schema([FeatureSpec("C1", 30, 300), FeatureSpec("C2", 5, 300)])
    plan = Plan.uniform(schema, "compositional", budget="20KiB", full_below=1, combine="mul")
    assert_steps_agree(*pair(schema, plan, rse.RowwiseAdagrad(lr=0.1)), steps=1, batch=3)


def test_deterministic_algorithms_sort_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema([FeatureSpec("C1", 30, 4), FeatureSpec("C2", 5, 4)])
    ours, oracle = pair(schema, None, rse.SGD(lr=0.1))
    monkeypatch.setattr(update.StorageReads, "_accumulate", None)
    torch.use_deterministic_algorithms(True)
    try:
        assert_steps_agree(ours, oracle, steps=1, batch=20)
    finally:
        torch.use_deterministic_algorithms(False)
    ours(ids_of(schema, 20)).sum().backward()  # the first two step when they end, by sorted rows
    with pytest.raises(TypeError):
        ours(ids_of(schema, 20)).sum().backward()


@METHODS
@pytest.mark.parametrize("read", [False, True], ids=["steps alone", "gradients read"])
def test_a_step_at_step_has_the_bits_of_one_in_backward(method: Any, read: bool) -> None:
    schema = Schema([FeatureSpec("C1", 60, 4), FeatureSpec("C2", 200, 4)])
    one, other = (
        EmbeddingCollection(
            schema, plan_of(method, schema), rse.Adam(lr=0.1, weight_decay=0.1), backend="triton", device=DEVICE
        )
        for _ in range(2)
    )
    optimizer = other.make_optimizer()
    torch.use_deterministic_algorithms(True)
    try:
        for step in range(2):
            one(ids_of(schema, 20, step)).square().sum().backward()
            other(ids_of(schema, 20, step)).square().sum().backward()
            if read:
                torch.nn.utils.clip_grad_norm_(other.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.use_deterministic_algorithms(False)
    for name in one.storages:
        assert torch.equal(one.get_parameter(name), other.get_parameter(name))


@METHODS
def test_two_lookups_of_one_backward(method: Any) -> None:
    """One step by the sum of their gradients."""
    schema = Schema([FeatureSpec("C1", 60, 4), FeatureSpec("C2", 200, 4)])
    ours, oracle = pair(schema, plan_of(method, schema), rse.SGD(lr=0.5))
    assert_two_lookups(ours, oracle, [ids_of(schema, 20, 0), ids_of(schema, 20, 1)])


# -- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 10, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_an_id_out_of_range_is_named_and_moves_nothing(bad: int) -> None:
    schema = Schema([FeatureSpec("good", 10, 4), FeatureSpec("bad", 10, 4)])
    coll = EmbeddingCollection(schema, optimizer=rse.SGD(lr=1.0), backend="triton", device=DEVICE)
    before = coll.width4.clone()
    with pytest.raises(IdRangeError, match=rf"\[0, 10\); got {bad} \(feature 'bad'\)"):
        coll(torch.tensor([[0, 0], [9, bad], [3, 3]], device=DEVICE))
    coll(torch.tensor([[0, 0]], device=DEVICE))  # the fault is reported once
    assert torch.equal(coll.width4, before)


def test_a_fault_that_comes_in_late_stops_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a lookup is still running when its call returns."""
    schema = Schema([FeatureSpec("a", 10, 4)])
    coll = EmbeddingCollection(schema, optimizer=rse.SGD(lr=1.0), backend="triton", device=DEVICE)
    lookup = coll.bundle.batched["triton"]._look_up.lookup
    before = coll.width4.clone()
    with monkeypatch.context() as late:
        late.setattr(lookup, "raise_faults", lambda device: None)
        out = coll(torch.tensor([[3], [77]], device=DEVICE))
    assert torch.equal(out[1, 0], torch.zeros(4, device=DEVICE)), "an id without a row gives zeros"
    with pytest.raises(IdRangeError, match="got 77"):
        out.sum().backward()
    assert torch.equal(coll.width4, before)


def test_an_id_out_of_range_reads_no_row_that_its_digits_have(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema([FeatureSpec("a", 1000, 4)])
    plan = Plan.uniform(schema, "compositional", budget=2000, full_below=1, combine="sum")
    coll = EmbeddingCollection(schema, plan, backend="triton", device=DEVICE)
    monkeypatch.setattr(coll.bundle.batched["triton"]._look_up.lookup, "raise_faults", lambda device: None)
    assert not coll(torch.tensor([[1001]], device=DEVICE)).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_layout(dtype: torch.dtype) -> None:
    schema = Schema([FeatureSpec("a", 50, 8), FeatureSpec("b", 70, 8)])
    coll = EmbeddingCollection(schema, backend="triton", device=DEVICE)
    ids = ids_of(schema, 16).to(dtype)
    wanted = EmbeddingCollection(schema, backend="torch", device=DEVICE)(ids)
    assert torch.equal(coll(ids), wanted)
    assert torch.equal(coll(ids.T.contiguous().T), wanted)
    wide = torch.zeros(32, 5, dtype=dtype, device=DEVICE)
    wide[::2, 1:4:2] = ids
    assert torch.equal(coll(wide[::2, 1:4:2]), wanted)
    assert torch.equal(coll(ids[:1].expand(9, 2)), wanted[:1].expand(9, 2, 8))


@pytest.mark.parametrize("policy", ["hash", "oov", "zero"])
@pytest.mark.parametrize("method", ["full", "hash", "compositional"])
def test_unseen_ids(policy: str, method: str) -> None:
    schema = Schema([FeatureSpec("a", 50, 8, unseen=policy), FeatureSpec("b", 70, 8)])
    plan = Plan.full(schema) if method == "full" else Plan.uniform(schema, method, budget="2KiB", full_below=1)
    ours, oracle = pair(schema, plan, rse.SGD(lr=0.1))
    ids = ids_of(schema, 20)
    ids[::3, 0] += 50
    ids[1, 0] = -7
    assert_steps_agree(ours, oracle, steps=2, batch=0, ids=ids)
    assert ours.unseen_counts() == oracle.unseen_counts()


# -- types ------------------------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_add_up_in_thirty_two(method: Any, dtype: torch.dtype) -> None:
    schema = Schema([FeatureSpec("C1", 60, 8), FeatureSpec("C2", 300, 8)])
    ours = EmbeddingCollection(schema, plan_of(method, schema), backend="triton", device=DEVICE, dtype=dtype)
    oracle = EmbeddingCollection(schema, ours.plan, backend="reference", device=DEVICE, dtype=dtype).double()
    ids = ids_of(schema, 20)
    got, wanted = ours(ids), oracle(ids)
    assert got.dtype == dtype
    largest = float(wanted.detach().abs().max())
    if method.name not in ("mixeddim", "optembed", "dnis"):  # a projection is torch's, in 16 bits
        torch.testing.assert_close(got, wanted.to(dtype), rtol=0, atol=torch.finfo(dtype).eps * largest)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).to(dtype)
    got.backward(upstream)
    wanted.backward(upstream.double())
    for p, q in zip(ours.parameters(), oracle.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        scale = float(q.grad.abs().max())
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [1.0, -0.3, 3e-6, 0.0])
def test_small_steps_of_sixteen_bits_count_on_average(dtype: torch.dtype, start: float) -> None:
    schema = Schema([FeatureSpec("C1", 64, 64)])
    coll = EmbeddingCollection(schema, optimizer=rse.SGD(lr=1.0), backend="triton", device=DEVICE, dtype=dtype)
    with torch.no_grad():
        coll.width64.fill_(start)
    first = float(coll.width64[0, 0].detach())
    ulp = max(abs(first) * torch.finfo(dtype).eps, 2.0**-24 if dtype == torch.float16 else 1e-9)
    step = 0.3 * ulp
    out = coll(torch.arange(64, device=DEVICE).unsqueeze(1))
    out.backward(torch.full_like(out, -step, dtype=torch.float64).to(out.dtype))
    given = float(torch.tensor(step, dtype=torch.float64).to(dtype))
    values = coll.width64.detach().double()
    assert len(values.unique()) <= 2, "a step ends on one of the two neighbours"
    assert (values - first).abs().max() <= 1.01 * ulp
    spread = 5 * ulp / 64  # five standard errors of 4096 draws
    assert abs(float(values.mean()) - (first + given)) < spread


def test_what_is_not_finite_stays_so() -> None:
    schema = Schema([FeatureSpec("C1", 3, 4)])
    for dtype in (torch.bfloat16, torch.float16):
        coll = EmbeddingCollection(schema, optimizer=rse.SGD(lr=1.0), backend="triton", device=DEVICE, dtype=dtype)
        with torch.no_grad():
            coll.width4.copy_(torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]] * 3, device=DEVICE))
        out = coll(torch.tensor([[0], [2]], device=DEVICE))
        out.backward(torch.ones_like(out))
        assert torch.equal(coll.width4[0, :2], torch.tensor([torch.inf, -torch.inf], dtype=dtype, device=DEVICE))
        assert bool(coll.width4[0, 2].isnan())
        assert coll.width4[0, 3] == 0.0


# -- life of a collection ---------------------------------------------------------------------------------------------


def test_what_the_kernels_do_not_do_runs_in_torch() -> None:
    schema = Schema([FeatureSpec("a", 50, 8), FeatureSpec("b", 70, 8)])
    coll = EmbeddingCollection(schema, backend="triton", device=DEVICE)
    ids = ids_of(schema, 6)
    out = coll(ids)
    torch.testing.assert_close(coll(ids.T.reshape(-1), torch.arange(13, device=DEVICE)), out)
    torch.testing.assert_close(copy.deepcopy(coll).double()(ids), out.double())
    torch.testing.assert_close(torch.compile(coll, backend="eager", fullgraph=True)(ids), out)


def test_copies_are_independent() -> None:
    schema = Schema([FeatureSpec("a", 50, 8), FeatureSpec("b", 70, 8)])
    plan = Plan.uniform(schema, "adaptive", budget="3KiB", full_below=1)
    coll = EmbeddingCollection(schema, plan, rse.SGD(lr=1.0), backend="triton", device=DEVICE)
    coll.assign_({"b": torch.arange(70, device=DEVICE)})
    ids = ids_of(schema, 16)
    before = coll(ids).detach().clone()
    twins = [copy.deepcopy(coll), pickle.loads(pickle.dumps(coll))]
    coll(ids).sum().backward()
    coll.assign_({"b": torch.arange(70, device=DEVICE).flip(0)})
    del coll
    for twin in twins:
        assert torch.equal(twin(ids), before)
        twin(ids).sum().backward()
        assert not torch.equal(twin(ids), before)


def test_a_checkpoint_of_another_backend_goes_on() -> None:
    schema = Schema([FeatureSpec("a", 50, 8), FeatureSpec("b", 70, 8)])
    rule = rse.Adam(lr=0.1)
    elsewhere, here = (
        EmbeddingCollection(schema, optimizer=rule, backend="torch", device=DEVICE),
        pair(schema, None, rule)[0],
    )
    for step in range(2):
        elsewhere(ids_of(schema, 9, step)).square().sum().backward()
    here.load_state_dict(elsewhere.state_dict())
    here.load_optimizer_state_dict(elsewhere.optimizer_state_dict())
    for coll in (elsewhere, here):
        coll(ids_of(schema, 9, 2)).square().sum().backward()
    torch.testing.assert_close(here.width8, elsewhere.width8)
    torch.testing.assert_close(here.width8_exp_avg, elsewhere.width8_exp_avg)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("method", ["full", "compositional", "robe"])
def test_bags_are_updated_by_the_kernels(method: str, rule: FusedOptimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema([FeatureSpec("C1", 40, 4), FeatureSpec("C2", 300, 4, pooling="mean")])
    plan = Plan.full(schema) if method == "full" else Plan.uniform(schema, method, budget=2000, full_below=1)
    ours, oracle = pair(schema, plan, rule)
    calls: list[str] = []
    whole = rows.update_rows
    monkeypatch.setattr(rows, "update_rows", lambda *given: (calls.append("called"), whole(*given)))
    values, offsets = torch.tensor([3, 3, 39, 0, 3, 7, 299, 7], device=DEVICE), torch.tensor([0, 2, 2, 4, 5, 7, 8])
    for _ in range(3):
        for coll in (ours, oracle):
            coll(values, offsets.to(DEVICE)).square().sum().backward()
    assert len(calls) == 3 * len(ours.storages), "of the collection in float32 alone"
    for name in ours.storages:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(oracle, name), rtol=2e-4, atol=2e-5)


@METHODS
def test_drop_ins_run_them_too(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "runs_on", lambda ids, tables: False)  # the CPU's kernels
    spec = FeatureSpec("embedding", 90, 4)
    need = method.config_cls.sized(spec, 1).footprint(spec).serve
    options = {} if method.name == "full" else {"budget": max(need, 90 * 4 * 2)}
    ours = rse.make_embedding(method.name, 90, 4, device=DEVICE, **options)
    oracle = copy.deepcopy(ours).double()
    ids = torch.randint(0, 90, (13, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got, wanted = ours(ids), oracle(ids)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    got.square().sum().backward()
    wanted.square().sum().backward()
    for p, q in zip(ours.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5)
    # Full tables have torch's own lookup, with all of its options; torch gathers the rows of vectors that are computed.
    if ours.program.row_lookups and not ours.program.generates:
        assert (ours._triton._made is None) == (method.name == "full")
        assert oracle._triton._made is None
    torch.testing.assert_close(copy.deepcopy(ours)(ids), got)


@METHODS
def test_second_derivatives(method: Any) -> None:
    """Those of a gradient penalty, by torch's operations; a loss without curvature would not tell what is missing."""
    schema = Schema([FeatureSpec("C1", 60, 8), FeatureSpec("C2", 90, 8)])
    ours, oracle = pair(schema, plan_of(method, schema), None)
    found = []
    for coll in (ours, oracle):
        tables = list(coll.parameters())
        loss = (coll(ids_of(schema, 20)) ** 3).sum()
        first = torch.autograd.grad(loss, tables, create_graph=True)
        penalty = torch.stack([(g**2).sum() for g in first]).sum()
        found.append(torch.autograd.grad(penalty, tables, allow_unused=True))
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("change", ["half", "columns", "strides", "meta", "state"])
@pytest.mark.parametrize("rule", [None, rse.RowwiseAdagrad(lr=0.1)], ids=["gradients", "step"])
def test_what_was_replaced_since_the_lookup_is_refused(rule: FusedOptimizer | None, change: str) -> None:
    schema = Schema([FeatureSpec("C1", 60, 8)])
    coll = EmbeddingCollection(schema, None, rule, backend="triton", device=DEVICE)
    out, (table,) = coll(ids_of(schema, 20)), coll.parameters()
    if rule is None and change in ("state", "meta"):
        pytest.skip("there is no state; and what is moved to meta is another parameter")
    if change == "state":
        coll.width8_sum = coll.width8_sum[:3].clone()
    elif change == "half":
        table.data = table.data.half()
    elif change == "columns":
        table.data = table.data[:, :3].contiguous()
    elif change == "strides":
        table.data = table.data.t().contiguous().t()
    else:
        coll.to("meta")
    with pytest.raises((ConfigError, RuntimeError)):
        out.sum().backward()
    assert table.grad is None


FEW_BITS = [(q, kind) for q in ("lpt", "alpt") for kind in TRAINED[q]]


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize(("quantization", "kind"), FEW_BITS)
@pytest.mark.parametrize("rule", [rse.SGD(0.1, rows="all"), rse.RowwiseAdagrad(0.1, weight_decay=0.1)])
@pytest.mark.parametrize("width", [16, 9])
def test_rows_of_few_bits_are_those_of_torch(
    width: int, rule: FusedOptimizer, kind: str, quantization: str, rounding: str, path: str
) -> None:
    """Bit for bit, where every row is read once in a batch, so that nothing is summed."""
    schema = Schema([FeatureSpec(f"C{i}", n, width, init="normal:0.05") for i, n in enumerate((40, 300))])
    plan = Plan.uniform(schema, "full", precision=kind, quantization=quantization, rounding=rounding)
    made = [EmbeddingCollection(schema, plan, rule, backend=b, device=DEVICE) for b in ("triton", "torch")]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        ids = torch.stack([torch.randperm(n, generator=generator)[:20] for n in (40, 300)], 1).to(DEVICE)
        weights = torch.randn(20, 2, width, generator=generator).to(DEVICE)
        out = [coll(ids) for coll in made]
        assert torch.equal(*out)
        for vectors in out:
            (vectors * weights).sum().backward()
    for coll in made:
        coll.catch_up_()
    first, second = (p.stored for coll in made for p in coll.parameters())
    same = (first == second).double().mean()
    # Square roots and means differ in their last bit.
    assert float(same) >= (1.0 if type(rule) is rse.SGD else 0.995)


@METHODS
@pytest.mark.parametrize("quantization", ["lpt", "alpt"])
def test_every_method_trains_rows_of_few_bits(method: Any, quantization: str) -> None:
    schema = Schema([FeatureSpec(f"C{i}", n, 16, init="normal:0.05") for i, n in enumerate((200, 50))])
    plan = plan_of(method, schema, 0.6)
    configs = {}
    for name in plan:
        config = plan[name]
        if config.computes:
            pytest.skip("its rows are computed")
        values = {k: v for k, v in config.to_dict().items() if k != "method"}
        configs[name] = type(config).from_params({**values, **few_bits(type(config), quantization)})
    plan = Plan(configs, arrays=plan.arrays)
    ids = ids_of(schema, 20)
    made = [EmbeddingCollection(schema, plan, rse.SGD(0.1), backend=b, device=DEVICE) for b in ("triton", "torch")]
    out = [coll(ids) for coll in made]
    torch.testing.assert_close(*out)
    for vectors in out:
        (vectors * torch.linspace(-1, 1, vectors.numel(), device=DEVICE).view_as(vectors)).sum().backward()
    for first, second in zip(*(coll.parameters() for coll in made), strict=True):
        if hasattr(first, "stored"):
            assert int((first.stored != second.stored).sum()) <= 0.01 * first.stored.numel() + 2
