"""Rows of benchmarks that train for long: each is kept as a file, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recsys_embed.utils.files import write_json

Row = dict[str, Any]


def resumed_row(folder: Path, name: str, facts: Mapping[str, Any], run: Callable[[], Row], metric: str = "auc") -> Row:
    """The row ``name`` of a folder, made by ``run`` where it is not there yet, with the seconds that this took.

    Args:
        facts: what the row is, kept beside what ``run`` measures.
        metric: of the test part, which is printed.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        begin = time.perf_counter()
        row = {**facts, **run()}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**row, "seconds": time.perf_counter() - begin})
    row = json.loads(path.read_text())
    told = f"{row['test'][metric]:.4f}" if "test" in row else "infeasible"
    print(name, told, row.get("bytes", ""), f"{row['seconds']:.0f} s", flush=True)
    return row


def gains(rows: Sequence[Row], full: Mapping[Any, Row], metric: str = "auc") -> tuple[float, str]:
    """Mean gain of the test metric against full tables of the same model and seed, and its standard deviation in words.

    Args:
        full: rows of full tables by model and seed.
    """
    found = [r["test"][metric] - full[r["model"], r["seed"]]["test"][metric] for r in rows]
    spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return statistics.mean(found), spread
