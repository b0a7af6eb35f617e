"""Between a lookup and its backward everything may change: backward gives torch's numbers, or refuses.

The kernels write to memory whose type, size and place they take for what it was; ``make sanitize`` runs these too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import Adam, EmbeddingCollection, FeatureSpec, Plan, RowwiseAdagrad, Schema
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.native.lookup import runs_on
from tests.kernels.cases import METHODS

ROWS, WIDTH, BATCH = 400, 8, 300
SCHEMA = Schema([FeatureSpec("a", ROWS, WIDTH)])
Change = Callable[[nn.Module, dict[str, Tensor]], Any]


def read_by_kernels(module: nn.Module) -> list[nn.Parameter]:
    """The tables, without those of a head, which torch itself multiplies by."""
    program: Any = getattr(module, "program", None)
    heads = () if program is None or program.head is None else program.head.tables
    return [p for name, p in module.named_parameters() if name not in heads]


def _table(fn: Callable[[Tensor], Tensor]) -> Change:
    def change(module: nn.Module, read: dict[str, Tensor]) -> None:
        for p in read_by_kernels(module):
            p.data = fn(p.data)

    return change


def _read(name: str, fn: Callable[[Tensor], Tensor]) -> Change:
    def change(module: nn.Module, read: dict[str, Tensor]) -> None:
        if name in read:
            read[name].data = fn(read[name].data)

    return change


def _no_memory(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


CHANGES: dict[str, Change] = {
    "half": lambda m, _: m.half(),
    "bfloat16": lambda m, _: m.bfloat16(),
    "double": lambda m, _: m.double(),
    "meta": lambda m, _: m.to("meta"),
    "data half": _table(Tensor.half),
    "data fewer rows": _table(lambda d: d[:2].clone()),
    "data fewer columns": _table(lambda d: d[:, :1].clone()),
    "data of other strides": _table(lambda d: d.t().contiguous().t()),
    "data copied": _table(Tensor.clone),
    "memory of tables gone": _table(_no_memory),
    "ids fewer": _read("input", lambda d: d[:3].clone()),
    "ids int32": _read("input", Tensor.int),
    "ids float": _read("input", Tensor.float),
    "ids on meta": _read("input", lambda d: d.to("meta")),
    "memory of ids gone": _read("input", _no_memory),
    "offsets fewer": _read("offsets", lambda d: d[:2].clone()),
    "offsets beyond": _read("offsets", lambda d: d * 1000),
    "offsets int32": _read("offsets", Tensor.int),
}
EVERY_CHANGE = pytest.mark.parametrize("change", CHANGES, ids=lambda name: name.replace(" ", "_"))


def bags() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input": torch.randint(0, ROWS, (BATCH,), generator=generator),
        "offsets": torch.arange(0, BATCH + 1, 3),
    }


def plain_ids() -> dict[str, Tensor]:
    return {"input": torch.randint(0, ROWS, (BATCH,), generator=torch.Generator().manual_seed(1))}


def backward_after(module: nn.Module, read: dict[str, Tensor], change: Change) -> None:
    out = module(*read.values())
    change(module, read)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()


def assert_gradients_or_error(module: nn.Module, oracle: nn.Module, read: dict[str, Tensor], change: Change) -> None:
    assert runs_on(read["input"], list(module.parameters())), "the kernels run"
    backward_after(oracle, {k: t.clone() for k, t in read.items()}, lambda *_: None)
    shapes = [p.shape for p in module.parameters()]
    try:
        backward_after(module, read, change)
    except (ConfigError, RuntimeError):
        assert all(p.grad is None for p in read_by_kernels(module)), "nothing has changed"
        return
    for p, q, shape in zip(module.parameters(), oracle.parameters(), shapes, strict=True):
        if p.is_meta or p.grad is None or p.grad.is_meta or q.grad is None:
            continue
        assert p.grad.shape == shape
        torch.testing.assert_close(p.grad.to_dense().double(), q.grad.to_dense().double(), rtol=1e-2, atol=1e-2)


@pytest.mark.crossed
@EVERY_CHANGE
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@METHODS
def test_drop_ins(method: Any, sparse: bool, change: str) -> None:
    if method.name == "full":
        pytest.skip("torch's own gather")
    spec = FeatureSpec("a", ROWS, WIDTH)
    budget = max(method.config_cls.sized(spec, 1).footprint(spec).serve, ROWS * WIDTH)
    made = [rse.make_embedding(method.name, ROWS, WIDTH, budget=budget, sparse=sparse, seed=0) for _ in range(2)]
    assert_gradients_or_error(made[0], made[1].double(), plain_ids(), CHANGES[change])


@EVERY_CHANGE
@pytest.mark.parametrize("given", [plain_ids, bags], ids=["ids", "bags"])
def test_collections(given: Callable[[], dict[str, Tensor]], change: str) -> None:
    read = given()
    if len(read) == 1:
        read["input"] = read["input"].unsqueeze(1)
    made = [EmbeddingCollection(SCHEMA, backend=backend) for backend in ("native", "torch")]
    assert_gradients_or_error(made[0], made[1], read, CHANGES[change])


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "fewer rows": lambda b: b[:10].clone(),
    "half": Tensor.half,
    "double": Tensor.double,
    "meta": lambda b: b.to("meta"),
    "other strides": lambda b: b.repeat_interleave(2, 1)[:, ::2],
    "no memory": lambda b: _no_memory(b.clone()),
}


@pytest.mark.parametrize(
    "rule", [RowwiseAdagrad(lr=0.1), Adam(lr=0.1, weight_decay=0.1, rows="all")], ids=["rowwise", "adam"]
)
@pytest.mark.parametrize("at_step", [False, True], ids=["in_backward", "at_step"])
@pytest.mark.parametrize("change", [*CHANGES, *STATES], ids=lambda name: name.replace(" ", "_"))
def test_steps(rule: Any, at_step: bool, change: str) -> None:
    """A step is torch's, or is refused before tables, state and the number of steps have changed."""
    made = []
    for backend in ("native", "torch"):
        coll = EmbeddingCollection(SCHEMA, Plan.full(SCHEMA), rule, backend=backend)
        made.append((coll, coll.make_optimizer() if at_step else None))
    ids, (coll, optimizer) = plain_ids()["input"].unsqueeze(1), made[0]
    states = [name for name, _ in coll.named_buffers(recurse=False)]

    def act(module: nn.Module, read: dict[str, Tensor]) -> None:
        if change in CHANGES:
            CHANGES[change](module, read)
            return
        for name in states:
            setattr(module, name, STATES[change](getattr(module, name)))

    def run(coll: Any, optimizer: Any, read: Tensor, act: Change) -> None:
        backward_after(coll, {"input": read}, act)
        if optimizer is not None:
            optimizer.step()

    run(*made[1], ids.clone(), lambda *_: None)
    try:
        run(coll, optimizer, ids, act)
    except (ConfigError, RuntimeError, NotImplementedError):
        assert set(coll.steps_taken().values()) == {0}, "nothing has been stepped"
        return
    (p,), (q,) = coll.parameters(), made[1][0].parameters()
    if not p.is_meta:
        torch.testing.assert_close(p.detach().double(), q.detach().double(), rtol=1e-2, atol=1e-2)


def test_compiled_steps_refuse_what_was_replaced() -> None:
    for change in ("float", "half", "double", "copied", "state"):
        torch._dynamo.reset()
        coll = EmbeddingCollection(SCHEMA, None, RowwiseAdagrad(lr=0.1), backend="native")
        before = coll.width8.detach().clone()
        out = torch.compile(coll, backend="aot_eager")(torch.arange(ROWS // 2).unsqueeze(1))
        if change == "copied":
            coll.width8.data = coll.width8.data.clone()
        elif change == "state":
            coll.width8_sum = coll.width8_sum.clone()
        else:
            getattr(coll, change)()
        if change == "float":
            out.sum().backward()
            torch.testing.assert_close(coll.width8[: ROWS // 2], before[: ROWS // 2] - 0.1, rtol=1e-4, atol=1e-4)
            continue
        with pytest.raises(ConfigError, match="look up again"):
            out.sum().backward()


def test_one_module_reads_addresses() -> None:
    """What is handed to kernels has been checked in one place."""
    package = Path(rse.__file__).parent
    reads = re.compile(r"\bdata_ptr\(|\baddressof\(|\bbuffer_info\(|\.ctypes\.data\b|__array_interface__|\bbyref\(")
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in sorted(package.rglob("*.py"))
        if path.name != "pointers.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if reads.search(line) and not line.lstrip().startswith((">>>", "..."))
    ]
    assert not found, f"use recsys_embed.kernels.pointers: {found}"
