"""Settings of a conversion, checked together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from recsys_embed.data.criteo.transform import Dense
from recsys_embed.data.splits import SplitRule
from recsys_embed.data.text_blocks import Tri
from recsys_embed.errors import raise_faults

IdMode = Literal["vocab", "raw"]
OnBadRow = Literal["fail", "quarantine"]
Progress = Callable[[str, float, float, int], None]
"""Called as ``progress(stage, done, total, rows)``; stages are make (synthetic), read, number, write."""
PROCESS = (400 if torch.version.cuda is None else 800) << 20
"""Memory of the process itself: interpreter, numpy, polars, and torch, whose CUDA builds take 290 to 490 MB more."""
MIN_MEMORY = PROCESS + (112 << 20)
SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}


@dataclass(frozen=True)
class CriteoOptions:
    """How Criteo text becomes a data folder.

    Args:
        ids: ``"vocab"``: ids by falling training frequency, 0 for unknown; ``"raw"``: the hashes themselves.
        min_count: rows of the training split a category must occur in to get an id (vocab). The default 2 sends ids
            seen once to the unknown id: one example cannot train a row, and it is what trains the unknown row that
            new ids in validation and test will use. Buckets of integer fields are exempt.
        id_bits: 32 (8 hex digits, as Criteo's) or 64.
        dense: ``"log"`` or ``"bucket"`` (see ``transform.py``).
        split: which rows train, validate, test.
        header, labels: found in each file's first line unless given.
        separator: ``tab``, ``comma``, ``semicolon`` or ``pipe``.
        on_bad_row: ``"fail"`` stops at the first part with a bad row; ``"quarantine"`` sets them aside, counted.
        max_memory: bytes the process should stay under; at least 512 MiB, or 912 MiB beside a CUDA build of torch.
        workers: threads that parse; 0 means one per core, at most 4.
        like: a data folder whose vocabularies and settings are used instead of counting anew.

    >>> CriteoOptions().min_count
    2
    """

    ids: IdMode = "vocab"
    min_count: int = 2
    id_bits: int = 32
    dense: Dense = "log"
    split: SplitRule = field(default_factory=SplitRule)
    header: Tri = "auto"
    labels: Tri = "auto"
    separator: str = "tab"
    on_bad_row: OnBadRow = "fail"
    max_memory: int = 1 << 30
    workers: int = 0
    like: Path | None = None

    def __post_init__(self) -> None:
        faults = []
        choices: dict[str, tuple[Any, ...]] = {
            "ids": get_args(IdMode),
            "id_bits": (32, 64),
            "dense": get_args(Dense),
            "header": get_args(Tri),
            "labels": get_args(Tri),
            "separator": tuple(SEPARATORS),
            "on_bad_row": get_args(OnBadRow),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                known = ", ".join(map(str, allowed))
                faults.append(f"`{key}` must be one of {known}; got {getattr(self, key)!r}")
        for key, low in (("min_count", 1), ("max_memory", MIN_MEMORY), ("workers", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                faults.append(f"`{key}` must be an integer of at least {low}; got {value!r}")
        raise_faults(faults, "the options of `data criteo`")

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide what is written (memory and threads do not), as JSON values."""
        rule = self.split
        return {
            "ids": self.ids,
            "min_count": self.min_count if self.ids == "vocab" else None,
            "id_bits": self.id_bits,
            "dense": self.dense,
            "split": {
                "kind": rule.kind,
                "valid": str(rule.valid) if rule.kind in ("order", "random") else None,
                "test": str(rule.test) if rule.kind in ("order", "random") else None,
                "seed": rule.seed if rule.kind == "random" else None,
                "valid_files": list(rule.valid_files),
                "test_files": list(rule.test_files),
                "only": rule.only if rule.kind == "all" else None,
            },
            "header": self.header,
            "labels": self.labels,
            "separator": self.separator,
            "on_bad_row": self.on_bad_row,
        }


def different(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings in which two records differ, as ``name: old -> new``.

    >>> different({"ids": "raw", "s": {"seed": 1}}, {"ids": "raw", "s": {"seed": 2}})
    ['s.seed: 1 -> 2']
    """
    out: list[str] = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            out += different(x, y, f"{prefix}{key}.")
        elif x != y:
            out.append(f"{prefix}{key}: {x} -> {y}")
    return out
