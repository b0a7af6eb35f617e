"""Step of a tensor train beside an einsum over all ids: forward, backward and update, as a ratio in one process.

.venv/bin/python benchmarks/computed_rows.py [--threads N] [--out FILE]

Ids are a batch of 8192 by a Zipf distribution over a million, in random order of frequency. The einsum reads the slices
of every id by indexing and torch's Adagrad steps the cores; ours deduplicates ids and steps rows inside backward, by
the same rule per element.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.methods.tt import TtConfig

IDS, BATCH, EXPONENT = 1_000_000, 8192, 1.05


def zipf_batches(count: int) -> list[Tensor]:
    """Batches of ids ``[BATCH]``."""
    rng = np.random.default_rng(0)
    shares = np.arange(1, IDS + 1) ** -EXPONENT
    names, ends = rng.permutation(IDS), np.cumsum(shares / shares.sum())
    return [torch.from_numpy(names[np.searchsorted(ends, rng.random(BATCH)).clip(0, IDS - 1)]) for _ in range(count)]


class Einsum(nn.Module):
    """Three cores, whose slices of all ids are contracted at once."""

    def __init__(self, rows: tuple[int, ...], widths: tuple[int, ...], rank: int) -> None:
        super().__init__()
        edges = (1, rank, rank, 1)
        self.rows = rows
        self.cores = nn.ParameterList(
            torch.randn(n, a, q, b) * 0.1 for n, a, q, b in zip(rows, edges[:-1], widths, edges[1:], strict=True)
        )

    def forward(self, ids: Tensor) -> Tensor:
        _, middle, last = self.rows
        digits = (ids // (middle * last), ids // last % middle, ids % last)
        slices = [core[digit] for core, digit in zip(self.cores, digits, strict=True)]
        return torch.einsum("nzap,npbq,nqcy->nabc", *slices).flatten(1)


def median_ratio(theirs: Callable[[Tensor], None], ours: Callable[[Tensor], None], batches: list[Tensor]) -> float:
    """Median over batches of the ratio of their time to ours, run in turns; of one thread, time of the processor."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ratios = []
    for batch in batches:
        times = []
        for step in (theirs, ours):
            start = clock()
            step(batch)
            times.append(clock() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[3:])


def measure(width: int, rank: int, batches: list[Tensor]) -> dict[str, float]:
    spec = rse.FeatureSpec("C1", IDS, width)
    config = TtConfig(ranks=(rank, rank))
    ours = rse.EmbeddingCollection(rse.Schema([spec]), rse.Plan({"C1": config}), rse.Adagrad(lr=0.01))
    theirs = Einsum(*config.shapes_of(spec), rank)
    optimizer = torch.optim.Adagrad(theirs.parameters(), lr=0.01)
    upstream = torch.randn(BATCH, width) * 0.01

    def step_theirs(ids: Tensor) -> None:
        theirs(ids).backward(upstream)
        optimizer.step()
        optimizer.zero_grad()

    def step_ours(ids: Tensor) -> None:
        ours(ids.unsqueeze(1)).view(BATCH, width).backward(upstream)

    return {"width": width, "rank": rank, "ratio": round(median_ratio(step_theirs, step_ours, batches), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, default=31)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    batches = zipf_batches(given.batches)
    distinct = round(statistics.mean(len(b.unique()) for b in batches))
    rows = [measure(width, rank, batches) for width in (16, 64) for rank in (8, 16, 32)]
    found = {"threads": given.threads, "distinct ids of a batch": distinct, "rows": rows}
    for row in rows:
        print(f"width {row['width']:3d}  rank {row['rank']:3d}  einsum / ours {row['ratio']:6.2f}", flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
