"""Hours of random programs: ``make fuzz PROGRAMS=10000 JOBS=2 SEED=0``, or ``python -m tests.fuzz --seeds 7 8``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.fuzz.few_bits import draw_few_bits
from tests.fuzz.programs import Program, draw
from tests.fuzz.shrink import explain, failure

CHUNK = 25


def features_of(program: Program) -> list[str]:
    """What the summary counts."""
    made = [f"rule {program.rule or ('none, sparse' if program.sparse else 'none')}"]
    made += [f"method {f.method}" for f in program.features]
    made += [f"rows by {f.options['quantization']}" for f in program.features if "quantization" in f.options]
    return made + [f"form {s.form}" for s in program.steps]


def chunk(seeds: Sequence[int], shrinks: bool = True) -> tuple[Counter[str], list[tuple[int, str, str]]]:
    """Runs some seeds: what they held, and the failures."""
    import torch

    torch.set_num_threads(1)
    seen: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        for program in (draw(seed), draw_few_bits(seed)):
            seen.update(features_of(program))
            found = failure(program)
            if found is not None:
                failures.append((seed, found[0], (explain(program) or found[1]) if shrinks else found[1]))
    return seen, failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, nargs="*", help="these seeds alone")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--most", type=int, default=20, help="failures after which to stop")
    parser.add_argument("--no-shrink", action="store_true", help="leave failing programs as they are")
    args = parser.parse_args(argv)
    seeds = args.seeds or range(args.seed, args.seed + args.programs)
    chunks = [list(seeds[i : i + CHUNK]) for i in range(0, len(seeds), CHUNK)]
    begin, done, last = time.monotonic(), 0, 0.0
    total: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    work = partial(chunk, shrinks=not args.no_shrink)
    with ProcessPoolExecutor(args.jobs) as pool:
        for part, (seen, failures) in zip(
            chunks, map(work, chunks) if args.jobs == 1 else pool.map(work, chunks), strict=True
        ):
            done += len(part)
            total.update(seen)
            for seed, kind, text in failures:
                kinds[kind] += 1
                print(f"--- seed {seed}\n{text}", flush=True)
            if time.monotonic() - last > 30:
                last = time.monotonic()
                print(
                    f"[{done}/{len(seeds)}] {done / (last - begin):.1f} programs/s, {kinds.total()} failures",
                    flush=True,
                )
            if kinds.total() >= args.most:
                pool.shutdown(cancel_futures=True)
                break
    print(f"\n{done} programs of seeds {seeds[0]} to {seeds[done - 1]} in {time.monotonic() - begin:.0f} s")
    for name, count in sorted(total.items()):
        print(f"  {name}: {count}")
    print(f"failures: {kinds.total()}")
    for kind, count in kinds.most_common():
        print(f"  {count} x {kind}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
