"""A step of OptEmbed's supernet against a plain step: decay on all of a million rows, thresholds and masks included.

    .venv/bin/python -m benchmarks.bench_supernet_step [--out FILE]

DeepFM over 26 features of 1,000,000 rows in all, width 16, Zipf ids. The plain step trains with fused Adam on the rows
of the batch. The supernet's Adam moves all rows (``rows="all"``, L2), which is compared with torch's dense Adam too.
Then the lookups alone, forward and backward with row-wise Adagrad: as they are, masked inside the kernels, and masked
by torch's operations after them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleaved, report
from recsys_embed import EmbeddingCollection, RowwiseAdagrad
from recsys_embed.data.batch import Batch, InMemoryDataset
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.kernels.native.masks import MaskParameters
from recsys_embed.search.layers import OptembedLayer
from recsys_embed.search.supernet import OptembedTrainer, Supernet
from recsys_embed.train.build import model_from_config
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.loop import Trainer

FIELDS, ROWS, BATCH, DENSE = 26, 1_000_000, 4096, 13


class Rows(InMemoryDataset):
    """In-memory rows as a trainer takes them."""

    splits = ("train",)
    num_dense = DENSE

    def batches(self, split: str, batch_size: int, **options):  # type: ignore[override]
        options.pop("shuffle", None)
        return super().batches(batch_size, shuffle=False, **options)


class Outside:
    """A layer behind the lookup, in torch's operations."""

    def __init__(self, layer: OptembedLayer) -> None:
        self.layer = layer

    def mask_parameters(self, ids: Tensor) -> MaskParameters:
        # Of another precision, which the kernels do not take.
        parameters = self.layer.mask_parameters(ids)
        return replace(parameters, thresholds=parameters.thresholds.double())

    def through(self, parameters: MaskParameters, vectors: Tensor, ids: Tensor) -> Tensor:
        return self.layer.prune(vectors, ids, self.layer.columns(parameters.widths))


def masks(schema: Schema, ids: Tensor) -> list[dict[str, Any]]:
    """Lookups of a batch with and without a mask."""
    upstream = torch.randn(BATCH, FIELDS, 16)
    layer = OptembedLayer(FIELDS, 16)

    def step(mask: Any) -> Any:
        coll = EmbeddingCollection(schema, optimizer=RowwiseAdagrad(lr=0.01))
        return lambda: coll(ids, mask=mask).backward(upstream)

    cases = {"lookup": None, "lookup, masked inside": layer, "lookup, masked by torch": Outside(layer)}
    steps = {name: step(mask) for name, mask in cases.items()}
    times = interleaved(steps, rounds=25, warmup=5)
    bare = times["lookup"]["median_ms"]
    return [{"case": name, **t, "ratio": round(t["median_ms"] / bare, 3)} for name, t in times.items()]


def main() -> None:
    torch.manual_seed(0)
    schema = Schema([FeatureSpec(f"C{i}", ROWS // FIELDS, 16, init="normal:0.0001") for i in range(FIELDS)])
    u = torch.rand(64 * BATCH, FIELDS, dtype=torch.float64)
    ids = ((ROWS // FIELDS) ** u).long().clamp_max(ROWS // FIELDS - 1)
    data = Rows(torch.randn(len(ids), DENSE), ids, (torch.rand(len(ids)) < 0.25).float())
    base = TrainConfig(model="deepfm", batch_size=BATCH, standardise=False)
    decayed = base.replace(embedding_weight_decay=1e-3)

    def trainer(config: TrainConfig, supernet: bool) -> Trainer:
        model = model_from_config(config, schema, DENSE)
        if not supernet:
            return Trainer(model, data, config)
        net = Supernet(model, OptembedLayer(FIELDS, 16))
        return OptembedTrainer(net, data, config, threshold_lr=0.1, pull=1e-3)

    trainers = {
        "plain": trainer(base, False),
        "supernet": trainer(decayed, True),
        "supernet, dense Adam": trainer(decayed.replace(embedding_optimizer="dense_adam"), True),
    }
    streams = {name: iter(()) for name in trainers}

    def step(name: str) -> None:
        batch: Batch | None = next(streams[name], None)
        if batch is None:
            streams[name] = iter(trainers[name]._epoch(0, 0))
            batch = next(streams[name])
        trainers[name]._clock = 0.0
        trainers[name]._step(batch)

    times = interleaved({name: lambda name=name: step(name) for name in trainers}, rounds=25, warmup=20)
    plain = times["plain"]["median_ms"]
    rows = [{"case": name, **t, "ratio": round(t["median_ms"] / plain, 3)} for name, t in times.items()]
    report("supernet_step", rows + masks(schema, ids[:BATCH]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
