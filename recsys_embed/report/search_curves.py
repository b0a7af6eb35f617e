"""Curves of a search: validation metric of each stage, and the scores of each generation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recsys_embed.report.figures import save_figure
from recsys_embed.utils.optional import require


def plot_curves(curves: Mapping[str, Any], path: str | Path) -> Path | None:
    """Plot the ``curves.json`` of a search and save the figure; None where it has no curves.

    Args:
        curves: by stage, a list of validations with ``step`` and ``auc`` (``rmse`` of real
            labels, ``ndcg@k`` of retrieval models); for ``evolution``, ``scores`` of all
            candidates and where each generation ``ends`` among them.
        path: file to write; its suffix picks the format (png, svg, pdf).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    stages = {name: found for name, found in curves.items() if found and (name != "evolution" or found["scores"])}
    if not stages:
        return None
    require("matplotlib", extra="train", purpose="the curves of a search").use("Agg")
    plt = require("matplotlib.pyplot", extra="train", purpose="the curves of a search")
    figure, axes = plt.subplots(1, len(stages), figsize=(4.8 * len(stages), 3.6), squeeze=False, layout="constrained")
    for axis, (name, found) in zip(axes[0], stages.items(), strict=True):
        if name == "evolution":
            _generations(axis, found["scores"], found["ends"])
        else:
            key = _quality(found[0])
            axis.plot([h["step"] for h in found], [h[key] for h in found], marker="o", markersize=3)
            axis.set(xlabel="step", ylabel=f"validation {key.upper()}")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(name)
        axis.grid(alpha=0.3)
    path = Path(path)
    save_figure(figure, path)
    plt.close(figure)
    return path


def _quality(validation: Mapping[str, float]) -> str:
    """The key that validations are compared by."""
    return next((k for k in validation if k.startswith("ndcg@") or k == "rmse"), "auc")


def _generations(axis: Any, scores: list[float], ends: list[int]) -> None:
    """Every candidate as a dot over its generation, and the best so far."""
    numbers, best, top, start = [], [], float("-inf"), 0
    for number, end in enumerate(ends, 1):
        numbers += [number] * (end - start)
        top = max([top, *scores[start:end]])
        best.append(top)
        start = end
    axis.scatter(numbers, scores[: len(numbers)], s=6, alpha=0.5, label="candidates")
    axis.plot(range(1, len(ends) + 1), best, color="C1", label="best so far")
    axis.set(xlabel="generation", ylabel="score")
    axis.legend(fontsize=8)
