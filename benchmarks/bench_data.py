"""Rows per second and peak memory of converting Criteo text, and samples per second of the batches made from it.

Run: python benchmarks/bench_data.py [--rows N] [--rounds N] [--out FILE]

Every conversion runs in a process of its own (its peak memory is that process's), the cases taking turns; the text is
synthetic, with the cardinalities of the real file times 0.1. Anchors, where installed: pandas (C engine and categorical
codes, to .npy), and torch's own DataLoader over a TensorDataset with the same batch size.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, report

from recsys_embed.data import CriteoOptions, convert_criteo, make_synthetic, open_dataset
from recsys_embed.data.criteo.options import MIN_MEMORY

BATCH = 4096
CASES: dict[str, dict[str, Any]] = {
    "vocab": {},
    "vocab, min_count 1": {"min_count": 1},
    "vocab, least memory": {"max_memory": MIN_MEMORY},
    "raw": {"ids": "raw"},
    "vocab, 1 worker": {"workers": 1},
}


def option(name: str, default: int) -> int:
    """The whole number after a flag."""
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


def pandas_codes(text: str, out: str) -> None:
    """The anchor: everything in memory, one integer code per distinct value."""
    import numpy as np
    import pandas as pd

    ints, cats = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)]
    kinds = {**dict.fromkeys(ints, "float32"), **dict.fromkeys(cats, str)}
    frame = pd.read_csv(text, sep="\t", header=None, names=["label", *ints, *cats], dtype=kinds, engine="c")
    os.makedirs(out)
    np.save(f"{out}/dense.npy", np.log1p(frame[ints].fillna(0).clip(lower=0).to_numpy(np.float32)))
    np.save(f"{out}/ids.npy", np.stack([pd.Categorical(frame[c]).codes.astype(np.int32) + 1 for c in cats], 1))
    np.save(f"{out}/label.npy", frame.label.to_numpy(np.int8))


def peak_mib() -> float:
    """Peak resident memory of this process. Linux hands ``ru_maxrss`` down from the parent, but not VmHWM."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1024)


def convert_one(case: str, text: str, out: str) -> None:
    """Body of a child process: convert, print seconds and peak memory."""
    stages: dict[str, float] = {}
    start, cpu = time.perf_counter(), time.process_time()
    if case == "pandas":
        import pandas  # noqa: F401  (the import is not part of the time)

        start, cpu = time.perf_counter(), time.process_time()
        pandas_codes(text, out)
    else:
        convert_criteo(
            text,
            out,
            CriteoOptions(**CASES[case]),
            progress=lambda stage, done, total, rows: stages.update({stage: round(time.perf_counter() - start, 3)}),
        )
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mib": round(peak_mib()), "stages_end": stages}))


def conversions(text: Path, rows: int, rounds: int, work: Path) -> list[dict[str, Any]]:
    """All conversion cases in turn, each in its own process."""
    names = list(CASES) + (["pandas"] if find_spec("pandas") else [])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            shutil.rmtree(work / "out", ignore_errors=True)
            command = [sys.executable, __file__, "--case", name, str(text), str(work / "out")]
            child = subprocess.run(command, capture_output=True, check=True, text=True)
            found[name].append(json.loads(child.stdout))
    return [
        {
            "what": "convert",
            "case": name,
            "rows": rows,
            "rows_per_s": round(rows / statistics.median(f["seconds"] for f in each)),
            "rows_per_cpu_s": round(rows / statistics.median(f["cpu"] for f in each)),
            "peak_mib": max(f["peak_mib"] for f in each),
            "stages_end_s": each[-1]["stages_end"],
        }
        for name, each in found.items()
    ]


def loaders(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Samples per second of one shuffled epoch of the training rows."""
    data = open_dataset(folder)
    streamed = open_dataset(folder, memory_limit=0)
    held = data.load("train")
    plain = torch.utils.data.TensorDataset(held.dense[:100_000], held.ids[:100_000].long(), held.label[:100_000])
    torch_loader = torch.utils.data.DataLoader(plain, batch_size=BATCH, shuffle=True)

    def drain(batches: Any) -> None:
        for _ in batches:
            pass

    n = data.splits["train"]
    sizes = {"memory": n, "memory, in order": n, "stream": n, "torch DataLoader": len(plain)}
    times = interleaved(
        {
            "memory": lambda: drain(data.batches("train", BATCH)),
            "memory, in order": lambda: drain(data.batches("train", BATCH, shuffle=False)),
            "stream": lambda: drain(streamed.batches("train", BATCH)),
            "torch DataLoader": lambda: drain(torch_loader),
        },
        rounds=max(3, rounds),
        warmup=1,
    )
    return [
        {"what": "load", "case": name, "samples_per_s": round(sizes[name] / t["median_ms"] * 1000), **t}
        for name, t in times.items()
    ]


def run() -> None:
    """Make the text, convert it in all ways, load it in all ways, print JSON."""
    rows, rounds = option("--rows", 1_000_000), option("--rounds", 3)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        start = time.perf_counter()
        made = make_synthetic(work / "text", rows, 1, scale=0.1, text_only=True)
        text = made.out / "synthetic.tsv"
        spent = time.perf_counter() - start
        out = [{"what": "make", "rows": rows, "rows_per_s": round(rows / spent), "bytes": text.stat().st_size}]
        out += conversions(text, rows, rounds, work)
        convert_criteo(text, work / "data")
        report("data", out + loaders(work / "data", rounds))


if __name__ == "__main__":
    if "--case" in sys.argv:
        convert_one(*sys.argv[sys.argv.index("--case") + 1 :])
    else:
        run()
