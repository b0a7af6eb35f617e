"""A picture of results files: how many times as long as this library's native kernels everything else takes.

Run: python benchmarks/plot.py [FOLDER] [--out FILE.png] [--threads N] [--batch N]

Reads kernels.json and, where it is there, deepfm.json. Dots are medians of ratios in the same turns, on a logarithmic
scale; the line at 1 is the native kernels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# The same contender has the same colour and mark in every panel, told apart without colour too.
STYLES = {
    "torch": ("vectorised torch", "#0072b2", "o"),
    "per_table": ("a module per table, torch", "#56b4e9", "s"),
    "compile": ("torch.compile", "#999999", "P"),
    "index_tbe": ("index + FBGEMM TBE", "#d55e00", "D"),
    "tbe": ("FBGEMM TBE", "#e69f00", "^"),
    "fused_ebc": ("torchrec FusedEBC", "#009e73", "X"),
    "floor": ("gather floor", "#000000", "|"),
}
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def panel(axes: Any, rows: list[dict[str, Any]], phase: str) -> None:
    mine = [r for r in rows if r["phase"] == phase and r["contender"] in STYLES]
    labels = list(dict.fromkeys(f"{r['case']}, dim {r['dim']}" for r in rows))
    present = [name for name in STYLES if any(r["contender"] == name for r in mine)]
    for name in present:
        text, colour, mark = STYLES[name]
        # A little above or below the line, so that equal times do not hide each other.
        aside = 0.08 * (present.index(name) - len(present) / 2) if name != "floor" else 0.0
        dots = [
            (r["ratio"], labels.index(f"{r['case']}, dim {r['dim']}") + aside) for r in mine if r["contender"] == name
        ]
        if dots:
            x, y = zip(*dots, strict=True)
            size = 120 if mark == "|" else 42
            axes.scatter(
                x, y, s=size, color=colour, marker=mark, label=text, zorder=3, linewidths=1.5 if mark == "|" else 0
            )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_title(
        {"lookup": "lookup, no gradients", "step": "forward, backward and rowwise Adagrad"}[phase],
        fontsize=10,
        loc="left",
    )
    scale(axes, [r["ratio"] for r in mine])


def scale(axes: Any, ratios: list[float]) -> None:
    axes.set_xscale("log")
    low, high = min([*ratios, 1.0]) / 1.4, max([*ratios, 1.0]) * 1.4
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([s for s in STEPS if low <= s <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def training(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Whole steps of a model: bars."""
    shown = [r for r in rows if r["contender"] != "native"]
    labels = [f"{r['case'].split(',')[0]}: {r['contender']}" for r in shown]
    bars = axes.barh(range(len(shown)), [r["ratio"] - 1 for r in shown], left=1.0, color="#88aacc", height=0.6)
    axes.bar_label(bars, [f"{r['ratio']:.2g}x" for r in shown], padding=3, fontsize=8)
    axes.set_yticks(range(len(shown)), labels)
    axes.invert_yaxis()
    axes.set_title("DeepFM training step, against ours of as many rows", fontsize=10, loc="left")
    scale(axes, [r["ratio"] for r in shown])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, help="by default the most that were measured")
    parser.add_argument("--batch", type=int, help="by default the largest that was measured")
    given = parser.parse_args()
    read = json.loads((given.folder / "kernels.json").read_text())
    threads = given.threads or max(r["threads"] for r in read["rows"])
    batch = given.batch or max(r["batch"] for r in read["rows"])
    rows = [r for r in read["rows"] if (r["threads"], r["batch"]) == (threads, batch)]
    if not rows:
        raise SystemExit(f"no rows of {threads} threads and batch {batch} in {given.folder / 'kernels.json'}")
    deepfm = given.folder / "deepfm.json"
    steps = json.loads(deepfm.read_text())["rows"] if deepfm.exists() else []
    cases = len({(r["case"], r["dim"]) for r in rows})
    heights = [cases, 0.55 * len(steps)] if steps else [cases]
    figure = plt.figure(figsize=(11, 1.6 + 0.42 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    panel(left, rows, "lookup")
    panel(right, rows, "step")
    right.tick_params(labelleft=False)
    left.invert_yaxis()
    if steps:
        training(figure.add_subplot(grid[1, :]), steps)
    handles = {t: h for a in (left, right) for h, t in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    about = read["machine"]
    figure.suptitle(
        f"Time over that of the native kernels, batch {batch}, {threads} thread{'s' * (threads > 1)}"
        f" ({about['processor']}, commit {about['commit']})",
        fontsize=11,
    )
    out = given.out or given.folder / "kernels.png"
    figure.savefig(out, dpi=130)
    print(out)


if __name__ == "__main__":
    main()
