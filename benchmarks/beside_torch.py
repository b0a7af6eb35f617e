"""Test AUC of full tables beside plain torch: the same encoded rows, networks written twice, several seeds.

Run: python benchmarks/beside_torch.py FOLDER... [--seeds 3] [--epochs 3] [--models dnn deepfm] [--out FILE]

FOLDER: data folders, such as those of ``recsys-embed data preset movielens_100k`` and ``examples/own_table.py``.
``torch`` knows nothing of this library but the rows: ``nn.EmbeddingBag`` tables, a start and an order of its own,
``torch.optim.Adam`` of all parameters, or ``SparseAdam`` of the tables. ``ours`` is ``run_training``, whose default
moves the rows of a batch only, as SparseAdam does; Adam moves all. All end with the epoch of the best validation.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measure import report
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_embed.data import open_dataset
from recsys_embed.train import TrainConfig, run_training

HIDDEN, WIDTH, BATCH, RATE, STD = (64, 32), 16, 512, 1e-3, 1e-4
Rows = dict[str, Tensor]


def rows_of(data: Any, split: str, tables: dict[str, tuple[str, int]]) -> Rows:
    """A split as torch's own modules take it: numbers, weights, and per feature ids ``[N, longest]``, padded."""
    batch = next(iter(data.batches(split, data.splits[split], shuffle=False)))
    rows = {"dense": batch.dense, "label": batch.label, "weight": batch.extra.get("weight", torch.ones(batch.num_rows))}
    singles = batch.ids.shape[1]
    for number, (feature, (_, size)) in enumerate(tables.items()):
        if number < singles:
            rows[feature] = batch.ids[:, number : number + 1]
            continue
        lists, at = batch.lists, number - singles
        starts, ends = (
            lists.offsets[k : len(lists.offsets) - 1 + k].view(-1, lists.num_features)[:, at] for k in (0, 1)
        )
        places = torch.arange(int((ends - starts).max())) + starts[:, None]
        rows[feature] = torch.where(
            places < ends[:, None], lists.values.long()[places.clamp(max=len(lists.values) - 1)], size
        )
    return rows


class Plain(nn.Module):
    """DNN or DeepFM by torch alone; a feature's vector is the mean of its ids', a number's is value times vector."""

    def __init__(self, kind: str, tables: dict[str, tuple[str, int]], train: Rows, sparse: bool = False) -> None:
        super().__init__()
        self.kind, self.features, self.sparse = kind, tables, sparse
        self.register_buffer("mean", train["dense"].mean(0))
        self.register_buffer("std", (train["dense"] - self.mean).square().mean(0).sqrt().clamp(min=1e-12))
        count = train["dense"].shape[1]
        self.numbers = nn.Parameter(0.05 * torch.randn(count, WIDTH))
        self.vectors = self._tables(WIDTH)
        widths = [(len(tables) + count) * WIDTH, *HIDDEN]
        hidden = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(HIDDEN[-1], 1))
        if kind == "deepfm":
            self.weights, self.bias = self._tables(1), nn.Parameter(torch.zeros(1))
            self.slopes = nn.Parameter(torch.zeros(count))

    def _tables(self, width: int) -> nn.ModuleDict:
        made = nn.ModuleDict()
        for table, size in self.features.values():
            if table not in made:
                made[table] = nn.EmbeddingBag(size + 1, width, mode="mean", padding_idx=size, sparse=self.sparse)
                nn.init.normal_(made[table].weight, std=STD)
        return made

    def forward(self, rows: Rows) -> Tensor:
        dense = (rows["dense"] - self.mean) / self.std
        looked = [self.vectors[table](rows[f]) for f, (table, _) in self.features.items()]
        fields = torch.cat([torch.stack(looked, 1), dense[:, :, None] * self.numbers], 1)
        out = self.mlp(fields.flatten(1)).squeeze(1)
        if self.kind == "deepfm":
            first = sum(self.weights[table](rows[f]).squeeze(1) for f, (table, _) in self.features.items())
            pairs = torch.triu(torch.bmm(fields, fields.transpose(1, 2)), 1).sum((1, 2))
            out = out + first + dense @ self.slopes + self.bias + pairs
        return out


def auc_of(model: Plain, rows: Rows) -> float:
    with torch.no_grad():
        scores = torch.cat([model(part) for part in batches_of(rows, torch.arange(len(rows["label"])), 4096)])
    return float(roc_auc_score(rows["label"], scores))


def batches_of(rows: Rows, order: Tensor, size: int) -> Any:
    for which in order.split(size):
        yield {name: part[which] for name, part in rows.items()}


def plain_auc(
    kind: str, splits: dict[str, Rows], tables: dict[str, tuple[str, int]], epochs: int, seed: int, sparse: bool = False
) -> float:
    """Test AUC of the epoch whose validation AUC is best."""
    torch.manual_seed(1000 + seed)
    train, best, kept = splits["train"], -1.0, None
    model = Plain(kind, tables, train, sparse)
    rows = {p for m in model.modules() if isinstance(m, nn.EmbeddingBag) and sparse for p in m.parameters()}
    optimizers = [torch.optim.Adam([p for p in model.parameters() if p not in rows], lr=RATE)]
    optimizers += [torch.optim.SparseAdam(list(rows), lr=RATE)] if rows else []
    for _ in range(epochs):
        for batch in batches_of(train, torch.randperm(len(train["label"])), BATCH):
            model.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(batch), batch["label"], weight=batch["weight"])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        if (found := auc_of(model, splits["valid"])) > best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return auc_of(model, splits["test"])


def our_auc(kind: str, data: Any, epochs: int, seed: int, **more: Any) -> float:
    config = TrainConfig(
        model=kind,
        model_args={"hidden": list(HIDDEN)},
        embedding_dim=WIDTH,
        embedding_init=f"normal:{STD}",
        batch_size=BATCH,
        epochs=epochs,
        learning_rate=RATE,
        seed=seed,
        **more,
    )
    return float(run_training(config, data, show_progress=False).result.test.auc)


def compare(folder: Path, kind: str, epochs: int, seeds: int) -> list[dict[str, Any]]:
    """One row per contender: its AUC with every seed, their mean and standard deviation."""
    data = open_dataset(folder)
    tables = {spec.name: (spec.table_name, spec.num_embeddings) for spec in data.schema(WIDTH)}
    splits = {split: rows_of(data, split, tables) for split in ("train", "valid", "test")}
    contenders = {
        "torch, Adam": lambda seed: plain_auc(kind, splits, tables, epochs, seed),
        "ours, all rows": lambda seed: our_auc(kind, data, epochs, seed, embedding_optimizer_args={"rows": "all"}),
        "torch, SparseAdam": lambda seed: plain_auc(kind, splits, tables, epochs, seed, sparse=True),
        "ours": lambda seed: our_auc(kind, data, epochs, seed),
    }
    found = []
    for name, auc in contenders.items():
        each = [auc(seed) for seed in range(seeds)]
        spread = statistics.stdev(each) if seeds > 1 else 0.0
        found.append(
            {"data": folder.name, "rows": len(splits["train"]["label"]), "model": kind, "contender": name,
             "auc": round(statistics.mean(each), 5), "std": round(spread, 5), "each": [round(a, 5) for a in each]}
        )  # fmt: skip
        print(found[-1], file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--models", nargs="+", default=["dnn", "deepfm"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="also write the JSON there")
    options = parser.parse_args()
    report(
        "beside_torch",
        [
            row
            for f in options.folders
            for kind in options.models
            for row in compare(f, kind, options.epochs, options.seeds)
        ],
    )


if __name__ == "__main__":
    main()
