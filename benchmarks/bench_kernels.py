"""Lookups of all features and whole embedding steps: this library beside what people use instead, in one process.

Run: python benchmarks/bench_kernels.py [--out FILE] [--quick] [--threads 1,2] [--batches 2048,...] [--cases NAME,...]
     [--skip NAME,...]

26 fields with the public Criteo Kaggle cardinalities, Zipf(1.05) ids, float32 tables, rowwise Adagrad, the tables of
composed methods at a sixteenth of the bytes. Before it is timed, every contender's vectors are compared with the
readable definition in float64, and after a step with those of the torch backend, where it follows the same rule.
Phases are ``lookup`` (no gradients), ``forward`` (the lookup of a training step) and ``step`` (all of it). Contenders
take turns, so that the machine's noise meets all alike; beside them a loop in C++ gathers the rows that the batch reads
(``floor``). Times are nanoseconds per id, medians with 20th and 80th percentiles; ``ratio`` is the
median over the turns of a time over that of this library's native kernels, and over the floor's for those themselves.
``load``: processes that waited for a core, on average, in the last minute; rows with ``clock`` are in the processor's
time, which others' turns on its cores are no part of.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from contenders import Contender, build
from floor import floor_of, oracle
from measure import report, summary
from torch import Tensor
from workload import CASES, FIELDS, Case, batches

BATCHES = 4
WARMUP = 2


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[Any, float]:
    start = clock()
    out = call()
    return out, clock() - start


def verify(case: Case, native: Any, contenders: dict[str, Contender], ids: Tensor, upstream: Tensor) -> None:
    """Vectors before a step, and after it.

    Raises:
        AssertionError: some contender computes something else.
    """
    wanted, few = oracle(native, ids[:512]).float(), slice(0, 512)
    for name, contender in contenders.items():
        got, right = contender.forward(0).detach().flatten(1)[few], wanted
        if contender.order is not None:
            right = wanted.view(-1, FIELDS, case.dim)[:, contender.order].flatten(1)
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{case.name}, {n}: {m}")
    trained = {n: c for n, c in contenders.items() if c.trains and c.same_rule}
    after = {}
    for name, contender in trained.items():
        out = contender.forward(0)
        given = upstream.view(-1, FIELDS, case.dim)
        back = slice(None) if contender.order is None else contender.order
        out.backward(given[:, back].reshape(out.shape))
        with torch.no_grad():
            moved = contender.forward(0).view(-1, FIELDS, case.dim)[few]
        after[name] = torch.empty_like(moved)
        after[name][:, back] = moved
    for name, got in after.items():
        torch.testing.assert_close(
            got, after["torch" if "torch" in after else "native"], rtol=1e-3, atol=1e-4,
            msg=lambda m, n=name: f"{case.name}, {n}, after a step: {m}",
        )  # fmt: skip
        assert not torch.equal(got.flatten(1), wanted), f"{case.name}, {name}: nothing was learned"


def train(contender: Contender, turn: int, upstream: Tensor, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of a training step: of its lookup, which prepares a backward, and of all of it."""
    value, forward = timed(lambda: contender.forward(turn), clock)

    def rest() -> None:
        value.backward(upstream.view(value.shape))
        if contender.step is not None:
            contender.step()

    return {"forward": forward, "step": forward + timed(rest, clock)[1]}


def run(
    case: Case, sizes: tuple[int, ...], rounds: int, skip: set[str], cpu_time: bool = False
) -> list[dict[str, Any]]:
    """One row per batch size, contender and phase."""
    ids = [i for batch in sizes for i in batches(case.sizes, batch, BATCHES)]
    native, contenders = build(case, ids, skip)
    upstreams = [torch.randn(n, FIELDS * case.dim, generator=torch.Generator().manual_seed(0)) * 1e-2 for n in sizes]
    verify(case, native, contenders, ids[0], upstreams[0])
    floor = floor_of(native, ids)
    clock = time.process_time if cpu_time else time.perf_counter
    rows = []
    for i, (batch, upstream) in enumerate(zip(sizes, upstreams, strict=True)):
        times = take_turns(contenders, floor, range(i * BATCHES, (i + 1) * BATCHES), upstream, rounds, clock)
        times = {key: [t * 1e9 / (batch * FIELDS) for t in values] for key, values in times.items()}
        about = {
            "case": case.name,
            "dim": case.dim,
            "batch": batch,
            "rows": sum(t.rows for t in native.tables.values()),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2),
        } | ({"clock": "cpu"} if cpu_time else {})
        for (name, phase), values in times.items():
            over = times["native", phase] if name != "native" else times["floor", "lookup"]
            row = {**about, "contender": name, "phase": phase, "unit": "ns per id"}
            rows.append(row | summary(values, over))
    return rows


def take_turns(
    contenders: dict[str, Contender],
    floor: Callable[[int], None],
    which: range,
    upstream: Tensor,
    rounds: int,
    clock: Callable[[], float],
) -> dict[tuple[str, str], list[float]]:
    """Seconds by contender and phase, in each round; ``which`` are the numbers of the batches."""
    times: dict[tuple[str, str], list[float]] = {}
    units = [("floor", "lookup"), *((n, "lookup") for n in contenders)]
    units += [(n, "train") for n, c in contenders.items() if c.trains]
    gc.disable()
    for turn in range(rounds + WARMUP):
        k = which[turn % len(which)]
        found: dict[tuple[str, str], float] = {}
        # Each turn another one is first: whoever follows a slow one meets a cold cache.
        for name, phase in [*units[turn % len(units) :], *units[: turn % len(units)]]:
            if phase == "train":
                found |= {(name, p): t for p, t in train(contenders[name], k, upstream, clock).items()}
                continue
            call = floor if name == "floor" else contenders[name].forward
            with torch.no_grad():
                found[name, phase] = timed(lambda call=call, k=k: call(k), clock)[1]
        if turn >= WARMUP:
            for key, seconds in found.items():
                times.setdefault(key, []).append(seconds)
    gc.enable()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the rows, one batch size, few rounds")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batches", default="2048,8192,65536")
    parser.add_argument(
        "--cpu-time", action="store_true", help="not the clock's, on a machine busy with other work: 1 thread"
    )
    parser.add_argument("--rounds", type=int, help="turns that count; 11 by default, 5 with --quick")
    parser.add_argument("--cases", default="", help="names of cases, all by default")
    parser.add_argument("--skip", default="", help="names of contenders")
    given = parser.parse_args()
    wanted, skip = set(filter(None, given.cases.split(","))), set(given.skip.split(","))
    cases = [c for c in CASES if not wanted or {c.name, c.method} & wanted]
    if given.quick:
        cases, skip = [replace(c, rows=c.rows // 16) for c in cases], skip | {"compile"}
    rows: list[dict[str, Any]] = []
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        for case in cases:
            sizes = (8192,) if given.quick else tuple(map(int, given.batches.split(",")))
            found = run(case, sizes, given.rounds or (5 if given.quick else 11), skip, given.cpu_time)
            gc.collect()
            rows += found
            for row in found:
                print(row, file=sys.stderr)
    report("kernels", rows)


if __name__ == "__main__":
    main()
