"""Plot of quality against bytes for a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recsys_embed.report.figures import save_figure
from recsys_embed.train.compare import Summary
from recsys_embed.utils.optional import require


def pareto_front(points: Sequence[tuple[float, float]], slack: float = 0.01) -> list[int]:
    """Indices of points ``(bytes, auc)`` on the Pareto front, by rising bytes.

    A point is dominated by one with higher AUC and at most ``1 + slack`` times its bytes: sizes for one budget
    differ by a row or two, which must not decide.

    >>> pareto_front([(10, 0.7), (5, 0.6), (20, 0.65), (4.99, 0.5)])
    [1, 0]
    """
    kept = [
        i for i, (size, auc) in enumerate(points) if not any(b > auc and s <= size * (1 + slack) for s, b in points)
    ]
    return sorted(kept, key=lambda i: points[i])


def _quality(s: Summary) -> tuple[float | None, float | None, str]:
    """What a line is drawn by, its standard deviation, and its name."""
    name = next((name for name in s.ranking if name.startswith("ndcg")), None)
    if "rmse" in s.ranking:
        return -s.ranking["rmse"], s.ranking_sd.get("rmse"), "negative test RMSE"
    if name is None:
        return s.auc, s.auc_sd, "test AUC"
    return s.ranking[name], s.ranking_sd.get(name), f"test {name.upper()}"


def plot_pareto(summaries: Sequence[Summary], path: str | Path) -> Path | None:
    """Draw test AUC over deployed bytes, one panel per model, and save it; None when no row has a result.

    Of retrieval models it is NDCG at the first k, of real labels the negative RMSE.

    Args:
        summaries: lines of a comparison.
        path: file to write; its suffix picks the format (png, svg, pdf).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    good = [s for s in summaries if _quality(s)[0] is not None]
    if not good:
        return None
    require("matplotlib", extra="train", purpose="the Pareto plot").use("Agg")
    plt = require("matplotlib.pyplot", extra="train", purpose="the Pareto plot")
    ticker = require("matplotlib.ticker", extra="train", purpose="the Pareto plot")
    models, methods = list(dict.fromkeys(s.model for s in good)), list(dict.fromkeys(s.method for s in good))
    figure, axes = plt.subplots(1, len(models), figsize=(6.4 * len(models), 4.8), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        mine = [s for s in good if s.model == model]
        points = [(s.footprint.serve / 2**20, _quality(s)[0] or 0.0) for s in mine]
        front = [points[i] for i in pareto_front(points)]
        axis.plot(
            *zip(*front, strict=True), color="0.75", linestyle="--", linewidth=1, zorder=0, label="best at its bytes"
        )
        for s, (x, y) in zip(mine, points, strict=True):
            look = methods.index(s.method)
            axis.errorbar(
                x, y, yerr=_quality(s)[1], fmt="osD^vPX*"[look % 8], capsize=3, color=f"C{look % 10}", label=s.method
            )
        axis.set(title=model, xscale="log", xlabel="deployed embedding bytes (MiB)", ylabel=_quality(mine[0])[2])
        axis.margins(x=0.12, y=0.12)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3)
        found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.legend(found.values(), found.keys(), fontsize=8)
    path = Path(path)
    save_figure(figure, path)
    plt.close(figure)
    return path
