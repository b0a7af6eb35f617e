"""A training step of two towers with fused tables beside the same model on torch's sparse embeddings.

Run: python benchmarks/two_tower_step.py [--batch 4096] [--rounds 15] [--threads N] [--out FILE]

Sampled softmax with logQ over the batch's items and 1,000 uniform ones. Both models have the same weights and get the
same batches. torch's has ``nn.Embedding(sparse=True)`` and ``F.embedding_bag(sparse=True)`` over one table of items,
``SparseAdam`` for the tables and ``Adam`` for the layers; ours has Adam fused into backward for the tables. In both, a
moment of a row moves when the row is read.
"""

from __future__ import annotations

import argparse
from itertools import cycle
from typing import Any

import torch
from measure import interleaved, report
from torch import Tensor, nn
from torch.nn import functional as F

import recsys_embed as rse
from recsys_embed.data import Batch
from recsys_embed.data.list_ids import ListIds
from recsys_embed.models import TwoTower, build_model
from recsys_embed.train.loss import loss_of
from recsys_embed.train.losses import loss_args

USERS, ITEMS, WIDTH, NEGATIVES, LONGEST = 1_000_000, 200_000, 32, 1000, 40
SIDES = {"country": 200, "device": 1000, "hour": 24}
PROPERTIES = {"brand": 10_000, "kind": 300}
HIDDEN, OUT, RATE = 128, 64, 1e-3
SCHEMA = rse.Schema(
    [
        rse.FeatureSpec("user", USERS, WIDTH),
        rse.FeatureSpec("item", ITEMS, WIDTH, table="item"),
        *(rse.FeatureSpec(name, rows, WIDTH) for name, rows in {**SIDES, **PROPERTIES}.items()),
        rse.FeatureSpec("history", ITEMS, WIDTH, pooling="mean", table="item"),
    ]
)


def ours() -> tuple[TwoTower, dict[str, Tensor]]:
    """The model, and the properties of all items by name."""
    model = build_model(
        "twotower", SCHEMA, rse.Plan.full(SCHEMA), num_dense=2, optimizer=rse.Adam(lr=RATE), hidden=(HIDDEN,),
        output_dim=OUT, item_features=tuple(PROPERTIES),
    )  # fmt: skip
    if not isinstance(model, TwoTower):
        raise TypeError(f"expected a TwoTower; got {type(model).__name__}")
    known = {name: torch.randint(rows, (ITEMS,)) for name, rows in PROPERTIES.items()}
    ends = torch.arange(ITEMS + 1)
    model.describe_items({k: (v, ends) for k, v in known.items()}, torch.zeros(ITEMS, 0), torch.ones(ITEMS).bool())
    model.item_counts.copy_(torch.randint(1, 500, (ITEMS,)))
    return model, known


class Plain(nn.Module):
    """The same model as people write it in torch."""

    def __init__(self, model: TwoTower, known: dict[str, Tensor]) -> None:
        super().__init__()
        tables = {f.table_name: f.num_embeddings for f in SCHEMA}
        self.tables = nn.ModuleDict({k: nn.Embedding(n, WIDTH, sparse=True) for k, n in tables.items()})
        for name, table in self.tables.items():
            table.weight.data.copy_(model.vectors.table(f"{name}.weight"))
        self.known, self.counts = known, model.item_counts.float()
        self.numeric = nn.Parameter(model.numeric.detach().clone())
        self.user, self.item = (self.layers(tower) for tower in (model.user_tower, model.item_tower))

    @staticmethod
    def layers(tower: nn.Module) -> nn.Sequential:
        first, last = tower.net.first, tower.net.rest[-1]
        weight = torch.cat([first.weight, first.numeric_weight.flatten(1)], 1)
        made = nn.Sequential(nn.Linear(weight.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT))
        for mine, values in zip(made.parameters(), (weight, first.bias, last.weight, last.bias), strict=True):
            mine.data.copy_(values)
        return made

    def loss(self, batch: Batch) -> Tensor:
        ids = dict(zip(SCHEMA.names, batch.ids.unbind(1), strict=False))
        values, offsets = batch.lists.by_feature()
        weight = self.tables["item"].weight
        past = F.embedding_bag(values, weight, offsets, mode="mean", sparse=True, include_last_offset=True)
        sides = [self.tables[name](ids[name]) for name in ("user", *SIDES)]
        numbers = (batch.dense.unsqueeze(2) * self.numeric).flatten(1)
        users = self.user(torch.cat([*sides, past, numbers], 1))
        targets = ids["item"]
        every = torch.cat([targets, torch.randint(ITEMS, (NEGATIVES,))])
        properties = [self.tables[name](self.known[name][every]) for name in PROPERTIES]
        items = self.item(torch.cat([self.tables["item"](every), *properties], 1))
        expected = (len(targets) - 1) * self.counts[every] / self.counts.sum() + NEGATIVES / ITEMS
        rows, log_expected = torch.arange(len(targets)), expected.log()
        scores = torch.addmm(-log_expected, users, items.T)
        with torch.no_grad():  # as in our loss, so that what differs is the tables
            hits = targets.unsqueeze(1) == every
            hits[rows, rows] = False
            scores[rows, rows] += log_expected[: len(targets)]
            scores.masked_fill_(hits, float("-inf"))
        return F.cross_entropy(scores, rows)


def batches(size: int, count: int) -> list[Batch]:
    """Ids whose frequency falls with their number, histories of up to 40 items."""

    def drawn(rows: int, n: int) -> Tensor:
        return (torch.rand(n) ** 3 * rows).long()

    made = []
    for _ in range(count):
        columns = [drawn(f.num_embeddings, size) for f in SCHEMA.features[:-1]]
        lengths = torch.randint(1, LONGEST, (size,))
        past = ListIds(drawn(ITEMS, int(lengths.sum())), F.pad(lengths.cumsum(0), (1, 0)), 1)
        made.append(Batch(torch.randn(size, 2), torch.stack(columns, 1), torch.ones(size), lists=past))
    return made


def contenders(size: int) -> dict[str, Any]:
    """Steps by name, each over the same batches in turn; and the losses of both before any."""
    torch.manual_seed(0)
    model, known = ours()
    plain, given = Plain(model, known), batches(size, 8)
    args = loss_args("sampled_softmax", {"negatives": NEGATIVES})
    dense = torch.optim.Adam(model.trainable(), lr=RATE)
    tables = {id(p) for p in plain.tables.parameters()}
    optimizers = (
        torch.optim.SparseAdam(plain.tables.parameters(), lr=RATE),
        torch.optim.Adam([p for p in plain.parameters() if id(p) not in tables], lr=RATE),
    )

    def fused(batches: Any = cycle(given)) -> Tensor:  # noqa: B008 - one cycle for all calls
        loss = loss_of(model, next(batches), loss="sampled_softmax", args=args)
        loss.backward()
        dense.step()
        dense.zero_grad()
        return loss.detach()

    def sparse(batches: Any = cycle(given)) -> Tensor:  # noqa: B008 - one cycle for all calls
        loss = plain.loss(next(batches))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return {"fused": fused, "torch sparse": sparse}


def same_loss(steps: dict[str, Any], rounds: int = 3) -> None:
    """Refuse contenders that do not compute the same: losses of the first steps, over the same draws."""
    for number in range(rounds):
        found = []
        for step in steps.values():
            torch.manual_seed(number)
            found.append(step())
        torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", help="also write the JSON there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    steps = contenders(options.batch)
    same_loss(steps)
    times = interleaved(steps, rounds=options.rounds)
    ratio = times["torch sparse"]["median_ms"] / times["fused"]["median_ms"]
    report("two_tower_step", [{"batch": options.batch, **times, "torch over fused": round(ratio, 2)}])


if __name__ == "__main__":
    main()
