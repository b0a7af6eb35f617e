"""Clicks whose table is known: fields that say nothing, fields of rank r, values that never matter."""

from __future__ import annotations

import torch

from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.train import TrainConfig
from tests.train.toy import Batch, InMemory

IDS = 40
RANKS = {"none_a": 0, "rank_1": 1, "rank_2": 2, "rank_4": 4, "half": 2, "tail": 2, "none_b": 0}
"""How many numbers of an id each field needs; of ``half``, every other id needs none; of ``tail``, few ids occur."""
NUMBERS = 4
TAIL = 400


class Planted(InMemory):
    """Rows of a bilinear model: an id of rank r holds r numbers, each of which multiplies a numeric column of its own.

    Column j is multiplied by the sum over fields of the ids' j-th number; the field ``half`` counts for odd ids alone.
    """

    num_dense = NUMBERS

    def __init__(self, seed: int, rows: int = 12_000) -> None:
        g = torch.Generator().manual_seed(seed)
        self.sizes = {name: TAIL if name == "tail" else IDS for name in RANKS}
        self.latent = {}
        for name, rank in RANKS.items():
            # Away from zero, so that no id with numbers is as good as one without.
            values = torch.rand(self.sizes[name], NUMBERS, generator=g) * 0.6 + 0.7
            self.latent[name] = values * torch.randint(0, 2, values.shape, generator=g).mul(2).sub(1)
            self.latent[name][:, rank:] = 0
        self.latent["half"][::2] = 0
        self.parts = {}
        for split, n in (("train", rows), ("valid", rows // 3), ("test", rows // 2)):
            ids = torch.randint(0, IDS, (n, len(RANKS)), generator=g)
            rare = torch.rand(n, generator=g) < 0.02
            ids[rare, list(RANKS).index("tail")] = torch.randint(IDS, TAIL, (int(rare.sum()),), generator=g)
            dense = torch.randn(n, NUMBERS, generator=g)
            numbers = sum(self.latent[name][ids[:, f]] for f, name in enumerate(RANKS))
            logit = (numbers * dense).sum(1)
            self.parts[split] = Batch(dense, ids, (torch.rand(n, generator=g) < logit.sigmoid()).float())
        self.splits = {split: len(part.label) for split, part in self.parts.items()}
        self.digest = f"planted {seed} {rows}"

    def schema(self, embedding_dim: int) -> Schema:
        return Schema([FeatureSpec(name, self.sizes[name], embedding_dim) for name in RANKS])


def planted_config(**changes) -> TrainConfig:
    base = TrainConfig(
        model="dcnv2",
        model_args={"hidden": [16], "cross_layers": 1},
        embedding_dim=8,
        embedding_init="normal:0.05",
        embedding_optimizer="adam",
        embedding_weight_decay=1e-3,
        epochs=10,
        batch_size=256,
        learning_rate=5e-3,
        standardise=False,
    )
    return base.replace(**changes)
