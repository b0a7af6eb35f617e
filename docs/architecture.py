"""Draws docs/architecture.svg: python docs/architecture.py"""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

STAGES = [
    ("ids", "one feature's column,\nsingle or in bags"),
    ("transforms", "identity, hash, digits,\nrank in an id set"),
    ("gather", "rows of a few\nphysical tables"),
    ("combine", "scale, sign, weight;\nsum, product, concat"),
    ("head", "projection, contraction,\nnetwork per class"),
    ("pool", "sum, mean or max\nof a bag"),
]
READERS = [
    ("kernels", "run it: torch, native CPU,\nTriton; fused updates"),
    ("report", "bytes by arithmetic,\nids that share rows"),
    ("planning", "loss estimate and size,\nnothing is built"),
    ("sharding", "its tables become\nTorchRec's"),
    ("exports", "rows kept, quantised,\nwritten to one file"),
    ("compress", "fitted to a\ntrained table"),
]
INK, STAGE, READER, KERNEL = "#1f2933", "#dbeafe", "#f3f4f6", "#bfdbfe"
WIDTH, HEIGHT, GAP = 1.75, 0.95, 0.35


def box(ax: plt.Axes, x: float, y: float, title: str, text: str, color: str) -> None:
    """A box with a name and what it stands for."""
    shape = FancyBboxPatch(
        (x, y), WIDTH, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.08", fc=color, ec=INK, lw=0.9
    )
    ax.add_patch(shape)
    ax.text(x + WIDTH / 2, y + HEIGHT - 0.2, title, ha="center", va="center", fontsize=10, weight="bold", color=INK)
    ax.text(x + WIDTH / 2, y + HEIGHT / 2 - 0.16, text, ha="center", va="center", fontsize=7.2, color=INK)


def main() -> None:
    """Writes the picture beside this file."""
    plt.rcParams["svg.fonttype"], plt.rcParams["svg.hashsalt"] = "none", "architecture"
    plt.rcParams["font.family"] = "sans-serif"
    fig, ax = plt.subplots(figsize=(12.4, 4.3))
    step = WIDTH + GAP
    for i, (title, text) in enumerate(STAGES):
        box(ax, i * step, 2.6, title, text, KERNEL if title in ("transforms", "gather", "combine") else STAGE)
        if i:
            ax.annotate(
                "",
                (i * step - 0.03, 3.08),
                (i * step - GAP + 0.03, 3.08),
                arrowprops={"arrowstyle": "->", "color": INK},
            )
    left, right = step - 0.12, 4 * step - GAP + 0.12
    ax.plot([left, left, right, right], [3.72, 3.85, 3.85, 3.72], color=INK, lw=0.9)
    ax.text(
        (left + right) / 2,
        3.98,
        "what kernels run, and shards hold, for all features in one call",
        ha="center",
        fontsize=8.5,
    )
    middle = (len(STAGES) * step - GAP) / 2
    ax.text(
        middle,
        2.17,
        "LookupProgram: the description of all this as frozen data",
        ha="center",
        fontsize=9.5,
        weight="bold",
    )
    for i, (title, text) in enumerate(READERS):
        x = i * step + WIDTH / 2
        ax.annotate(
            "",
            (x, 1.12),
            (middle + (x - middle) * 0.62, 2.06),
            arrowprops={"arrowstyle": "->", "color": "#6b7280", "lw": 0.8},
        )
        box(ax, i * step, 0.1, title, text, READER)
    ax.set_xlim(-0.15, len(STAGES) * step - GAP + 0.15)
    ax.set_ylim(0, 4.25)
    ax.set_aspect("equal")
    ax.axis("off")
    fig.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
