"""Users who choose items, as a data set of rows with a history, item features and a group."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional as F

from recsys_embed.data import Batch, RowSource
from recsys_embed.data.list_ids import ListIds
from recsys_embed.features import FeatureSpec, Schema

USERS, ITEMS, GENRES = 40, 30, 5


class Events(RowSource):
    """Most rows hold the item that the user likes best; genres are the item's, ``country`` the user's."""

    num_dense, digest = 1, "events"
    splits: ClassVar[dict[str, int]] = {"train": 1500, "valid": 200, "test": 200}

    def __init__(self, *, labels: bool = True, group: bool = True, memory_limit: int = 1 << 30) -> None:
        self.labels, self.group, self.memory_limit = labels, group, memory_limit

    @property
    def num_lists(self) -> int:
        return 2

    def schema(self, embedding_dim: int) -> Schema:
        return Schema(
            [
                FeatureSpec("user", USERS, embedding_dim),
                FeatureSpec("item", ITEMS, embedding_dim, table="item"),
                FeatureSpec("year", 6, embedding_dim),
                FeatureSpec("country", 4, embedding_dim),
                FeatureSpec("genres", GENRES, embedding_dim, pooling="mean"),
                FeatureSpec("history", ITEMS, embedding_dim, pooling="mean", table="item"),
            ]
        )

    def read(self, split: str, start: int, stop: int) -> Batch:
        whole = torch.Generator().manual_seed(sorted(self.splits).index(split))
        rows = self.splits[split]
        user, noise, past = (torch.randint(0, n, (rows,), generator=whole) for n in (USERS, ITEMS, ITEMS))
        item = torch.where(torch.rand(rows, generator=whole) < 0.7, user * 7 % (ITEMS - 3), noise)
        label = (torch.rand(rows, generator=whole) < 0.8).float()
        dense = torch.randn(rows, 1, generator=whole)
        single = torch.stack([user, item, item % 6, user % 4], 1)[start:stop].int()
        item, past, user = item[start:stop], past[start:stop], user[start:stop]
        genres = torch.stack([item % GENRES, (item + 1) % GENRES], 1)
        keep = torch.stack([torch.ones_like(item), item % 2], 1).bool()
        count = len(item)
        lists = ListIds.of(
            [
                (genres[keep].int(), F.pad(keep.sum(1).cumsum(0), (1, 0))),
                (past.int(), torch.arange(count + 1)),
            ]
        )
        labels = label[start:stop] if self.labels else torch.full((count,), float("nan"))
        return Batch(dense[start:stop], single, labels, {"group": user + 1000} if self.group else {}, lists)


ARGS = {
    "hidden": [16],
    "output_dim": 8,
    "item_features": ["year", "genres"],
    "item_lists": {"genres": 2},
}
