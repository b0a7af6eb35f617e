"""Serving: microseconds of a small batch's lookup, what hashing an id costs, and quantised tables.

Run: python benchmarks/bench_serving.py [--out FILE] [--quick] [--threads 1,2]

No gradients. ``latency``: 16 samples of 26 features over 2.6 M rows, plain and composed, all contenders in turn.
``hash``: a hashed lookup, a plain one of the very rows that the hash gives (in turn, from tables of the same size), and
their difference in each turn: what hashing adds to the gather. ``int8``: an export as it is served by default, by torch
and by FBGEMM's inference tables. Every lookup is compared with the readable definition, or with its source, first.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from bench_kernels import timed
from contenders import build
from floor import floor_of, oracle, reads
from measure import report, summary
from torch import Tensor
from workload import ALL_ROWS, FIELDS, Case, batches

import recsys_embed as rse

BATCHES = 4
Lookup = Callable[[int], Any]


def turns(lookups: dict[str, Lookup], rounds: int, warmup: int, scale: float, burst: int = 1) -> dict[str, list[float]]:
    """Times of each lookup, each turn another one first; in a turn the median of ``burst`` calls one after another."""
    names = list(lookups)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    with torch.no_grad():
        for turn in range(rounds + warmup):
            for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
                look_up = lookups[name]
                spent = [timed(lambda f=look_up, k=turn + i: f(k % BATCHES))[1] for i in range(burst)]
                if turn >= warmup:
                    times[name].append(statistics.median(spent) * scale)
    gc.enable()
    return times


def rows_of(about: dict[str, Any], times: dict[str, list[float]], base: str) -> list[dict[str, Any]]:
    about = {**about, "threads": torch.get_num_threads()}
    return [{**about, "contender": name} | summary(values, times[base]) for name, values in times.items()]


def latency(case: Case, rounds: int) -> list[dict[str, Any]]:
    ids = batches(case.sizes, 16, BATCHES)
    native, contenders = build(case, ids, {"compile"})
    wanted = oracle(native, ids[0]).float()
    for contender in contenders.values():
        torch.testing.assert_close(contender.forward(0).flatten(1), wanted, rtol=1e-4, atol=1e-5)
    # In bursts, as a server that does nothing else: of calls that take turns each finds the caches full of others'.
    times = turns({n: c.forward for n, c in contenders.items()}, rounds, rounds // 10, 1e6, burst=16)
    about = {"case": case.name, "dim": case.dim, "batch": 16, "phase": "latency", "unit": "us"}
    return rows_of(about, times, "native")


def hashing(rows: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    case = Case("hash", 16, rows, 16)
    schema = case.schema()
    hashed = rse.EmbeddingCollection(schema, case.plan(schema), backend="native").requires_grad_(False)
    sizes = [hashed.tables[f"{s.name}.weight"].rows for s in schema]
    specs = [rse.FeatureSpec(f"C{i}", n, case.dim) for i, n in enumerate(sizes, 1)]
    plain = rse.EmbeddingCollection(rse.Schema(specs), backend="native").requires_grad_(False)
    ids = batches(case.sizes, batch, BATCHES)
    starts = torch.tensor([hashed.places[f"{s.name}.weight"].offset for s in schema])
    kernel = rse.EmbeddingCollection(schema, case.plan(schema), backend="torch", device="meta").bundle.kernel
    order = [i for group in kernel.groups for i in group.features]
    back = torch.tensor(order).argsort()
    found = [torch.cat([r.view(batch, -1) for _, r, _ in reads(hashed, i)], 1)[:, back] - starts for i in ids]
    for name in hashed.storages:
        getattr(plain, name).copy_(getattr(hashed, name))
    assert torch.equal(plain(found[0]), hashed(ids[0])), "both read the same rows"
    lookups: dict[str, Lookup] = {
        "native": lambda turn: hashed(ids[turn]),
        "plain": lambda turn: plain(found[turn]),
        "floor": floor_of(hashed, ids),
    }
    times = turns(lookups, rounds, 3, 1e9 / (batch * FIELDS))
    times["cost"] = [a - b for a, b in zip(times["native"], times["plain"], strict=True)]
    about = {"case": "hash", "dim": case.dim, "batch": batch, "phase": "hash", "unit": "ns per id"}
    return rows_of(about, times, "native")


def quantised(rows: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    case = Case("full", 16, rows)
    source = rse.EmbeddingCollection(case.schema())
    ids = batches(case.sizes, batch, BATCHES)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/tables.safetensors"
        rse.export(source, path, precision="int8")
        served = {
            name: rse.load(path, backend=b)
            for name, b in (("native", "auto"), ("torch", "torch"), ("fbgemm", "fbgemm"))
        }
        wanted: Tensor = source(ids[0]).detach()
        for module in served.values():
            assert (module(ids[0]) - wanted).abs().max() <= 1.01 * wanted.abs().max() / 255, "within a step of 8 bits"
        times = turns({n: lambda turn, m=m: m(ids[turn]) for n, m in served.items()}, rounds, 3, 1e6)
    about = {"case": "full int8", "dim": case.dim, "batch": batch, "phase": "served", "unit": "us"}
    return rows_of(about, times, "native")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--threads", default="1,2")
    given = parser.parse_args()
    part = 16 if given.quick else 1
    rows: list[dict[str, Any]] = []
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        for case in (Case("full", 16, 2_600_000 // part), Case("unified", 16, 2_600_000, 16)):
            rows += latency(case, 20 if given.quick else 200)
        rows += hashing(ALL_ROWS // part, 8192, 15 if given.quick else 101)
        for batch in (16, 8192):
            rows += quantised(2_600_000, batch, 15 if given.quick else 101)
        for row in rows:
            if row["threads"] == threads:
                print(row, file=sys.stderr)
    report("serving", rows)


if __name__ == "__main__":
    main()
