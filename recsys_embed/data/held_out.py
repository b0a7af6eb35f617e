"""Training rows held out: a split of their own, for what must be fitted on rows that the weights have not seen."""

from __future__ import annotations

from dataclasses import dataclass

from recsys_embed.data.batch import InMemoryDataset
from recsys_embed.data.loader import Dataset
from recsys_embed.data.manifest import Shard
from recsys_embed.data.portion import between
from recsys_embed.errors import ConfigError

SPLIT = "held_out"


@dataclass
class HeldOut(Dataset):
    """A data set whose last training rows, in file order, are the split ``held_out`` and no part of ``train``.

    ``stats`` and ``digest`` are those of the whole, as are numeric moments of ``train`` taken before.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ConfigError(f"`share` must lie between 0 and 1; got {self.share}")

    @classmethod
    def of(cls, data: Dataset, share: float) -> HeldOut:
        """``data`` with ``share`` of its training rows held out; rows it has in memory are not copied."""
        if type(data) is not Dataset:
            raise ConfigError(f"rows are held out of a whole data folder, not of a portion; got {type(data).__name__}")
        found = cls(data.path, data.manifest, data.memory_limit, share)
        if "train" in data._loaded:
            whole, cut = data._loaded["train"], found._cut
            for split, rows in (("train", slice(cut)), (SPLIT, slice(cut, None))):
                found._loaded[split] = InMemoryDataset(whole.dense[rows], whole.ids[rows], whole.label[rows])
        return found

    @property
    def _cut(self) -> int:
        """First row held out."""
        total = super().rows("train")
        return total - round(self.share * total)

    @property
    def splits(self) -> dict[str, int]:
        return {**super().splits, "train": self.rows("train"), SPLIT: self.rows(SPLIT)}

    def rows(self, split: str) -> int:
        if split == "train":
            return self._cut
        return super().rows("train") - self._cut if split == SPLIT else super().rows(split)

    def _chunks(self, split: str) -> list[tuple[Shard, int, int]]:
        if split not in ("train", SPLIT):
            return super()._chunks(split)
        start, stop = (0, self._cut) if split == "train" else (self._cut, super().rows("train"))
        return between(super()._chunks("train"), start, stop)
