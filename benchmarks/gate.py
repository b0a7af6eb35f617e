"""Whether this library became slower, beside the same contenders, than a results file says it was.

Run: python benchmarks/gate.py MEASURED [--against benchmarks/results]

Both folders hold files of the benchmarks; rows of equal case, sizes, threads, phase and contender are compared by their
ratios, since times of another day or machine say little. A contender may have lost ground to ``native`` or gained some;
it is what it gained that fails: 15 % in the geometric mean over the cases of one contender and phase (30 % where they
are one or two), or 50 % in a single row. Rows of one side alone are counted and passed over; no common row at all fails
too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

MEAN_MARGIN, FEW_MARGIN, ROW_MARGIN = 1.15, 1.3, 1.5
KEY = ("case", "dim", "batch", "rows", "threads", "phase", "contender")
# What this library should not take longer for; all others are held against it the other way round.
OURS = ("native", "native,", "adam")


def rows_of(folder: Path) -> dict[tuple[Any, ...], float]:
    """Ratio of every row that has one, by benchmark and key."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        read = json.loads(file.read_text())
        for row in read.get("rows", []) if isinstance(read, dict) else []:
            # The floor's ratio is that of `native` the other way round; the cost of hashing is a small difference.
            if row.get("ratio") and row.get("contender") not in (None, "cost", "floor"):
                found[read["benchmark"], *(row.get(k) for k in KEY)] = row["ratio"]
    return found


def loss(key: tuple[Any, ...], before: float, now: float) -> float:
    """By what factor this library fell back."""
    return now / before if key[-1].startswith(OURS) else before / now


def compare(before: dict[tuple[Any, ...], float], now: dict[tuple[Any, ...], float]) -> tuple[list[str], list[str]]:
    """Lines that report, and those that fail."""
    common = {key: loss(key, before[key], now[key]) for key in now if key in before}
    groups: dict[tuple[Any, ...], list[float]] = {}
    for key, factor in common.items():
        benchmark, *_, threads, phase, contender = key
        groups.setdefault((benchmark, phase, contender, threads), []).append(factor)
    lines = [f"{len(common)} rows compared; {len(now) - len(common)} are new, {len(before) - len(common)} were not run"]
    failed = [] if common else ["nothing to compare: no row of the same case, sizes and threads"]
    for group, factors in sorted(groups.items(), key=str):
        mean = math.exp(sum(map(math.log, factors)) / len(factors))
        line = f"{' '.join(map(str, group))} threads: {'slower' if mean > 1 else 'faster'} by {abs(mean - 1):.1%}"
        (failed if mean > (MEAN_MARGIN if len(factors) > 2 else FEW_MARGIN) else lines).append(line)
    for key, factor in sorted(common.items(), key=str):
        if factor > ROW_MARGIN:
            was, is_now = before[key], now[key]
            failed.append(f"{' '.join(map(str, key))}: ratio {was} became {is_now}, {factor:.2f} times worse")
    return lines, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--against", type=Path, default=Path(__file__).with_name("results"))
    given = parser.parse_args()
    lines, failed = compare(rows_of(given.against), rows_of(given.measured))
    print("\n".join([*lines, *(f"FAILED {line}" for line in failed)]))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
