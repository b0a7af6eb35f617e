"""The memory report against what is really allocated, saved and kept: every method, drop-in, collection and plan."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.collection.optimizer_state import weights_of
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.optim import RowGradient, unfused_parameters
from recsys_embed.registry import MethodInfo
from recsys_embed.report.memory import memory_report

METHODS = rse.list_methods()
NAMES = [m.name for m in METHODS]
SHAPES = [(60, 8), (1000, 16), (20_000, 4), (3001, 24)]
FUSED = [rse.SGD(lr=0.1), rse.Adagrad(lr=0.1), rse.RowwiseAdagrad(lr=0.1), rse.Adam(lr=0.1)]
TORCH: list[Any] = [
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Adafactor,
]


def options(info: MethodInfo) -> list[dict[str, Any]]:
    """No options, every variant that keeps sets of ids as arrays, and one with networks beside its tables."""
    found: list[dict[str, Any]] = [{}]
    if info.name == "compositional":
        found.append({"combine": "path", "hidden": 4})
    if info.config_cls.order_option:
        found.append({"order": "counts"})
    return found


VARIANTS = [(m, o) for m in METHODS for o in options(m)]
IDS = [f"{m.name}-{'-'.join(map(str, o.values()))}".rstrip("-") for m, o in VARIANTS]


def make(info: MethodInfo, rows: int, width: int, **more: Any) -> nn.Module:
    """A drop-in at half its bytes, or the least that it needs."""
    if info.name == "full":
        return info.embedding_cls(rows, width, **more)
    params = {k: v for k, v in more.items() if k in info.config_cls.__dataclass_fields__}
    spec = FeatureSpec("embedding", rows, width)
    least = info.config_cls.sized(spec, 1, **params).footprint(spec).serve
    return info.embedding_cls(rows, width, budget=max(rows * width * 2, least), **more)


def small_schema() -> Schema:
    return Schema([FeatureSpec("a", 700, 8), FeatureSpec("b", 40, 8), FeatureSpec("c", 2500, 8, pooling="mean")])


def plan_of(info: MethodInfo, schema: Schema, **more: Any) -> Plan:
    if info.name == "full":
        return Plan.full(schema)
    plain = sum(4 * f.num_embeddings * f.embedding_dim for f in schema)
    return Plan.uniform(schema, info.name, budget=plain // 2, **more)


def state_bytes(module: nn.Module) -> int:
    """Bytes of the tensors of a state dict, shared ones once, but for the configuration stored with them."""
    state = weights_of(module)
    return sum(t.nbytes for k, t in state.items() if not k.endswith("_extra_state"))


def held_bytes(footprint: rse.Footprint) -> int:
    """Bytes of rows and arrays before an export rounds the rows."""
    return footprint.serve + footprint.unrounded


def allocated(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.crossed
@pytest.mark.parametrize(("info", "more"), VARIANTS, ids=IDS)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_in_reports_what_is_allocated_and_saved(
    info: MethodInfo, more: dict[str, Any], rows: int, width: int, dtype: torch.dtype
) -> None:
    module = make(info, rows, width, dtype=dtype, **more)
    report = memory_report(module)
    held = held_bytes(report.footprint)
    assert held == state_bytes(module)
    assert held_bytes(module.footprint()) == held
    assert report.total("serve") == report.footprint.serve == module.footprint().serve
    parameters, index = allocated(module.parameters()), allocated(module.kernel.index.arrays.held.values())
    # Constants of a lookup, some hundred bytes that no file holds, are not counted.
    assert report.footprint.weights + report.footprint.unrounded == parameters
    assert held == parameters + index
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    assert held <= file.tell() < 1.01 * held + 6000


@pytest.mark.parametrize(("info", "more"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("optimizer", [None, *FUSED], ids=lambda o: type(o).__name__)
def test_collection_reports_what_is_allocated(info: MethodInfo, more: dict[str, Any], optimizer: Any) -> None:
    schema = small_schema()
    plan = plan_of(info, schema, **more)
    module = rse.EmbeddingCollection(schema, plan, optimizer)
    report = memory_report(module)
    assert held_bytes(report.footprint) == state_bytes(module)
    assert report.total("serve") == module.footprint().serve
    state = [getattr(module, f"{name}_{key}") for name, key in module._states()]
    assert report.footprint.optimizer == allocated(state)
    assert report.footprint == module.footprint()
    index = [a for m in module.modules() if isinstance(m, IndexStore) for a in m.arrays.held.values()]
    everything = allocated([*module.parameters(), *module.buffers(), *index])
    held = held_bytes(report.footprint) + report.footprint.optimizer
    assert held <= everything <= 1.01 * held + 4096
    # A plan says the same before anything is built.
    planned = memory_report(plan, schema=schema, optimizer=optimizer)
    assert planned.footprint == report.footprint
    for table in report.tables:
        assert planned[table.name].footprint == table.footprint


@pytest.mark.crossed(2)
@pytest.mark.parametrize(("info", "more"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_gradients_are_those_of_a_backward(info: MethodInfo, more: dict[str, Any], sparse: bool, native: bool) -> None:
    module = make(info, 900, 8, sparse=sparse, **more)
    if not native:
        module._native = None
    ids = torch.randint(0, 900, (64, 3))
    module(ids).sum().backward()
    found = sum(_grad_bytes(p.grad) for p in module.parameters() if p.grad is not None)
    said = memory_report(module, batch_size=64, ids_per_sample=3).footprint.gradient
    absent = any(t.may_be_absent for p in module.program.row_lookups for t in p.transforms)
    if sparse and (module.config.computes or native or absent or module.program.generates):
        # Networks and tables of a computed lookup have at most one dense gradient each; native kernels add up what
        # a row gets; ids without a row have no gradient.
        assert said >= found
    else:
        assert said == found


@pytest.mark.crossed(2)
@pytest.mark.parametrize("info", METHODS, ids=NAMES)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_gradients_of_a_collection(info: MethodInfo, sparse: bool, backend: str) -> None:
    schema = small_schema()
    module = rse.EmbeddingCollection(schema, plan_of(info, schema), sparse=sparse, backend=backend)
    module(torch.randint(0, 40, (128, 3))).sum().backward()
    found = sum(_grad_bytes(p.grad) for p in module.parameters() if p.grad is not None)
    said = memory_report(module, batch_size=128).footprint.gradient
    # The native kernels add up what a row gets, and rows are computed once per distinct id, so a sparse gradient holds
    # them once; what is reported is the peak.
    once = backend == "native" or any(program.generates for program in module.bundle.programs.values())
    assert found <= said if sparse and once else found == said


def _grad_bytes(grad: Tensor) -> int:
    if not grad.is_sparse:
        return grad.nbytes
    return grad._indices().nbytes + grad._values().nbytes


def test_optimizer_state_in_a_file_is_no_weight(tmp_path: Path) -> None:
    schema = small_schema()
    module = rse.EmbeddingCollection(schema, Plan.full(schema), rse.Adam(lr=0.1))
    torch.save(module.state_dict(), tmp_path / "model.pt")
    report = memory_report(tmp_path / "model.pt")
    assert report.total("serve") == state_bytes(module)
    assert not [n for n in report.notes if "bytes of weights" in n]
    assert report.rest.weights == 0


def test_fused_tables_have_no_gradient() -> None:
    schema = small_schema()
    module = rse.EmbeddingCollection(schema, Plan.full(schema), rse.Adam(lr=0.1))
    module(torch.randint(0, 40, (16, 3))).sum().backward()
    assert all(p.grad is None for p in module.parameters())
    assert memory_report(module, batch_size=16).footprint.gradient == 0
    # At step() the gradients of the rows read are kept until then; all rows of the batch may differ.
    module.make_optimizer()
    ids = torch.stack([torch.randperm(40)[:16] for _ in range(3)], 1)
    module(ids).sum().backward()
    grads = [cast("RowGradient", p.grad) for p in module.parameters()]
    held = sum(g.rows.nbytes + g.values.nbytes for g in grads)
    assert memory_report(module, batch_size=16).footprint.gradient == held > 0


@pytest.mark.parametrize("cls", TORCH, ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_what_torch_keeps(cls: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 8), nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 1)).to(dtype)
    optimizer = cls(model.parameters(), lr=0.1)
    model(torch.randint(0, 300, (5, 2))).sum().backward()
    optimizer.step()
    kept = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    for asked in (cls, optimizer):
        report = memory_report(model, optimizer=asked)
        assert report.footprint.optimizer + report.rest.optimizer == kept
        assert report.footprint.gradient + report.rest.gradient == sum(p.grad.nbytes for p in model.parameters())


def test_options_of_an_optimizer_count() -> None:
    model = nn.Embedding(100, 8)
    for options, copies in (({"amsgrad": True}, 3), ({"amsgrad": False}, 2)):
        optimizer = torch.optim.Adam(model.parameters(), **options)
        assert memory_report(model, optimizer=optimizer).footprint.optimizer == copies * 3200 + 4
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert memory_report(model, optimizer=momentum).footprint.optimizer == 3200


def test_sparse_adam_and_adam_over_sparse_gradients() -> None:
    model = nn.Embedding(100, 8, sparse=True)
    model(torch.tensor([1, 1, 2])).sum().backward()
    optimizer = torch.optim.SparseAdam(model.parameters())
    optimizer.step()
    (state,) = optimizer.state.values()
    kept = sum(v.nbytes for v in state.values() if isinstance(v, Tensor))
    for asked in ("sparse_adam", "adam"):
        assert memory_report(model, optimizer=asked).footprint.optimizer == kept


@pytest.mark.parametrize("info", METHODS, ids=NAMES)
def test_torch_optimizer_over_a_collection(info: MethodInfo) -> None:
    schema = small_schema()
    module = rse.EmbeddingCollection(schema, plan_of(info, schema))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randint(0, 40, (8, 3))).sum().backward()
    optimizer.step()
    kept = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    assert memory_report(module, optimizer="adam").footprint.optimizer == kept


def test_parts_of_an_optimizer_count_where_it_holds_them() -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 1))
    report = memory_report(model, optimizer=torch.optim.Adam(model[1].parameters()))
    assert report.footprint.optimizer == 0
    assert report.rest.optimizer == 2 * 9 * 4 + 2 * 4


@pytest.mark.parametrize("info", METHODS, ids=NAMES)
def test_model_of_this_library(info: MethodInfo) -> None:
    from recsys_embed.models import build_model

    schema = small_schema()
    model = build_model("deepfm", schema, plan_of(info, schema), num_dense=2, optimizer=rse.RowwiseAdagrad(lr=0.1))
    report = memory_report(model, optimizer="adam")
    assert report.footprint.serve == model.footprint().serve
    assert report.total("serve", "model") + report.footprint.unrounded == state_bytes(model)
    fused = sum(getattr(c, f"{n}_{k}").nbytes for c in model.collections().values() for n, k in c._states())
    projections = [p for c in model.collections().values() for p in unfused_parameters(c)]
    # The dense optimizer keeps two copies and a step counter of each projection.
    assert report.footprint.optimizer == fused + sum(2 * p.nbytes + 4 for p in projections)


@pytest.mark.parametrize("unseen", ["hash", "oov", "zero", "raise"])
@pytest.mark.parametrize("info", METHODS, ids=NAMES)
def test_rows_for_ids_never_seen_are_counted(info: MethodInfo, unseen: Any) -> None:
    schema = Schema([FeatureSpec("a", 700, 8, unseen=unseen), FeatureSpec("b", 50, 8, unseen=unseen)])
    plan = plan_of(info, schema)
    module = rse.EmbeddingCollection(schema, plan)
    for report in (memory_report(module), memory_report(plan, schema=schema)):
        assert held_bytes(report.footprint) == state_bytes(module)
        assert report.total("serve") == plan.footprint(schema).serve


@pytest.mark.parametrize(("info", "more"), VARIANTS, ids=IDS)
def test_serving_precisions_follow_the_layout(info: MethodInfo, more: dict[str, Any]) -> None:
    from recsys_embed.core.precision import matrix_bytes, table_bytes

    module = make(info, 5000, 16, **more)
    tables = {t.name: t for t in module.program.tables}
    rest = sum(p.numel() for n, p in module.named_parameters() if n not in tables)
    index = sum(i.nbytes for i in module.program.indexes)
    for precision in ("fp16", "bf16", "int8", "int4"):
        expected = index + matrix_bytes(rest, precision)
        for t in tables.values():
            dense = matrix_bytes(t.rows * t.width, precision)
            expected += dense if t.dense else table_bytes(t.rows, t.width, precision)
        report = memory_report(module, precision=precision)
        assert report.total("serve") == expected
        assert report.total("train") == memory_report(module).total("train")
        assert report.stored(precision) == expected
