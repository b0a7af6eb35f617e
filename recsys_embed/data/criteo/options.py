"""Settings of a conversion, checked together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recsys_embed.data.conversion import MIN_MEMORY, OnBadRow
from recsys_embed.data.criteo.transform import Dense
from recsys_embed.data.splits import SplitRule
from recsys_embed.data.text_blocks import Tri
from recsys_embed.utils.settings import Settings, param
from recsys_embed.utils.types import JSON

IdMode = Literal["vocab", "raw"]
Separator = Literal["tab", "comma", "semicolon", "pipe"]
SEPARATORS: dict[Separator, str] = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}


@dataclass(frozen=True)
class CriteoOptions(Settings):
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

    title = "the options of `data criteo`"
    ids: IdMode = "vocab"
    min_count: int = param(2, low=1)
    id_bits: Literal[32, 64] = 32
    dense: Dense = "log"
    split: SplitRule = field(default_factory=SplitRule)
    header: Tri = "auto"
    labels: Tri = "auto"
    separator: Separator = "tab"
    on_bad_row: OnBadRow = "fail"
    max_memory: int = param(1 << 30, low=MIN_MEMORY)
    workers: int = param(0, low=0)
    like: Path | None = None

    @property
    def content(self) -> JSON:
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
