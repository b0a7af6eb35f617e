"""Where a DeepFM training step goes, and how it grows with the vocabulary.

Run: python benchmarks/bench_deepfm_step.py [--out FILE]

26 fields with the public Criteo Kaggle cardinalities capped to a total of 1 M and of 30 M rows, Zipf(1.05) ids, 13
numeric fields, dim 16, MLP 400-400-400, batch 4096, rowwise Adagrad on tables and Adam on the rest, torch backend.
The embedding share counts the forward of both collections and the summing and update of rows inside backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import interleaved, report

import recsys_embed as rse
from recsys_embed import collection as collection_module
from recsys_embed.models import build_model

CARDINALITIES = (1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306)
CARDINALITIES += (10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572)
BATCH, DIM, BATCHES = 4096, 16, 8


def capped(total: int) -> list[int]:
    """The cardinalities cut at one height so that they sum to about ``total``."""
    low, high = 1, max(CARDINALITIES)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(c, middle) for c in CARDINALITIES) <= total else (low, middle - 1)
    return [min(c, low) for c in CARDINALITIES]


def zipf(rows: int, size: int, rng: np.random.Generator, power: float = 1.05) -> np.ndarray:
    """Bounded Zipf ids, scattered so that frequent ids are not neighbours."""
    e = 1.0 - power
    rank = ((((size + 1.0) ** e - 1.0) * rng.random(rows) + 1.0) ** (1.0 / e)).astype(np.int64) - 1
    return (np.clip(rank, 0, size - 1) * 2654435761 + 12345) % size


class Clock:
    """Adds up the time spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = call(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return out

        return timed


def step_of(total: int, clock: Clock) -> Callable[[], None]:
    """A training step over ``total`` rows whose embedding part is timed by ``clock``."""
    sizes = capped(total)
    schema = rse.Schema([rse.FeatureSpec(f"C{i}", n, DIM) for i, n in enumerate(sizes, 1)])
    model = build_model("deepfm", schema, rse.Plan.full(schema), optimizer=rse.RowwiseAdagrad(lr=0.01))
    dense_parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(dense_parameters, lr=1e-3, fused=True)
    rng = np.random.default_rng(0)
    ids = [torch.from_numpy(np.stack([zipf(BATCH, n, rng) for n in sizes], 1)) for _ in range(BATCHES)]
    dense = torch.rand(BATCH, 13)
    label = (torch.rand(BATCH) < 0.25).float()
    for part in model.collections().values():
        part.forward = clock.wrap(part.forward)
    turn = 0

    def step() -> None:
        nonlocal turn
        adam.zero_grad()
        logits = model(dense, ids[turn % BATCHES])
        torch.nn.functional.binary_cross_entropy_with_logits(logits, label).backward()
        adam.step()
        turn += 1

    return step


def main() -> None:
    clocks = {total: Clock() for total in (1_000_000, 30_000_000)}
    update = collection_module.apply_update
    cases: dict[str, Callable[[], None]] = {}
    for total, clock in clocks.items():
        step = step_of(total, clock)

        def timed(step: Callable[[], None] = step, clock: Clock = clock) -> None:
            collection_module.apply_update = clock.wrap(update)
            step()

        cases[f"{total // 1_000_000}M"] = timed
    rounds, warmup = 21, 3
    times = interleaved(cases, rounds=rounds, warmup=warmup)
    rows = []
    for (name, quantiles), clock in zip(times.items(), clocks.values(), strict=True):
        embedding = 1000 * clock.seconds / (rounds + warmup)
        share = embedding / quantiles["median_ms"]
        rows.append({"rows": name, **quantiles, "embedding_ms_mean": embedding, "embedding_share": share})
    rows[1]["growth"] = rows[1]["median_ms"] / rows[0]["median_ms"]
    report("deepfm_step", rows)


if __name__ == "__main__":
    main()
