"""Plot of a study: every trial, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recsys_embed.report.figures import save_figure
from recsys_embed.train.quality import AUC, Quality
from recsys_embed.utils.optional import require


def front_of(rows: Sequence[Mapping[str, Any]], quality: Quality = AUC) -> list[Mapping[str, Any]]:
    """Complete trials on the Pareto front of quality and bytes (and latency, where measured), by rising bytes.

    >>> front_of([{"state": "complete", "auc": 0.6, "bytes": 9}, {"state": "complete", "auc": 0.7, "bytes": 5}])
    [{'state': 'complete', 'auc': 0.7, 'bytes': 5}]
    """
    done = [r for r in rows if r["state"] == "complete"]
    # Keyed by costs: the same plan may have been tried twice.
    costs = {(r["bytes"], -quality.score(r[quality.key]), r.get("latency", 0.0)): r for r in reversed(done)}
    beaten = {c for c in costs if any(o != c and all(a <= b for a, b in zip(o, c, strict=True)) for o in costs)}
    return [costs[c] for c in sorted(costs) if c not in beaten]


def plot_front(
    rows: Sequence[Mapping[str, Any]], path: str | Path, budgets: Mapping[str, int], quality: Quality = AUC
) -> Path | None:
    """Draw the validation quality over deployed bytes; None when no trial is complete.

    Args:
        rows: of a study, see :func:`recsys_embed.search.studies.results.rows_of`.
        path: file to write; its suffix picks the format.
        budgets: bytes by text, drawn as vertical lines.
        quality: what trials are compared by.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    done = [r for r in rows if r["state"] == "complete"]
    if not done:
        return None
    require("matplotlib", extra="train", purpose="the picture of a study").use("Agg")
    plt = require("matplotlib.pyplot", extra="train", purpose="the picture of a study")
    ticker = require("matplotlib.ticker", extra="train", purpose="the picture of a study")
    figure, axis = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    # The largest group of fields holds nearly all bytes, so trials are coloured by its method.
    last = [k for k in done[0]["params"] if k.endswith(".method")][-1]
    methods = sorted({r["params"][last] for r in done})
    for i, method in enumerate(methods):
        mine = [r for r in done if r["params"][last] == method]
        axis.plot(
            [r["bytes"] / 2**10 for r in mine], [r[quality.key] for r in mine], "osD^vPX*"[i % 8], color=f"C{i % 10}",
            markersize=5, alpha=0.8, label=method,
        )  # fmt: skip
    front = front_of([{k: r[k] for k in ("state", quality.key, "bytes")} for r in done], quality)
    axis.step(
        [r["bytes"] / 2**10 for r in front], [r[quality.key] for r in front], where="post", color="0.4", linestyle="--",
        linewidth=1, zorder=0, label="front",
    )  # fmt: skip
    for text, size in budgets.items():
        axis.axvline(size / 2**10, color="0.8", linewidth=1, zorder=0)
        axis.annotate(
            text, (size / 2**10, 1.0), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=8,
            xytext=(-2, -2), textcoords="offset points", color="0.4",
        )  # fmt: skip
    axis.set(xscale="log", xlabel="deployed embedding bytes (KiB)", ylabel=f"validation {quality.label}")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.margins(x=0.08, y=0.12)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title=f"{last.removesuffix('.method')} fields", title_fontsize=8, loc="center left",
                bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    path = Path(path)
    save_figure(figure, path)
    plt.close(figure)
    return path
