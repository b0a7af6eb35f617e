"""What every conversion has: a report, a target folder that holds nothing else, an earlier run it recognises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from recsys_embed.data.folder import OUR_FILES, SCHEMA_FILE, WORK_DIR
from recsys_embed.data.manifest import read_manifest
from recsys_embed.errors import ConfigError
from recsys_embed.utils.files import final_name
from recsys_embed.utils.types import JSON

OnBadRow = Literal["fail", "quarantine"]
Progress = Callable[[str, float, float, int], None]
"""Called as ``progress(stage, done, total, rows)``; stages are make (synthetic), read, number, write."""
PROCESS = (400 if torch.version.cuda is None else 800) << 20
"""Memory of the process itself: interpreter, numpy, polars, and torch, whose CUDA builds take 290 to 490 MB more."""
MIN_MEMORY = PROCESS + (112 << 20)
SHOWN_FAULTS = 5
"""Bad rows that an error tells."""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did: rows per split and quarantined, and whether the folder had been complete already."""

    out: Path
    rows: dict[str, int]
    quarantined: int
    already_done: bool
    notices: tuple[str, ...] = ()


def no_progress(stage: str, done: float, total: float, rows: int) -> None:
    """No progress display."""


def check_target(out: Path) -> None:
    """Refuse a folder that holds something else.

    Raises:
        ConfigError: ``out`` is a file, or a folder of other files.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; the output must be a folder")
    if out.is_dir() and not (out / SCHEMA_FILE).exists() and not (out / WORK_DIR).exists():
        foreign = sorted(p.name for p in out.iterdir() if final_name(p.name).removesuffix(".tmp") not in OUR_FILES)
        if foreign:
            raise ConfigError(
                f"{out} is not empty and holds no data set (it has {', '.join(foreign[:3])}); choose a new folder"
            )


def finished(out: Path, record: dict[str, Any], overwrite: bool) -> ConvertReport | None:
    """The report of an earlier, identical conversion, or None if there is work to do.

    Raises:
        ConfigError: the folder holds another data set.
    """
    if overwrite or not (out / SCHEMA_FILE).exists():
        return None
    manifest = read_manifest(out)
    changed = different(dict(manifest.made_from), record)
    if changed:
        lines = "\n".join(f"  - {c}" for c in changed)
        raise ConfigError(
            f"{out} holds a data set made with other settings or inputs:\n{lines}\n"
            "choose another folder, or pass --overwrite to replace it"
        )
    rows = {name: split.rows for name, split in manifest.splits.items()}
    return ConvertReport(out, rows, manifest.quarantined, True)


def different(a: JSON, b: JSON, prefix: str = "") -> list[str]:
    """Settings in which two records differ, as ``name: old -> new``.

    >>> different({"ids": "raw", "s": {"seed": 1}}, {"ids": "raw", "s": {"seed": 2}})
    ['s.seed: 1 -> 2']
    >>> different({"columns": [{"name": "user"}]}, {"columns": [{"name": "user", "min_count": 5}]})
    ['columns.user.min_count: None -> 5']
    """
    out: list[str] = []
    for key in sorted({*a, *b}):
        x, y = _by_name(a.get(key), b.get(key))
        if isinstance(x, dict) and isinstance(y, dict):
            out += different(x, y, f"{prefix}{key}.")
        elif x != y:
            out.append(f"{prefix}{key}: {x!s:.200} -> {y!s:.200}")
    return out


def _by_name(a: Any, b: Any) -> tuple[Any, Any]:
    """Two lists of named entries in one order as dicts, to compare entries of one name; others as given."""
    if not all(isinstance(v, list) and all(isinstance(e, dict) and "name" in e for e in v) for v in (a, b)):
        return a, b
    x, y = ({e["name"]: e for e in v} for v in (a, b))
    if len(x) < len(a) or len(y) < len(b) or [n for n in x if n in y] != [n for n in y if n in x]:
        return a, b
    return x, y
