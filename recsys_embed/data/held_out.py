"""Training rows held out: a split of their own, for what must be fitted on rows that the weights have not seen."""

from __future__ import annotations

import hashlib
from typing import Any

from recsys_embed.data.batch import InMemoryDataset
from recsys_embed.data.loader import Dataset
from recsys_embed.data.manifest import Shard
from recsys_embed.data.portion import between
from recsys_embed.errors import ConfigError, unknown_name

SPLIT = "held_out"


class HeldOut(Dataset):
    """``whole``, whose last training rows, in file order, are the split ``held_out`` and no part of ``train``.

    ``stats`` are those of the whole.
    """

    def __init__(self, whole: Dataset, share: float) -> None:
        if type(whole) is not Dataset:
            raise ConfigError(
                "rows are held out of a data set as open_dataset() gives it, not of a part of one; got "
                f"{type(whole).__name__}"
            )
        if not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ConfigError(f"`share` must lie between 0 and 1; got {share!r}")
        super().__init__(whole.path, whole.manifest, whole.memory_limit)
        self.whole, self.share = whole, share

    @property
    def splits(self) -> dict[str, int]:
        return {**self.whole.splits, "train": self.rows("train"), SPLIT: self.rows(SPLIT)}

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.whole.digest} {self.rows(SPLIT)}".encode()).hexdigest()

    def rows(self, split: str) -> int:
        if split not in ("train", SPLIT):
            return super().rows(split)
        total = self.whole.rows("train")
        out = round(self.share * total)
        return out if split == SPLIT else total - out

    def load(self, split: str) -> InMemoryDataset:
        if split not in ("train", SPLIT):
            return self.whole.load(split)
        if split not in self._loaded and self.whole.fits("train"):
            rows, found = slice(*self._ends(split)), self.whole.load("train")
            self._loaded[split] = InMemoryDataset(found.dense[rows], found.ids[rows], found.label[rows])
        return super().load(split)

    def _ends(self, split: str) -> tuple[int, int]:
        """First row of the whole training split, and the one after the last."""
        cut = self.rows("train")
        return (0, cut) if split == "train" else (cut, self.whole.rows("train"))

    def _chunks(self, split: str) -> list[tuple[Shard, int, int]]:
        if split not in ("train", SPLIT):
            return super()._chunks(split)
        return between(super()._chunks("train"), *self._ends(split))

    def _split(self, name: str) -> Any:
        if name not in self.splits:
            raise unknown_name("split", name, self.splits)
        return super()._split(name)
