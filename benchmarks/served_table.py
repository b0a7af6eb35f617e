"""The page of `bench_served.py`: time of FBGEMM's inference tables over ours, by batch, width, precision and threads.

Run: python benchmarks/served_table.py [RESULTS] > docs/served_rows.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = """# Served rows beside FBGEMM's inference tables

Time of a lookup by FBGEMM's `IntNBitTableBatchedEmbeddingBagsCodegen` over that by a loaded file (`load(path)`): the
median of the ratios of calls in turns, in one process. 26 tables of Criteo's sizes, cut to about 700 MB at int8 ({rows}
M rows at widths 8 and 16), Zipf ids; bags are sums of 0 to 40 ids, 20 on average. FBGEMM gets its ids by feature,
as int32, and its tables as it allocates them, on pages of 4 KiB; in brackets, tables put on huge pages for it.
Both write float32. `load` maps the file, which the file cache held on huge pages.

{machine}. {load} [All rows](../benchmarks/results/served.json); `make bench BENCH=served`.
"""


def print_avx2(path: Path) -> None:
    """One paragraph of spot checks with our kernels held to AVX2."""
    if not path.exists():
        return
    rows = json.loads(path.read_text())["rows"]
    theirs = [r for r in rows if r["contender"] == "tbe"]
    low = [r for r in theirs if r["ratio"] < 1.3]
    ratios, loads = sorted(r["ratio"] for r in theirs), sorted(r["load"] for r in rows)
    middle = ratios[len(ratios) // 2]
    print(
        f"With our kernels held to AVX2 (`RECSYS_EMBED_CPU=avx2`), FBGEMM's not, {len(theirs)} cases had ratios of "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {middle:.2f}, at loads of {loads[0]:.1f} to {loads[-1]:.1f} "
        f"([rows](../benchmarks/results/{path.name}))."
    )
    below = []
    for r in low:
        threads = f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}"
        below.append(f"{r['case']}, width {r['dim']}, batch {r['batch']}, {threads}: {r['ratio']:.2f}")
    print(f"Below 1.3: {'; '.join(below) or 'none'}.\n")


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("results") / "served.json"
    read = json.loads(path.read_text())
    rows: list[dict[str, Any]] = read["rows"]
    found = {(r["case"], r["dim"], r["batch"], r["threads"], r["contender"]): r["ratio"] for r in rows}
    most = max(r["rows"] for r in rows) // 1_000_000
    loads = sorted(r["load"] for r in rows)
    said = f"The machine was busy with other work: load averages of {loads[0]:.1f} to {loads[-1]:.1f} on its two cores."
    about = read["machine"]
    machine = f"{about['processor']} (AVX-512), {about['cores']} cores, torch {about['torch']}"
    print(HEAD.format(rows=most, machine=machine, load=said))
    print_avx2(path.with_name("served_avx2.json"))
    batches = sorted({r["batch"] for r in rows})
    for threads in sorted({r["threads"] for r in rows}):
        mine = [r for r in rows if r["threads"] == threads]
        print(f"## {threads} thread{'s' if threads > 1 else ''}\n")
        print("| ids | precision | width | " + " | ".join(f"batch {b}" for b in batches) + " |")
        print("| --- " * (3 + len(batches)) + "|")
        for case, dim in sorted({(r["case"], r["dim"]) for r in mine}, key=lambda k: (k[0].split()[::-1], k[1])):
            cells = []
            for batch in batches:
                plain, huge = (found.get((case, dim, batch, threads, n)) for n in ("tbe", "tbe huge"))
                cells.append("" if plain is None else f"{plain:.2f}" + ("" if huge is None else f" ({huge:.2f})"))
            print("| " + " | ".join([*case.split(), str(dim), *cells]) + " |")
        print()
    print(
        "## Other ways to load, time over that of `load`\n\n| ids | precision | width | read | compiled |\n| --- "
        + "| --- " * 4
        + "|"
    )
    for case, dim in sorted({(r["case"], r["dim"]) for r in rows}, key=lambda k: (k[0].split()[::-1], k[1])):
        others = [found.get((case, dim, 8192, 1, name)) for name in ("read", "compiled")]
        print("| " + " | ".join([*case.split(), str(dim), *("" if o is None else f"{o:.2f}" for o in others)]) + " |")


if __name__ == "__main__":
    main()
