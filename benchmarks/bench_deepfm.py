"""Whole training steps of a DeepFM: how near to the speed of its matrix products, and how they grow with the tables.

Run: python benchmarks/bench_deepfm.py [--out FILE] [--quick] [--threads 2] [--peers]

26 fields with the public Criteo Kaggle cardinalities cut to a total of 1 M and of 30 M rows, Zipf(1.05) ids, 13 numeric
fields, dim 16, MLP 400-400-400, batch 4096, float32. ``native`` trains tables by rowwise Adagrad, the rest by torch's
fused Adam; ``gemm`` are the matrix products of such a step alone; ``adam`` trains tables by Adam, of touched rows and,
as ``adam, all rows decay``, of all rows with weight decay, which is what torch's dense Adam does. ``--peers`` adds
FuxiCTR and DeepCTR-Torch: their models and the bodies of their loops, ids and numbers in memory for all. Steps take
turns. Milliseconds; ``ratio`` is the median over the turns of a time over that of ``native`` in the same turn.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_kernels import timed
from measure import report, summary
from peers import HIDDEN, Batch, deepctr, fuxictr
from workload import batches, capped

import recsys_embed as rse
from recsys_embed.models import build_model
from recsys_embed.optim import FusedOptimizer

BATCH, DIM, NUMERIC, COUNT = 4096, 16, 13, 8
Step = Callable[[int], Any]


def data(sizes: list[int]) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(BATCH, NUMERIC, generator=generator), ids, (torch.rand(BATCH, generator=generator) < 0.25).float())
        for ids in batches(sizes, BATCH, COUNT)
    ]


def model_of(sizes: list[int], optimizer: FusedOptimizer, backend: str = "auto") -> Any:
    schema = rse.Schema([rse.FeatureSpec(f"C{i}", n, DIM) for i, n in enumerate(sizes, 1)])
    return build_model(
        "deepfm", schema, rse.Plan.full(schema), optimizer=optimizer, backend=backend, hidden=tuple(HIDDEN)
    )


def ours(sizes: list[int], given: list[Batch], optimizer: FusedOptimizer, backend: str = "auto") -> Step:
    model = model_of(sizes, optimizer, backend)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step(turn: int) -> float:
        dense, ids, label = given[turn % COUNT]
        adam.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(dense, ids), label)
        loss.backward()
        adam.step()
        return float(loss)

    return step


def gemm() -> Step:
    """The matrix products of a step, forward and backward, into outputs that are used again."""
    widths = [(len(capped(100)) + NUMERIC) * DIM, *HIDDEN]
    parts = []
    for a, b in itertools.pairwise(widths):
        x, w, g = torch.randn(BATCH, a), torch.randn(b, a), torch.randn(BATCH, b)
        parts.append((x, w, g, torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)))

    def step(turn: int) -> None:
        for x, w, g, out, dx, dw in parts:
            torch.mm(x, w.T, out=out)
            torch.mm(g, w, out=dx)
            torch.mm(g.T, x, out=dw)

    return step


def verify(sizes: list[int], given: list[Batch], optimizer: FusedOptimizer) -> None:
    """The losses of some steps are those of the torch backend.

    Raises:
        AssertionError: they are not.
    """
    ways = [ours(sizes, given, optimizer, backend) for backend in ("auto", "torch")]
    losses = [[way(turn) for turn in range(4)] for way in ways]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)


def compare(what: str, steps: dict[str, Step], rounds: int, warmup: int = 2) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds + warmup):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            spent = timed(lambda name=name, turn=turn: steps[name](turn))[1]
            if turn >= warmup:
                times[name].append(spent * 1e3)
    about = {
        "case": what,
        "dim": DIM,
        "batch": BATCH,
        "phase": "step",
        "threads": torch.get_num_threads(),
        "unit": "ms",
    }
    rows = [{**about, "contender": name} | summary(values, times[names[0]]) for name, values in times.items()]
    for row in rows:
        row["samples_per_s"] = round(BATCH / row["time"]["median"] * 1e3)
        print(row, file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true", help="100,000 and 1 M rows, few rounds")
    parser.add_argument("--peers", action="store_true", help="FuxiCTR and DeepCTR-Torch too; takes 16 GB and minutes")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rounds = 5 if given.quick else 31
    adagrad, plain = rse.RowwiseAdagrad(lr=0.01), rse.Adam(lr=1e-3)
    decaying = rse.Adam(lr=1e-3, weight_decay=1e-5, rows="all")
    small, large = (
        (("100 k", 100_000), ("1 M", 1_000_000)) if given.quick else (("1 M", 1_000_000), ("30 M", 30_000_000))
    )
    sizes, more = capped(small[1]), capped(large[1])
    seen, many = data(sizes), data(more)
    for optimizer in (adagrad, plain, decaying):
        verify(sizes, seen, optimizer)
    steps = {
        "native": ours(sizes, seen, adagrad),
        "gemm": gemm(),
        f"native, {large[0]}": ours(more, many, adagrad),
        "adam": ours(sizes, seen, plain),
        "adam, all rows decay": ours(sizes, seen, decaying),
    }
    rows = compare(f"deepfm {small[0]}", steps, rounds)
    steps.clear()
    if given.peers:
        gc.collect()
        theirs = {
            "native": ours(sizes, seen, adagrad),
            "fuxictr": fuxictr(sizes, DIM, seen),
            "deepctr-torch": deepctr(sizes, DIM, seen),
            "deepctr-torch, no penalty": deepctr(sizes, DIM, seen, 0.0),
        }
        rows += compare(f"deepfm {small[0]}, peers", theirs, 5 if given.quick else 11)
        theirs.clear()
        # One at a time: each holds weights, dense gradients and two moments of every row.
        for name, make in (("fuxictr", fuxictr), ("deepctr-torch", deepctr)):
            gc.collect()
            theirs = {"native": ours(more, many, adagrad), name: make(more, DIM, many)}
            rows += compare(f"deepfm {large[0]}, {name}", theirs, 3, 1)
            theirs.clear()
    report("deepfm", rows)


if __name__ == "__main__":
    main()
