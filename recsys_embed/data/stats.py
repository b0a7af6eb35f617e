"""Statistics of a data folder (``stats.json``), and their table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recsys_embed.data.folder import STATS_FILE
from recsys_embed.errors import DataError
from recsys_embed.utils.strict_json import own_json


def read_stats(folder: str | Path) -> dict[str, Any]:
    """Content of ``stats.json``: ``splits``, ``quarantined``, ``file_faults`` and per-field ``fields``.

    Raises:
        DataError: missing or damaged.
    """
    path = Path(folder) / STATS_FILE
    try:
        stats: dict[str, Any] = own_json(path.read_text(encoding="utf-8"))
        if not isinstance(stats["fields"], dict) or not isinstance(stats["splits"], dict):
            raise TypeError("`fields` and `splits` are no objects")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path}: cannot be read as statistics ({e!r}); convert the data again") from e
    return stats


def stats_table(stats: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table `data stats` prints, one row per field.

    Rates are of training rows unless the column names another split.
    """
    splits = list(stats["splits"])
    has_oov = any("oov_rate" in f for f in stats["fields"].values())
    ks = ["1", "10", "100", "1000", "10000"]
    header = ["field", "distinct", "seen once", "table rows", "missing %"]
    header += [f"unknown % {s}" for s in splits] if has_oov else []
    header += [f"top {k} %" for k in ks]
    rows = []
    for name, f in stats["fields"].items():
        about = "~" if f["estimated"] else ""
        first = f["missing_rate"].get("train", next(iter(f["missing_rate"].values()), 0.0))
        row = [name, f"{about}{f['distinct']:,}", f"{about}{f['seen_once']:,}", f"{f['num_embeddings']:,}"]
        row.append(f"{100 * first:.1f}")
        if has_oov:
            row += [f"{100 * f['oov_rate'][s]:.2f}" if s in f.get("oov_rate", {}) else "-" for s in splits]
        coverage = f.get("coverage", {})
        rows.append(row + [f"{100 * coverage[k]:.1f}" if k in coverage else "" for k in ks])
    return header, rows
