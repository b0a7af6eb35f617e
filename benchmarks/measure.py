"""What every benchmark shares: interleaved medians, and the machine and commit a figure belongs to."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def interleaved(
    cases: Mapping[str, Callable[[], Any]], rounds: int = 9, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Milliseconds per call of each case, the cases taking turns so that the machine's noise meets all alike.

    Returns:
        Per case its median, and the 20th and 80th percentile.
    """
    for run in cases.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    quantiles = {name: statistics.quantiles(t, n=5) for name, t in times.items()}
    return {
        name: {"median_ms": statistics.median(t), "p20_ms": quantiles[name][0], "p80_ms": quantiles[name][3]}
        for name, t in times.items()
    }


def quantiles(values: list[float], digits: int = 1) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        values = values * 2
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    found = {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3]}
    return {name: round(value, digits) for name, value in found.items()}


def summary(values: list[float], base: list[float]) -> dict[str, Any]:
    """Quantiles of the times, and the median over the turns of a time over that of ``base`` in the same turn."""
    ratios = [v / b for v, b in zip(values, base, strict=True)]
    return {"time": quantiles(values), "ratio": round(statistics.median(ratios), 3)}


def machine() -> dict[str, Any]:
    """Processor, threads, versions and commit."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
    }


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Print one JSON document; with ``--out FILE`` also write it there."""
    text = json.dumps({"benchmark": name, "machine": machine(), "rows": rows}, indent=1)
    print(text)
    if "--out" in sys.argv:
        out = Path(sys.argv[sys.argv.index("--out") + 1])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
