"""The benchmarks: contenders compute the same, the floor copies rows, the gate closes where ground was lost."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys_embed.data import convert_table, open_dataset
from recsys_embed.kernels import fbgemm
from recsys_embed.kernels.native import library as native_library

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = [f.stem for f in FOLDER.glob("*.py")]
needs_all = pytest.mark.skipif(
    isinstance(native_library.library(), str) or fbgemm.why_not() is not None or shutil.which("g++") is None,
    reason="needs the native kernels, FBGEMM and a compiler",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script by name, as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield import_module
    torch.set_num_threads(threads)
    for name in NAMES:
        sys.modules.pop(name, None)


@needs_all
@pytest.mark.parametrize(
    ("method", "params", "names"),
    [
        ("full", {}, {"native", "torch", "tbe", "fused_ebc", "per_table", "floor"}),
        ("unified", {}, {"native", "torch", "per_table", "index_tbe", "floor"}),
        ("compositional", {"combine": "mul"}, {"native", "torch", "per_table", "index_tbe", "floor"}),
        ("robe", {}, {"native", "torch", "per_table", "index_tbe", "floor"}),
    ],
)
def test_contenders_compute_the_same_and_are_timed(
    bench: Any, method: str, params: dict[str, Any], names: set[str]
) -> None:
    case = bench("workload").Case(method, 16, 30_000, 1.0 if method == "full" else 16.0, params)
    rows = bench("bench_kernels").run(case, (520, 600), 2, {"compile"})
    assert {r["contender"] for r in rows} == names
    assert all(0 < r["time"]["p20"] <= r["time"]["median"] <= r["time"]["p80"] and r["ratio"] > 0 for r in rows)
    assert {(r["case"], r["dim"], r["batch"]) for r in rows} == {(case.name, 16, 520), (case.name, 16, 600)}
    assert {r["contender"] for r in rows if r["phase"] == "lookup"} == names
    assert {r["contender"] for r in rows if r["phase"] == "step"} == names - {"floor"}


@needs_all
def test_a_contender_that_computes_something_else_is_not_timed(bench: Any) -> None:
    kernels, contenders, workload = bench("bench_kernels"), bench("contenders"), bench("workload")
    case = workload.Case("full", 8, 5_000)
    ids = workload.batches(case.sizes, 600)
    native_coll, found = contenders.build(case, ids, {"tbe", "fused_ebc", "per_table", "compile"})
    upstream = torch.full((600, 26 * 8), 0.1)
    kernels.verify(case, native_coll, found, ids[0], upstream)
    right = found["torch"].forward
    found["torch"].forward = lambda turn: right(turn) * 1.001
    with pytest.raises(AssertionError, match="full, torch"):
        kernels.verify(case, native_coll, found, ids[0], upstream)
    found["torch"].forward = lambda turn: right(turn).detach().requires_grad_()
    with pytest.raises(AssertionError, match=r"after a step|nothing was learned"):
        kernels.verify(case, native_coll, found, ids[0], upstream)


@needs_all
@pytest.mark.parametrize("width", [1, 8, 16, 33, 64])
def test_the_floor_copies_the_rows(bench: Any, width: int) -> None:
    table, rows = torch.randn(500, width), torch.randint(0, 500, (1000,))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = torch.full((1000 * width,), float("nan"))
        bench("floor").gather(table, rows, out, width)
        assert torch.equal(out.view(1000, width), table[rows])


@needs_all
def test_the_floor_reads_what_the_lookup_reads(bench: Any) -> None:
    case = bench("workload").Case("compositional", 16, 30_000, 16.0, {"combine": "sum"})
    ids = bench("workload").batches(case.sizes, 50)[0]
    coll, _ = bench("contenders").build(case, [ids], {"torch", "per_table", "index_tbe", "compile"})
    sums = torch.zeros(())
    for storage, rows, width in bench("floor").reads(coll, ids):
        assert width == 16
        sums = sums + getattr(coll, storage).detach()[rows].double().sum()
    torch.testing.assert_close(sums, bench("floor").oracle(coll, ids).sum())


def test_the_gate_closes_where_ground_was_lost(bench: Any) -> None:
    gate = bench("gate")

    def row(contender: str, case: str = "full") -> tuple[Any, ...]:
        return ("kernels", case, 16, 8192, 1000, 2, "step", contender)

    cases = [f"case {i}" for i in range(5)]
    before = {row("tbe", c): 1.6 for c in cases} | {row("native", c): 3.0 for c in cases} | {row("old"): 1.0}
    assert gate.compare(before, {**before, row("new"): 1.0})[1] == []
    assert "are new, 0" in gate.compare(before, {**before, row("new"): 1.0})[0][0]
    noisy = {k: v * (1.3 if i % 2 else 0.8) for i, (k, v) in enumerate(before.items())}
    assert gate.compare(before, noisy)[1] == [], "noise that evens out passes"
    faster = {k: v / 2 if k[-1] == "native" else v * 2 for k, v in before.items()}
    assert gate.compare(before, faster)[1] == []
    for contender, factor in (("native", 1.2), ("tbe", 1 / 1.2)):
        slower = {k: v * (factor if k[-1] == contender else 1) for k, v in before.items()}
        (failed,) = gate.compare(before, slower)[1]
        assert failed.startswith(f"kernels step {contender}")
    one = {**before, row("tbe", "case 3"): 0.9}
    assert any("case 3" in line and "1.78 times worse" in line for line in gate.compare(before, one)[1])
    assert gate.compare(before, {row("tbe", "other"): 1.0})[1], "nothing in common is no success"


def test_targets_are_held_against_the_worst_row(bench: Any) -> None:
    targets = bench("targets")
    rows = [{"case": "full", "phase": "step", "contender": "tbe", "threads": 2, "ratio": r} for r in (1.4, 2.0)]
    target = targets.Target("x", "kernels", {"case": ("full", "hash"), "threads": 2}, at_least=1.5)
    assert target.line(rows) == "| x | at least 1.5 | 1.40 (of 1.40 to 2.00) | no |"
    assert target.line(rows[1:]).endswith("| yes |")
    assert "not run" in target.line([])
    assert all(t.at_least is None or t.at_most is None for t in targets.TARGETS)


def test_the_picture_is_drawn_from_the_rows(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, plot = bench("measure"), bench("plot")
    about = {"case": "full", "dim": 16, "batch": 8, "threads": 1, "unit": "ms"}
    rows = [
        {**about, "phase": p, "contender": c} | measure.summary([2.0, 3.0], [1.0, 1.0])
        for p in ("lookup", "step")
        for c in ("native", "tbe", "torch")
    ]
    for name in ("kernels", "deepfm"):
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / f"{name}.json")])
        measure.report(name, rows)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    plot.main()
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path), "--threads", "7"])
    with pytest.raises(SystemExit, match="no rows of 7 threads"):
        plot.main()


def test_full_tables_are_trained_beside_plain_torch_on_the_same_rows(bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 30, 3000), rng.integers(0, 20, (3000, 4))
    seen = [row[:n] for row, n in zip(item.tolist(), rng.integers(0, 4, 3000), strict=True)]
    click = rng.random(3000) < 1 / (1 + np.exp(-3 * (item[:, 3] % 3 - 1.0)))
    table = {"click": click, "user": user, "item": item[:, 3], "seen": seen, "price": rng.random(3000)}
    columns = {
        "click": {"kind": "label"},
        "user": {"kind": "categorical"},
        "item": {"kind": "categorical", "vocab": "item"},
        "seen": {"kind": "list", "vocab": "item"},
        "price": {"kind": "numeric"},
    }
    convert_table(table, tmp_path / "data", {"columns": columns})
    beside = bench("beside_torch")
    data = open_dataset(tmp_path / "data")
    sizes = {spec.name: (spec.table_name, spec.num_embeddings) for spec in data.schema(16)}
    rows = beside.rows_of(data, "train", sizes)
    batch = data.read("train", 0, 50)
    bags = [piece.tolist() for piece in batch.lists.values.tensor_split(batch.lists.offsets[1:-1])]
    assert [[i for i in row if i < sizes["seen"][1]] for row in rows["seen"][:50].tolist()] == bags
    aucs = {row["contender"]: row["auc"] for row in beside.compare(tmp_path / "data", "deepfm", 12, 1)}
    assert min(aucs.values()) > 0.85, aucs
    assert max(aucs.values()) - min(aucs.values()) < 0.03, aucs
