"""What the kernels are meant to reach, and what results files say they do: a table in Markdown.

Run: python benchmarks/targets.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """A bound on the ratios of rows that match, or on another value of theirs.

    Args:
        at_least, at_most: the bound; the row furthest from it counts.
        value: where in a row it stands, keys joined by points.
    """

    what: str
    benchmark: str
    match: dict[str, Any]
    at_least: float | None = None
    at_most: float | None = None
    value: str = "ratio"

    def found(self, rows: list[dict[str, Any]]) -> list[float]:
        mine = [r for r in rows if all(self._fits(r.get(k), v) for k, v in self.match.items())]
        return [value for r in mine if (value := self._value(r)) is not None]

    def _value(self, row: Any) -> float | None:
        for key in self.value.split("."):
            row = row.get(key) if isinstance(row, dict) else None
        return row

    @staticmethod
    def _fits(value: Any, wanted: Any) -> bool:
        return value in wanted if isinstance(wanted, tuple) else value == wanted

    def line(self, rows: list[dict[str, Any]]) -> str:
        found = self.found(rows)
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        if not found:
            return f"| {self.what} | {bound} | not run | |"
        worst = min(found) if self.at_least is not None else max(found)
        met = worst >= self.at_least if self.at_least is not None else worst <= (self.at_most or 0.0)
        spread = f"{worst:.2f} (of {min(found):.2f} to {max(found):.2f})"
        return f"| {self.what} | {bound} | {spread} | {'yes' if met else 'no'} |"


COMPOSED = ("compositional mul", "compositional sum", "compositional concat", "multihash", "unified", "robe")
LOOKUPS = ("tbe", "index_tbe", "torch", "compile")
WIDE = (64, 128, 256, 512, 1024)
OTHERS = tuple(c for c in COMPOSED if c != "compositional mul")


def _kernels(what: str, **match: Any) -> Target:
    bounds = {k: match.pop(k) for k in ("at_least", "at_most") if k in match}
    return Target(what, "kernels", match, **bounds)


def _both(what: str, against: str, **match: Any) -> list[Target]:
    """Of lookups without gradients, and of those of training steps."""
    names = {"lookup": "lookup", "forward": "forward in training"}
    return [_kernels(f"{what} {name} {against}", phase=phase, **match) for phase, name in names.items()]


TARGETS = (
    _kernels("plain step / TBE, 2 threads", case="full", phase="step", contender="tbe", threads=2, at_least=2.4),
    _kernels("plain step / TBE, 1 thread", case="full", phase="step", contender="tbe", threads=1, at_least=1.8),
    *_both("plain", "over the floor", case="full", contender="native", at_most=1.5),
    _kernels("composed lookup over the floor", case=(*COMPOSED, "hash"), phase="lookup", contender="native", at_most=2),
    _kernels("lookup / the best of all others", phase="lookup", contender=LOOKUPS, at_least=1.5),
    *_both("composed", "/ per table", case=COMPOSED, contender="per_table", at_least=6),
    *_both("composed", "/ vectorised torch", case=COMPOSED, contender="torch", at_least=3),
    *_both("composed", "/ index + TBE", case=COMPOSED, contender="index_tbe", at_least=2),
    _kernels("composed step / per table", case=OTHERS, phase="step", contender="per_table", at_least=8),
    _kernels("product step / per table", case="compositional mul", phase="step", contender="per_table", at_least=5),
    _kernels("composed step / index + TBE", case=COMPOSED, phase="step", contender="index_tbe", at_least=1.5),
    Target(
        "batch 16, microseconds",
        "serving",
        {"phase": "latency", "contender": "native"},
        at_most=50,
        value="time.median",
    ),
    Target("batch 16 / TBE", "serving", {"phase": "latency", "contender": "tbe"}, at_least=10),
    Target("batch 16 / index + TBE", "serving", {"phase": "latency", "contender": "index_tbe"}, at_least=10),
    Target("served rows, FBGEMM's tables / ours", "served", {"contender": "tbe"}, at_least=1.3),
    Target("hash, ns per id", "serving", {"phase": "hash", "contender": "cost"}, at_most=2, value="time.median"),
    Target("DeepFM 1 M, GEMM alone / step", "deepfm", {"case": "deepfm 1 M", "contender": "gemm"}, at_least=0.75),
    Target("DeepFM 30 M / 1 M", "deepfm", {"case": "deepfm 1 M", "contender": "native, 30 M"}, at_most=1.2),
    Target(
        "DeepFM 1 M, FuxiCTR and DeepCTR-Torch / step",
        "deepfm",
        {"case": "deepfm 1 M, peers", "contender": ("fuxictr", "deepctr-torch", "deepctr-torch, no penalty")},
        at_least=2.5,
    ),
    Target(
        "DeepFM 30 M, FuxiCTR and DeepCTR-Torch / step",
        "deepfm",
        {"case": ("deepfm 30 M, fuxictr", "deepfm 30 M, deepctr-torch"), "contender": ("fuxictr", "deepctr-torch")},
        at_least=30,
    ),
    Target("supernet step / plain step, 1 M rows", "supernet_step", {"case": "supernet"}, at_most=1.5),
    Target(
        "GPU forward, share of a copy's bandwidth", "gpu", {"row_bytes": WIDE}, at_least=0.85, value="fraction_of_copy"
    ),
    Target("GPU plain step / TBE", "gpu", {"case": "full"}, at_least=1, value="ratio.step"),
    Target("GPU composed step / index + TBE", "gpu", {"case": COMPOSED}, at_least=2, value="ratio.step"),
)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("results")
    read = [json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))]
    rows: dict[str, list[dict[str, Any]]] = {
        r["benchmark"]: r["rows"] for r in read if isinstance(r, dict) and "rows" in r
    }
    print("| what | target | worst measured | met |\n| --- | --- | --- | --- |")
    for target in TARGETS:
        print(target.line(rows.get(target.benchmark, [])))


if __name__ == "__main__":
    main()
