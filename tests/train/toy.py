"""A small in-memory data set with the methods of an opened one, and settings that suit it."""

from __future__ import annotations

import math
from copy import copy
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from recsys_embed import data
from recsys_embed.data import RowSource
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.train import TrainConfig


class Batch(NamedTuple):
    dense: Tensor
    ids: Tensor
    label: Tensor


class ToyBatches:
    def __init__(self, parts: Batch, order: Tensor, size: int) -> None:
        self.parts, self.order, self.size = parts, order, size

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.size)

    def __iter__(self):
        for start in range(0, len(self.order), self.size):
            rows = self.order[start : start + self.size]
            yield Batch(*(t[rows] for t in self.parts))


class InMemory:
    """What every data set has whose ``parts`` are batches by split."""

    def numeric_moments(self):
        dense = self.parts["train"].dense
        return dense.mean(0), dense.std(0, correction=0)

    def held_out(self, share):
        found, (dense, ids, label) = copy(self), self.parts["train"]
        cut = len(label) - round(share * len(label))
        halves = {
            "train": Batch(dense[:cut], ids[:cut], label[:cut]),
            "held_out": Batch(dense[cut:], ids[cut:], label[cut:]),
        }
        found.parts = {**self.parts, **halves}
        return found

    def batches(self, split, batch_size, *, shuffle=False, seed=0, epoch=0, device=None, start_batch=0):
        parts = self.parts[split]
        n = len(parts.label)
        g = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(n, generator=g) if shuffle else torch.arange(n)
        return ToyBatches(parts, order[start_batch * batch_size :], batch_size)


class ToyData(InMemory):
    """Labels follow a planted model: an effect per category and one product of two categories."""

    num_dense = 3
    cards = (50, 20, 300, 7)

    def __init__(self, rows: int = 2000, seed: int = 0, valid: bool = True) -> None:
        g = torch.Generator().manual_seed(seed)
        self.splits = ["train", "valid", "test"] if valid else ["train", "test"]
        effects = [torch.randn(c, generator=g) for c in self.cards]
        twist = [torch.randn(c, generator=g) for c in self.cards[:2]]
        self.parts = {}
        for split, n in (("train", rows), ("valid", rows // 2), ("test", rows // 2)):
            ids = torch.stack([torch.randint(0, c, (n,), generator=g) for c in self.cards], 1)
            dense = torch.rand(n, self.num_dense, generator=g)
            logit = sum(e[ids[:, i]] for i, e in enumerate(effects)) + twist[0][ids[:, 0]] * twist[1][ids[:, 1]]
            label = (torch.rand(n, generator=g) < torch.sigmoid(logit)).float()
            self.parts[split] = Batch(dense, ids, label)

    def schema(self, embedding_dim: int) -> Schema:
        return Schema([FeatureSpec(f"C{i}", c, embedding_dim) for i, c in enumerate(self.cards)])

    @property
    def digest(self) -> str:
        return repr([(split, [t.sum().item() for t in batch]) for split, batch in self.parts.items()])


class ToySource(RowSource):
    """The rows of a toy data set, read by number."""

    splits: ClassVar[dict[str, int]] = {}
    num_dense = ToyData.num_dense

    def __init__(self, rows: int = 600, *, memory_limit: int = RowSource.memory_limit) -> None:
        self.toy, self.memory_limit = ToyData(rows), memory_limit
        self.splits = {split: len(batch.label) for split, batch in self.toy.parts.items()}  # type: ignore[misc]

    @property
    def digest(self) -> str:
        return self.toy.digest

    def schema(self, embedding_dim: int) -> Schema:
        return self.toy.schema(embedding_dim)

    def read(self, split: str, start: int, stop: int) -> data.Batch:
        return data.Batch(*(part[start:stop] for part in self.toy.parts[split]))


def toy_config(**changes) -> TrainConfig:
    base = TrainConfig(
        model="deepfm",
        model_args={"hidden": [16, 8], "dropout": 0.1},
        embedding_dim=4,
        epochs=3,
        batch_size=128,
        learning_rate=5e-3,
        log_every=5,
    )
    return base.replace(**changes)
