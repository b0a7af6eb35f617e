"""Lookups of computed rows with a cache of the frequent ones, beside the same module without: ratios in one process.

Run: python benchmarks/cached_rows.py [--out FILE]

A million ids, Zipf's law (exponent 1.05), width 16; files of methods ``tt`` and ``dhe`` of 512 KiB, loaded with and
without ``cached_rows``. The caches have seen 200 batches before. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import machine
from workload import zipf

import recsys_embed as rse

IDS, WIDTH = 1_000_000, 16
SIZES = ("1MiB", "4MiB", "16MiB")


def measure(method: str, budget: str, batch: int, folder: Path, rounds: int = 60) -> list[dict[str, object]]:
    schema = rse.Schema([rse.FeatureSpec("C1", IDS, WIDTH)])
    plan = rse.Plan.uniform(schema, method, budget=budget)
    path = folder / f"{method}.safetensors"
    rse.export(rse.EmbeddingCollection(schema, plan), path)
    modules = {"none": rse.load(path)} | {size: rse.load(path, cached_rows=size) for size in SIZES}
    rng, times = np.random.default_rng(0), {name: [] for name in modules}
    with torch.no_grad():
        for turn in range(200 + rounds):
            ids = torch.from_numpy(zipf(batch, IDS, rng)).unsqueeze(1)
            for name, module in modules.items():
                if turn < 200 and name == "none":
                    continue
                start = time.perf_counter()
                module(ids)
                if turn >= 200:
                    times[name].append(1e6 * (time.perf_counter() - start))
    rows = []
    for name, values in times.items():
        ratios = [a / b for a, b in zip(times["none"], values, strict=True)]
        row: dict[str, object] = {"method": method, "batch": batch, "cached_rows": name}
        row |= {"us": round(statistics.median(values), 1), "faster": round(statistics.median(ratios), 2)}
        if name != "none":
            (cache,) = (c for m in modules[name].modules() if hasattr(m, "by_feature") for c in m.by_feature.values())
            counts = cache.counts()
            row |= {"hits": round(counts.hits / (counts.hits + counts.misses), 3), "bytes": cache.nbytes}
        rows.append(row)
        print(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            row
            for method, budget in (("tt", "512KiB"), ("dhe", "512KiB"))
            for batch in (256, 8192)
            for row in measure(method, budget, batch, Path(folder))
        ]
    if given.out:
        given.out.write_text(
            json.dumps({"benchmark": "cached_rows", "machine": machine(), "results": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
