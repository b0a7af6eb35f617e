"""Lookups of all features and whole embedding steps: the native kernels beside torch and FBGEMM, in one process.

Run: python benchmarks/bench_kernels.py [--out FILE] [--quick] [--threads 1,2]

26 fields with the public Criteo Kaggle cardinalities, Zipf(1.05) ids, float32 tables, rowwise Adagrad, the tables of
composed methods at a sixteenth of the rows. Every case is compared with the torch backend before it is timed; cases
take turns. ``floor`` is torch's ``index_select(out=)`` of as many rows from one table of the same bytes. Ratios are of
medians of the same turns; times are nanoseconds per id and feature.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_deepfm_step import capped, zipf
from measure import report

import recsys_embed as rse
from recsys_embed import Plan
from recsys_embed.kernels.storage import allocate

FIELDS = 26
CASES = (
    ("full", {}, 16, 33_800_000, 1.0),
    ("full", {}, 64, 8_000_000, 1.0),
    ("hash", {}, 16, 33_800_000, 16.0),
    ("multihash", {}, 16, 33_800_000, 16.0),
    ("compositional", {"combine": "mul"}, 16, 33_800_000, 16.0),
    ("compositional", {"combine": "add"}, 16, 33_800_000, 16.0),
    ("compositional", {"combine": "concat"}, 16, 33_800_000, 16.0),
    ("unified", {}, 16, 33_800_000, 16.0),
    ("robe", {}, 16, 33_800_000, 16.0),
)
Step = Callable[[int], torch.Tensor]


def tbe(sizes: list[int], dim: int, ids: list[torch.Tensor]) -> Step | None:
    """FBGEMM's CPU kernel for plain tables, with the same rule; None where it is not installed."""
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return None
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(n, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for n in sizes],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        eps=1e-8,
        pooling_mode=PoolingMode.SUM,
    )
    flat = [i.T.contiguous().view(-1) for i in ids]
    offsets = torch.arange(len(flat[0]) + 1)
    return lambda turn: tables(flat[turn], offsets)


def per_table(sizes: list[int], plan: Plan, schema: rse.Schema, ids: list[torch.Tensor]) -> tuple[Step, Any]:
    """One drop-in per table as DLRM has them, sparse gradients, torch's Adagrad, in torch operations alone."""
    modules = torch.nn.ModuleList(
        rse.make_embedding(plan[s.name].method, s.num_embeddings, s.embedding_dim, config=plan[s.name], sparse=True)
        for s in schema
    )
    for module in modules:
        module._native = None
    columns = [[i[:, j].contiguous() for j in range(len(sizes))] for i in ids]

    def look_up(turn: int) -> torch.Tensor:
        return torch.stack([m(c) for m, c in zip(modules, columns[turn], strict=True)], 1)

    return look_up, torch.optim.Adagrad(modules.parameters(), lr=0.01)


def timed(call: Callable[[], Any], count: int) -> tuple[Any, float]:
    start = time.perf_counter()
    out = call()
    return out, (time.perf_counter() - start) * 1e9 / count


def run(case: tuple[Any, ...], batch: int, rounds: int) -> dict[str, Any]:
    """One case: medians per implementation and phase."""
    method, params, dim, total, ratio = case
    sizes = capped(total)
    schema = rse.Schema([rse.FeatureSpec(f"C{i}", n, dim) for i, n in enumerate(sizes, 1)])
    budget = int(sum(sizes) * dim * 4 / ratio)
    plan = Plan.full(schema) if method == "full" else Plan.uniform(schema, method, budget=budget, **params)
    rng = np.random.default_rng(0)
    ids = [torch.from_numpy(np.stack([zipf(batch, n, rng) for n in sizes], 1)) for _ in range(4)]
    optimizer = rse.RowwiseAdagrad(lr=0.01)
    steps: dict[str, Step] = {}
    checked = {}
    for backend in ("native", "torch"):
        coll = rse.EmbeddingCollection(schema, plan, optimizer, backend=backend)
        checked[backend] = coll(ids[0]).detach().clone()
        steps[backend] = lambda turn, coll=coll: coll(ids[turn])
    torch.testing.assert_close(checked["native"], checked["torch"], rtol=1e-5, atol=1e-6)
    checked.clear()
    extra: dict[str, Any] = {}
    if method == "full":
        found = tbe(sizes, dim, ids)
        if found is not None:
            steps["tbe"] = found
    elif ratio > 1:
        steps["per_table"], extra["per_table"] = per_table(sizes, plan, schema, ids)
    count = batch * FIELDS
    rows = max(1, int(sum(sizes) / ratio))
    table = allocate(rows, dim, torch.device("cpu"), torch.float32).normal_()
    starts = torch.tensor([0, *np.cumsum(sizes)[:-1].tolist()])
    flat = [((i + starts) % rows).view(-1) for i in ids]
    out = torch.empty(count, dim)
    upstream = torch.randn(batch, FIELDS * dim)
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 2):
        k = turn % 4
        _, spent = timed(lambda k=k: torch.index_select(table, 0, flat[k], out=out), count)
        times.setdefault("floor", []).append(spent)
        for name, step in steps.items():
            value, forward = timed(lambda step=step, k=k: step(k), count)

            def backward(value: torch.Tensor = value, name: str = name) -> None:
                value.backward(upstream.view(value.shape))
                if name in extra:
                    extra[name].step()
                    extra[name].zero_grad()

            _, rest = timed(backward, count)
            times.setdefault(f"{name} forward", []).append(forward)
            times.setdefault(f"{name} step", []).append(forward + rest)
            del value, backward
    medians = {name: median(t[2:]) for name, t in times.items()}
    row: dict[str, Any] = {"case": " ".join([method, *params.values()]), "dim": dim, "batch": batch, "rows": rows}
    row["threads"] = torch.get_num_threads()
    row["ns"] = {name: round(t, 1) for name, t in medians.items()}
    row["ratio"] = {
        name: round(t / medians[f"native {name.split()[1]}"], 2)
        for name, t in medians.items()
        if name != "floor" and not name.startswith("native")
    }
    row["ratio"]["forward to floor"] = round(medians["native forward"] / medians["floor"], 2)
    return row


def latency() -> dict[str, Any]:
    """Microseconds of a serving lookup of 16 samples: 26 features of 100,000 rows, no gradients."""
    schema = rse.Schema([rse.FeatureSpec(f"C{i}", 100_000, 16) for i in range(FIELDS)])
    ids = [torch.randint(0, 100_000, (16, FIELDS)) for _ in range(4)]
    steps: dict[str, Step] = {}
    for name in ("native", "torch"):
        coll = rse.EmbeddingCollection(schema, backend=name).eval()
        steps[name] = lambda turn, coll=coll: coll(ids[turn])
    found = tbe([100_000] * FIELDS, 16, ids)
    if found is not None:
        steps["tbe"] = found
    times: dict[str, list[float]] = {name: [] for name in steps}
    with torch.no_grad():
        for turn in range(2000):
            for name, step in steps.items():
                times[name].append(timed(lambda step=step, turn=turn: step(turn % 4), 1)[1] / 1000)
    medians = {name: round(median(t[100:]), 1) for name, t in times.items()}
    return {"case": "batch 16, no gradients", "threads": torch.get_num_threads(), "microseconds": medians}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds")
    parser.add_argument("--threads", default="1,2")
    given = parser.parse_args()
    rows = []
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        rows.append(latency())
        print(rows[-1], file=sys.stderr)
        for case in CASES:
            for batch in (8192,) if given.quick else (8192, 65536):
                rows.append(run(case, batch, 5 if given.quick else 9))
                print(rows[-1], file=sys.stderr)
    report("kernels", rows)


if __name__ == "__main__":
    main()
