"""Rows that train in few bits: every method, bits of both backends, state dicts, copies, modes of stepping, exports."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import Adam, EmbeddingCollection, FeatureSpec, Plan, RowwiseAdagrad, Schema
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.row_format import TRAINED, Quantization, RowFormat
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.kernels.native import library as native_library
from recsys_embed.optim import SGD, FusedOptimizer, fused_optimizer, list_rules, make_rule
from recsys_embed.registry import get_method, list_methods
from tests.kernels.cases import METHODS, plan_of

NATIVE = not isinstance(native_library.library(), str)
BACKENDS = [*(["native"] if NATIVE else []), "torch"]
SIZES = (1000, 300)
WAYS = [q for q in get_args(Quantization) if q != "ptq"]
PAIRS = [(q, kind) for q in WAYS for kind in TRAINED[q]]
EVERY_WAY = pytest.mark.parametrize("quantization", WAYS)


def schema_of(width: int = 16) -> Schema:
    return Schema([FeatureSpec(f"C{i}", n, width, init="normal:0.05") for i, n in enumerate(SIZES)])


def collection(
    rule: FusedOptimizer | None = None, backend: str = "auto", width: int = 16, method: str = "full", **options: Any
) -> EmbeddingCollection:
    schema = schema_of(width)
    options = {"precision": "int8", "quantization": "lpt", **options}
    return EmbeddingCollection(schema, Plan.uniform(schema, method, **options), rule, backend=backend)


def few_bits(config: type[MethodConfig], quantization: str = "lpt") -> dict[str, Any]:
    """Options of rows that train in few bits, by the class of a configuration."""
    if config.has_own_precisions:
        return {"precisions": ("int8", "int4", TRAINED[quantization][-1]), "quantization": quantization}
    return {"precision": "int8", "quantization": quantization}


def batch(number: int, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.stack([torch.randint(n, (64,), generator=generator) for n in SIZES], 1)
    return ids, torch.randn(64, 2, width, generator=generator)


def train(coll: EmbeddingCollection, steps: int = 3, width: int = 16, first: int = 0) -> EmbeddingCollection:
    for number in range(first, first + steps):
        ids, weights = batch(number, width)
        (coll(ids) * weights).sum().backward()
    return coll


def stored(coll: torch.nn.Module) -> list[Tensor]:
    return [p.stored.clone() for p in coll.parameters() if isinstance(p, LowPrecisionTable)]


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
@pytest.mark.parametrize(("quantization", "kind"), PAIRS)
@pytest.mark.parametrize("width", [8, 16, 27, 4, 5, 3])
@pytest.mark.parametrize(
    "rule",
    [SGD(0.1), RowwiseAdagrad(0.05), SGD(0.1, weight_decay=0.01, rows="all"), RowwiseAdagrad(0.05, weight_decay=0.01)],
    ids=["sgd", "rowwise", "sgd-all", "rowwise-decay"],
)
def test_bits_do_not_depend_on_backend_or_threads(
    quantization: str, kind: str, width: int, rule: FusedOptimizer
) -> None:
    if quantization != "lpt" and width < 8:
        assert RowFormat.of(kind, width, 1.0, quantization=quantization).quantization == "lpt"
        return
    options = {"precision": kind, "quantization": quantization}
    coll = [train(collection(rule, b, width, **options), width=width) for b in ("native", "torch")]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        coll.append(train(collection(rule, "native", width, **options), width=width))
    finally:
        torch.set_num_threads(before)
    for other in coll[1:]:
        coll[0].catch_up_(), other.catch_up_()
        assert all(torch.equal(a, b) for a, b in zip(stored(coll[0]), stored(other), strict=True))
    assert not torch.equal(stored(coll[0])[0], stored(collection(rule, "native", width, **options))[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_that_of_the_decoded_rows_rounded_to_a_neighbour(backend: str) -> None:
    coll = collection(SGD(0.1), backend)
    (name,) = coll.storages
    table = getattr(coll, name)
    before, step = table.to_dense().double(), table.format.step
    ids, weights = batch(0)
    out = coll(ids)
    places = ids + torch.tensor([0, SIZES[0]])
    assert torch.equal(out.double(), before[places])
    (out * weights).sum().backward()
    exact = before.index_add(0, places.flatten(), weights.flatten(0, 1).double(), alpha=-0.1)
    moved = table.to_dense().double() - exact
    inside = exact.abs() < 120 * step
    assert float(moved[inside].abs().max()) < step * (1 + 1e-5)
    # Unbiased: five standard errors of a mean of numbers within one step.
    touched = (exact != before) & inside
    assert abs(float(moved[touched].mean())) < 5 * step / (2 * int(touched.sum()) ** 0.5)


def test_updates_far_below_a_step_move_rows_in_the_mean_and_not_at_all_by_nearest() -> None:
    means = {}
    for rounding in ("stochastic", "nearest"):
        coll = collection(SGD(1.0), rounding=rounding, quantization_step=2.0**-6)
        table = getattr(coll, coll.storages[0])
        with torch.no_grad():
            table.fill_(0.0)
        ids = torch.arange(300).unsqueeze(1).expand(300, 2)
        for _ in range(20):
            coll(ids).backward(torch.full((300, 2, 16), 2.0**-6 / 100))
        means[rounding] = float(table.read(torch.arange(300)).mean()) / 2.0**-6
    assert means["nearest"] == 0
    assert means["stochastic"] == pytest.approx(-0.2, abs=0.03)


@EVERY_WAY
@METHODS
def test_every_method_trains_resumes_and_exports_its_codes(method: Any, quantization: str, tmp_path: Path) -> None:
    schema = schema_of()
    plan = plan_of(method, schema, 0.6)
    configs = {}
    for name in plan:
        config = plan[name]
        if config.computes:
            pytest.skip("its rows are computed")
        values = {k: v for k, v in config.to_dict().items() if k != "method"}
        configs[name] = type(config).from_params({**values, **few_bits(type(config), quantization)})
    plan = Plan(configs, arrays=plan.arrays)
    built = [EmbeddingCollection(schema, plan, RowwiseAdagrad(0.05), backend=b) for b in BACKENDS]
    ids, _ = batch(0)
    assert stored(built[0])
    for coll in built:
        out = coll(ids)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        loss.backward()
    # Products of rows and slices of a GPU's order aside, bits agree; here all are sums in one order.
    first, last = (stored(c) for c in (built[0], built[-1]))
    differ = sum(int((a != b).sum()) for a, b in zip(first, last, strict=True))
    # Where a step is rounded to its other neighbour, all codes of its row are others.
    share = {"lpt": 0.001, "alpt": 0.005, "lsq": 1.0}[quantization]
    assert differ <= share * sum(a.numel() for a in first) + 2
    report = built[0].footprint()
    tables = sum(t.rows * t.training.row_bytes(t.width) for t in built[0].tables.values() if t.training)
    assert tables == sum(s.nbytes for s in first)
    assert report.train == plan.footprint(schema).train + report.optimizer + report.gradient
    again = EmbeddingCollection(schema, plan, RowwiseAdagrad(0.05), seed=1, backend=BACKENDS[0])
    again.load_state_dict(built[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(stored(again), first, strict=True))
    again.eval(), built[0].eval()
    assert torch.equal(again(ids), built[0](ids))
    # The next step is the same, of a run that goes on and of one that is resumed.
    resumed = EmbeddingCollection(schema, plan, RowwiseAdagrad(0.05), backend=BACKENDS[0])
    resumed.load_state_dict(built[0].state_dict())
    whole = copy.deepcopy(built[0]).train()
    for coll in (resumed, whole):
        coll(ids).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(stored(resumed), stored(whole), strict=True))
    file = rse.export(built[0].eval(), tmp_path / "m.rse")
    # What heads multiply by is served in fp16. Sums of `lsq`, which torch reads, have another order than the kernels'.
    near = 2e-3 if any(t.dense for t in built[0].tables.values()) else 1e-6 * (quantization == "lsq")
    torch.testing.assert_close(rse.load(tmp_path / "m.rse")(ids), built[0](ids), rtol=near, atol=near, msg=str(file))


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
@pytest.mark.parametrize(("quantization", "kind"), PAIRS)
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_read_and_stepped_alike(quantization: str, kind: str, weighted: bool) -> None:
    made = [collection(SGD(0.1), b, 16, precision=kind, quantization=quantization) for b in ("native", "torch")]
    lengths = torch.tensor([3, 0, 1, 4, 2, 2])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(300, (int(offsets[-1]),))
    weights = torch.tensor([0.5, 2.0]).repeat(6) if weighted else None
    out = [coll(ids, offsets, weights) for coll in made]
    torch.testing.assert_close(*out)
    for vectors in out:
        (vectors * torch.arange(32.0).view(2, 16)).sum().backward()
    assert torch.equal(*(stored(coll)[0] for coll in made))


@EVERY_WAY
def test_state_dicts_hold_stored_rows_and_runs_resume_bit_for_bit(quantization: str) -> None:
    whole = train(collection(RowwiseAdagrad(0.05), quantization=quantization), 6)
    half = train(collection(RowwiseAdagrad(0.05), quantization=quantization), 3)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved[half.storages[0]].dtype is (torch.float32 if quantization == "lsq" else torch.uint8)
    resumed = collection(RowwiseAdagrad(0.05), quantization=quantization)
    resumed.load_state_dict(saved)
    train(resumed, 3, first=3)
    assert torch.equal(stored(resumed)[0], stored(whole)[0])


@EVERY_WAY
def test_copies_conversions_and_pickles_keep_the_stored_rows(quantization: str) -> None:
    coll = train(collection(RowwiseAdagrad(0.05), quantization=quantization))
    before = stored(coll)[0]
    file = io.BytesIO()
    torch.save(coll, file)
    file.seek(0)
    for other in (copy.deepcopy(coll), torch.load(file, weights_only=False), copy.deepcopy(coll).half()):
        assert torch.equal(stored(other)[0], before)
        train(other)
        assert not torch.equal(stored(other)[0], before)
    assert torch.equal(stored(coll)[0], before)
    meta = collection(RowwiseAdagrad(0.05), quantization=quantization).to("meta")
    assert next(meta.parameters()).device.type == "meta"
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(coll.state_dict())
    assert torch.equal(stored(empty)[0], before)


@EVERY_WAY
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_torch_optimizer_of_fused_tables_steps_as_backward_does(backend: str, quantization: str) -> None:
    in_backward = train(collection(RowwiseAdagrad(0.05), backend, quantization=quantization))
    coll = collection(RowwiseAdagrad(0.05), backend, quantization=quantization)
    optimizer = fused_optimizer(coll)
    for number in range(3):
        ids, weights = batch(number)
        # Accumulated over two halves of the batch.
        for half in (slice(0, 32), slice(32, 64)):
            (coll(ids[half]) * weights[half]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    rtol = 1e-5 * (quantization == "lsq")  # gradients of a row are summed in another order
    torch.testing.assert_close(stored(coll)[0], stored(in_backward)[0], rtol=rtol, atol=rtol)


def test_footprints_are_the_bytes_that_are_allocated() -> None:
    full = collection(RowwiseAdagrad(0.05), quantization="ptq", precision="fp32").footprint()
    int8, int4 = (collection(RowwiseAdagrad(0.05), precision=p) for p in ("int8", "int4"))
    rows = sum(SIZES)
    assert full.train == rows * (64 + 4)
    assert int8.footprint().train == rows * (16 + 4)
    assert int4.footprint().train == rows * (8 + 4)
    held = sum(p.nbytes for p in int4.parameters()) + sum(b.nbytes for b in int4.buffers() if b.dtype is torch.float32)
    assert held == rows * (8 + 4)
    assert int8.plan.footprint(int8.schema).train == rows * 16
    for quantization, of_a_row in (("alpt", 4 + 16), ("lsq", 4 * (16 + 1))):
        coll = collection(RowwiseAdagrad(0.05), quantization=quantization)
        assert coll.footprint().train == rows * (of_a_row + 4)
        assert sum(p.nbytes for p in coll.parameters()) == rows * of_a_row
        assert coll.plan.footprint(coll.schema).serve == rows * 20


@EVERY_WAY
@pytest.mark.parametrize("method", [m.name for m in list_methods() if m.config_cls.plannable])
def test_drop_ins_train_by_torch_optimizers(method: str, quantization: str) -> None:
    cls = get_method(method).embedding_cls
    options = {"init": "normal:0.05", **few_bits(get_method(method).config_cls, quantization)}
    if get_method(method).config_cls.sized(FeatureSpec("x", 500, 16), 8).computes:
        with pytest.raises(ConfigError, match="computed"):
            cls(500, 16, budget=60_000, **options)
        return
    emb = cls(500, 16, budget=60_000, **options)
    plain = cls(500, 16, config=emb.config.rounded_at_export(), init=options["init"])
    with torch.no_grad():
        for own, other in zip(plain.parameters(), emb.parameters(), strict=True):
            own.copy_(other.to_dense() if isinstance(other, LowPrecisionTable) else other)
    ids, target = torch.arange(500), torch.randn(500, emb.output_dim) * 0.1
    ends = []
    for module in (emb, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (module(ids) - target).square().sum() / 2
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        ends.append(losses[-1])
    assert ends[0] < losses[0]
    # Float32 from the same weights gets no further than the rounding of what is read allows.
    assert ends[0] <= 1.05 * ends[1] + 0.05 * losses[0], ends
    assert any(isinstance(p, LowPrecisionTable) for p in emb.parameters())


def test_what_is_not_supported_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="`quantization='lpt'` stores rows at `precision`"):
        collection(precision="fp32")
    with pytest.raises(ConfigError, match="one of int8, int4, fp16, bf16; got 'fp8'"):
        collection(precision="fp8")
    coll = collection(Adam(0.01))
    with pytest.raises(ConfigError, match="views of its rows alone"):
        coll.table("C0.weight").view(-1)
    with pytest.raises(ConfigError, match=r"alpt'` stores rows at `precision`.* one of int8, int4; got 'bf16'"):
        collection(precision="bf16", quantization="alpt")
    with pytest.raises(ConfigError, match=r"lsq'` rounds rows at `precision`.*, int2; got 'fp16'"):
        collection(precision="fp16", quantization="lsq")
    with pytest.raises(ConfigError, match="are stored as"):
        LowPrecisionTable(torch.zeros(3, 4), RowFormat("int8", 0.5), 4, 0)


@pytest.mark.crossed
@EVERY_WAY
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_precision", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("name", list_rules())
def test_every_rule_steps_them_whatever_its_state_takes(
    name: str, state_precision: Any, backend: str, quantization: str
) -> None:
    rule = make_rule(name, lr=0.05, state_precision=state_precision)
    for kind in TRAINED[quantization]:
        coll = collection(rule, backend, precision=kind, quantization=quantization)
        plain = EmbeddingCollection(coll.schema, Plan.full(coll.schema), make_rule(name, lr=0.05), backend="torch")
        (table,), (weights,) = coll.parameters(), plain.parameters()
        before = table.all_unrounded()
        with torch.no_grad():
            weights.copy_(before)
        codes = before / table.distances()
        reach = 2 ** ((table.format.bits or 1) - 1)
        inside = (codes >= -reach) & (codes <= reach - 1) | (quantization != "lsq")
        train(coll, 1), train(plain, 1)
        right = torch.where(inside, weights.detach(), before)
        got, steps = table.all_unrounded(), table.distances()
        if quantization == "lsq":
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
            continue
        if table.format.bits:
            half = 2 ** (table.format.bits - 1)  # values beyond the last code stay there
            right = torch.minimum(torch.maximum(right, -half * steps), (half - 1) * steps)
        # Within one code, or one number of 16 bits, of the step in float32.
        apart = steps if table.format.bits else right.abs() * 2.0 ** (-7 if kind == "bf16" else -10) + 1e-7
        assert bool(((got - right).abs() <= apart * 1.01 + 1e-6).all()), kind
        assert float((got - right).mean().abs()) < 2e-4 + 0.01 * float(steps.mean()), kind


@EVERY_WAY
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # where a graph breaks
def test_compiled_models_leave_them_to_python(quantization: str) -> None:
    made = [collection(RowwiseAdagrad(0.05), quantization=quantization) for _ in range(2)]

    def loss(coll: EmbeddingCollection, ids: Tensor, weights: Tensor) -> Tensor:
        return (coll(ids) * weights).sum() + coll.lookup("C0", ids[:, 0]).sum()

    compiled = torch.compile(loss, backend="eager")
    for number in range(2):
        compiled(made[0], *batch(number)).backward()
        loss(made[1], *batch(number)).backward()
    ids, _ = batch(0)
    assert torch.equal(*(stored(coll)[0] for coll in made))
    with pytest.raises(Exception, match=r"export\(\) and load\(\) the model"):
        torch.export.export(made[0].eval(), (ids,))


def test_an_export_tells_of_rows_that_training_clipped(tmp_path: Path) -> None:
    emb = rse.make_embedding("full", 100, 16, precision="int8", quantization="lpt", quantization_step=2.0**-10)
    with torch.no_grad():
        emb.weight.copy_(torch.linspace(-0.1, 0.1, 1600).view(100, 16))
    assert rse.export(emb, tmp_path / "e").notes == ()
    with torch.no_grad():
        emb.weight.copy_(torch.linspace(-0.25, 0.25, 1600).view(100, 16))  # codes end at 0.125
    (note,) = rse.export(emb, tmp_path / "e").notes
    assert note.startswith("50% of the numbers of table 'weight' stand at the outermost codes")
    assert "`quantization_step`" in note
