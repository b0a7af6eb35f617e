"""A fused optimizer that steps at ``step()`` against one that steps in backward, lookup and both together.

    .venv/bin/python -m benchmarks.bench_step_modes [--out FILE]

26 features of 2,600,000 rows in all, width 16, skewed ids, batches of 4,096. ``ratio`` is the time of a lookup, its
backward and ``step()``, over that of a lookup and its backward that steps. ``read``: something has read the gradients
(here a norm, for clipping), so that their rows are computed before the step.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import interleaved, report
from recsys_embed import Adam, EmbeddingCollection, FeatureSpec, Plan, RowwiseAdagrad, Schema
from recsys_embed.optim import SGD, FusedOptimizer, fused_optimizer

FIELDS, ROWS, BATCH, WIDTH = 26, 100_000, 4096, 16


def step(schema: Schema, plan: Plan, rule: FusedOptimizer, ids: Tensor, mode: str) -> Callable[[], None]:
    coll = EmbeddingCollection(schema, plan, rule)
    optimizer = None if mode == "in backward" else fused_optimizer(coll)
    upstream = torch.full((BATCH, FIELDS, WIDTH), 1e-3)

    def run() -> None:
        coll(ids).backward(upstream)
        if optimizer is None:
            return
        if mode == "at step, read":
            torch.nn.utils.clip_grad_norm_(coll.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    # Collections of all modes take turns, which looks like accumulation to those that step in backward.
    warnings.filterwarnings("ignore", message=".*backwards of a collection came before one step")
    torch.manual_seed(0)
    schema = Schema([FeatureSpec(f"C{i}", ROWS, WIDTH) for i in range(FIELDS)])
    ids = (torch.rand(BATCH, FIELDS, dtype=torch.float64) ** 3 * ROWS).long()
    rows = []
    for method in ("full", "unified", "compositional", "memcom"):
        plan = Plan.full(schema) if method == "full" else Plan.uniform(schema, method, budget="20MiB")
        for rule in (SGD(lr=0.1), RowwiseAdagrad(lr=0.1), Adam(lr=0.1)):
            modes = ("in backward", "at step", "at step, read")
            times = interleaved({m: step(schema, plan, rule, ids, m) for m in modes}, rounds=25, warmup=5)
            base = times["in backward"]["median_ms"]
            name = type(rule).__name__
            rows += [
                {"method": method, "rule": name, "case": m, **t, "ratio": round(t["median_ms"] / base, 3)}
                for m, t in times.items()
            ]
    report("step_modes", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
