"""Plot of quality against bytes for a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recsys_embed._optional import require
from recsys_embed.train.compare import Summary


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points ``(bytes, auc)`` that no other beats in both, by rising bytes.

    >>> pareto_front([(10, 0.7), (5, 0.6), (20, 0.65)])
    [1, 0]
    """
    front, best = [], float("-inf")
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            front.append(i)
    return front


def plot_pareto(summaries: Sequence[Summary], path: str | Path) -> Path | None:
    """Draw test AUC over deployed bytes, one panel per model, and save it; None when no row has a result.

    Args:
        summaries: lines of a comparison.
        path: file to write; its suffix picks the format (png, svg, pdf).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    good = [s for s in summaries if s.auc is not None]
    if not good:
        return None
    require("matplotlib", extra="train", purpose="the Pareto plot").use("Agg")
    plt = require("matplotlib.pyplot", extra="train", purpose="the Pareto plot")
    models, methods = list(dict.fromkeys(s.model for s in good)), list(dict.fromkeys(s.method for s in good))
    figure, axes = plt.subplots(1, len(models), figsize=(6.4 * len(models), 4.8), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        mine = [s for s in good if s.model == model]
        points = [(s.footprint.serve / 2**20, s.auc or 0.0) for s in mine]
        for s, (x, y) in zip(mine, points, strict=True):
            color = f"C{methods.index(s.method) % 10}"
            axis.errorbar(x, y, yerr=s.auc_sd, fmt="o", capsize=3, color=color)
            axis.annotate(f"{s.method} {s.size}".strip(), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        front = [points[i] for i in pareto_front(points)]
        axis.plot([x for x, _ in front], [y for _, y in front], color="0.7", linewidth=1, zorder=0)
        axis.set(title=model, xscale="log", xlabel="deployed embedding bytes (MiB)", ylabel="test AUC")
        axis.grid(alpha=0.3)
    path = Path(path)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
