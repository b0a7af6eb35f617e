"""The GPU kernels compiled for Hopper without a GPU: every launch of the host's side, with 16-byte loads of rows."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.collection import backward_steps
from recsys_embed.collection.lookup_bundle import LookupBundle
from recsys_embed.core.codes import Codes, CodesIndex
from recsys_embed.core.id_sets import IdSet
from recsys_embed.core.program import Initializer, LookupProgram, RankInSet, RowLookup, Table
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.triton.lazy_lookup import LazyLookup
from recsys_embed.optim import make_rule

pytestmark = pytest.mark.compiled
_TYPES = {
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}
_OPTIONS = ("num_warps", "num_stages")


@pytest.fixture(autouse=True)
def _steps_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first backward on: those that step when they end read gradients, which no kernel has computed here."""
    monkeypatch.setattr(backward_steps, "_WATCHED", 0)


SCHEMA = Schema([FeatureSpec("C1", 1000, 32), FeatureSpec("C2", 90_000, 32)])


def typed(value: Any, path: tuple[int, ...], attributes: dict[tuple[int, ...], Any]) -> Any:
    """Type of an argument as triton names it, those of a tuple's parts in such a tuple."""
    if isinstance(value, tuple):
        parts = [typed(part, (*path, i), attributes) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if not isinstance(value, Tensor):
        return "fp32" if isinstance(value, float) else "i32"
    if value.data_ptr() % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return _TYPES[value.dtype]


class Launches(dict[str, str]):
    """PTX by kernel, of its last launch; instead of running, kernels are compiled for sm_90."""

    def launch(self, kernel: Any, *arguments: Any, **named: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **named}
        constants = {p.name for p in kernel.params if p.is_constexpr}
        signature, constexprs, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            value = given[name]
            if name in constants:
                signature[name], constexprs[(i,)] = "constexpr", value
            else:
                signature[name] = typed(value, (i,), attributes)
        source = ASTSource(kernel, signature, constexprs, attributes)
        self[kernel.fn.__name__] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    from triton.runtime.jit import JITFunction

    found = Launches()

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.launch(kernel, *arguments, **named)

    monkeypatch.setattr(JITFunction, "run", run)
    return found


def step(method: str, dtype: torch.dtype, optimizer: rse.SGD | None, **params: Any) -> None:
    """All launches of a lookup and its backward."""
    plan = (
        Plan.uniform(SCHEMA, method, **params)
        if method == "full"
        else Plan.uniform(SCHEMA, method, budget="4MiB", full_below=1, **params)
    )
    coll = EmbeddingCollection(SCHEMA, plan, optimizer, dtype=dtype, backend="torch")
    tables = [getattr(coll, name) for name in coll.storages]
    storages = {name: tuple(getattr(coll, name).shape) for name in coll.storages}
    like = next(coll.parameters())
    bundle = LookupBundle(SCHEMA, coll.plan, coll.places, storages, like, "triton", ["triton"])
    if not bundle.batched:
        return
    ids = torch.zeros(50, 2, dtype=torch.int64)
    record = coll._native_step(coll._record(False), False) if optimizer else None
    outputs = bundle.batched["triton"]._outputs(ids, tables, record, False, None)
    torch.autograd.backward(outputs, [torch.zeros_like(out) for out in outputs])


def wide(ptx: str, operation: str) -> int:
    """Accesses of 16 bytes to global memory that a thread makes: ``ld``, ``st``, or ``red`` (an addition)."""
    names = {
        "ld": r"ld\.global[a-z0-9_:.]*",
        "st": r"st\.global[a-z0-9_:.]*",
        "red": r"(?:red|atom)\.global[a-z0-9_:.]*",
    }
    return len(re.findall(names[operation] + r"\.v4\.[bf]32", ptx)) + len(
        re.findall(names[operation] + r"\.v2\.b64", ptx)
    )


def per_thread(elements: int, dtype: torch.dtype, warps: int) -> int:
    """Accesses of 16 bytes that each thread makes to touch so many elements once."""
    return elements * dtype.itemsize // 16 // (32 * warps)


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [("lpt", "int8"), ("lpt", "int4"), ("lpt", "bf16"), ("alpt", "int8"), ("alpt", "int4")],
)
@pytest.mark.parametrize("method", ["full", "robe"])
def test_rows_of_few_bits(launches: Launches, method: str, quantization: str, precision: str) -> None:
    step(method, torch.float32, rse.RowwiseAdagrad(0.1), precision=precision, quantization=quantization)
    assert {"forward", "sum_pieces", "join_pieces"} <= set(launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("optimizer", "moments"), [(rse.RowwiseAdagrad(0.1), 0), (rse.Adam(0.1), 2)], ids=repr)
def test_plain_tables(launches: Launches, dtype: torch.dtype, optimizer: rse.SGD, moments: int) -> None:
    step("full", dtype, optimizer)
    assert set(launches) == {"forward", "cut", "sum_pieces", "join_pieces", "accumulate", "update_touched"}
    rows = per_thread(2048, dtype, 4)
    assert (wide(launches["forward"], "ld"), wide(launches["forward"], "st")) == (rows, rows)
    rows, state = per_thread(512, dtype, 2), per_thread(512, torch.float32, 2)
    assert wide(launches["sum_pieces"], "ld") == 2 * rows + moments * state, "gradients, weights and moments"
    assert wide(launches["sum_pieces"], "st") == rows + (moments + 2) * state, "weights, moments and two partial sums"
    assert wide(launches["update_touched"], "ld") == rows + (moments + 1) * state
    assert wide(launches["accumulate"], "ld") == per_thread(1024, dtype, 4)
    assert wide(launches["accumulate"], "red") == per_thread(1024, torch.float32, 4)


@pytest.mark.parametrize(
    ("method", "params", "row_lookups"),
    [
        ("hash", {}, 1),
        ("unified", {}, 1),
        ("compositional", {"combine": "mul"}, 2),
        ("compositional", {"combine": "sum"}, 2),
        ("multihash", {"num_hashes": 3}, 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_composed_tables(
    launches: Launches, method: str, params: dict[str, Any], row_lookups: int, dtype: torch.dtype
) -> None:
    step(method, dtype, rse.SGD(0.1), **params)
    assert wide(launches["forward"], "ld") == row_lookups * per_thread(2048, dtype, 4)
    if "spread" in launches:
        assert wide(launches["spread"], "st") > 0


@pytest.mark.parametrize(("rule", "precision"), [("adam", "8bit"), ("adam", "bf16"), ("rowwise_adagrad", "8bit")])
def test_state_of_few_bits_compiles(launches: Launches, rule: str, precision: Any) -> None:
    step("full", torch.float32, make_rule(rule, lr=0.1, state_precision=precision))
    assert {"sum_pieces", "join_pieces", "update_touched"} <= set(launches)


def test_every_form_of_index_compiles(launches: Launches) -> None:
    tables = (Table("a", 100, 16, Initializer("constant")),)
    sets = [RankInSet(IdSet(form, 1000, 3, 90, form), rest=5) for form in ("range", "bitmap", "sorted")]  # type: ignore[arg-type]
    codes = Codes(CodesIndex("codes", 1000, 2, 100), 1)
    program = LookupProgram(tables, tuple(RowLookup("a", t) for t in (*sets, codes)))
    lookup = LazyLookup.single("f", program, IndexStore([program.indexes]), False)
    lookup(torch.zeros(50, 1, dtype=torch.int64), [torch.zeros(100, 16)])
    assert wide(launches["forward"], "ld") == 4 * per_thread(2048, torch.float32, 4)


@pytest.mark.parametrize("method", [m.name for m in rse.list_methods()])
def test_every_method_compiles(launches: Launches, method: str) -> None:
    """Rows of generators are so wide that the compiler takes minutes: torch gathers them, as it runs networks."""
    step(method, torch.float16, None)
    assert ("forward" in launches) == (method not in ("dhe", "tt"))
