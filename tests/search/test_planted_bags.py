"""Where the truth of lists is known, searches find it: lists that say nothing shrink, tags that hardly occur die."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from recsys_embed import FeatureSpec, Schema
from recsys_embed.data import Batch, RowSource
from recsys_embed.data.list_ids import ListIds
from recsys_embed.search import DnisSearch, DnisSettings, OptembedSearch, OptembedSettings, run_search
from tests.search.planted import planted_config
from tests.tiers import slow_but

IDS, TAIL, WIDTH = 40, 400, 8
SEEDS = pytest.mark.parametrize("seed", slow_but(range(3)))


class PlantedBags(RowSource):
    """Clicks by an effect of the item, the mean taste of the history, and the summed effects of tags below ``IDS``."""

    num_dense, num_lists, memory_limit, digest = 0, 3, 1 << 30, ""
    splits: ClassVar[dict[str, int]] = {"train": 12_000, "valid": 4_000, "test": 4_000}

    def __init__(self, seed: int) -> None:
        self.seed, self.digest = seed, f"planted bags {seed}"

    def schema(self, embedding_dim: int) -> Schema:
        return Schema(
            [
                FeatureSpec("item", IDS, embedding_dim, table="item"),
                FeatureSpec("history", IDS, embedding_dim, table="item", pooling="mean"),
                FeatureSpec("noise", IDS, embedding_dim, pooling="mean"),
                FeatureSpec("tags", TAIL, embedding_dim),
            ]
        )

    def read(self, split: str, start: int, stop: int) -> Batch:
        truth = torch.Generator().manual_seed(self.seed)
        g = torch.Generator().manual_seed(100 * self.seed + sorted(self.splits).index(split) + 1)
        effect, taste, tag = (torch.randn(IDS, generator=truth) * scale for scale in (1.5, 2.0, 1.0))
        rows = self.splits[split]
        item = torch.randint(0, IDS, (rows,), generator=g)
        logit, lists = effect[item], []
        for name in ("history", "noise", "tags"):
            lengths = torch.randint(1, 5, (rows,), generator=g)
            values = torch.randint(0, IDS, (int(lengths.sum()),), generator=g)
            owners = torch.repeat_interleave(torch.arange(rows), lengths)
            if name == "history":
                logit = logit + torch.zeros(rows).index_add(0, owners, taste[values]) / lengths
            if name == "tags":
                rare = torch.rand(len(values), generator=g) < 0.008
                logit = logit + torch.zeros(rows).index_add(0, owners, tag[values] * ~rare)
                values[rare] = torch.randint(IDS, TAIL, (int(rare.sum()),), generator=g)
            lists.append((values.int(), F.pad(lengths.cumsum(0), (1, 0))))
        label = (torch.rand(rows, generator=g) < logit.sigmoid()).float()
        part = slice(start, stop)
        empty = torch.zeros(rows, 0)
        return Batch(empty[part], item[part, None].int(), label[part], {}, ListIds.of(lists)[part])


@SEEDS
def test_optembed_keeps_the_rows_and_columns_of_lists_that_matter(seed: int) -> None:
    config = planted_config(model="dnn", model_args={"hidden": [16]}, epochs=8, seed=seed)
    settings = OptembedSettings(generations=8, threshold_lr=0.7, pull=2e-3, size_weight=0.02)
    found = run_search(OptembedSearch, config, PlantedBags(seed), settings)
    plan, schema = found.plan, found.model.vectors.schema
    kept = {n: getattr(plan[n], "num_kept", schema[n].num_ids) for n in plan}
    widths = {n: getattr(plan[n], "dim", WIDTH) for n in plan}
    assert kept["item"] >= 0.9 * IDS
    tags = plan.members(schema["tags"])["kept"] if plan["tags"].order == "counts" else torch.arange(kept["tags"])
    assert (tags < IDS).sum() >= 0.9 * IDS
    assert (tags >= IDS).sum() <= 0.05 * TAIL, "tags that hardly occur die by decay"
    assert kept["noise"] * widths["noise"] < kept["item"] * widths["item"] / 2
    assert widths["item"] > 1, "an item has an effect and a taste"
    assert found.result.test.auc >= 0.86


@SEEDS
def test_dnis_spends_columns_on_the_lists_that_matter(seed: int) -> None:
    config = planted_config(model="dnn", model_args={"hidden": [16]}, epochs=6, ratio=10, seed=seed)
    found = run_search(DnisSearch, config, PlantedBags(seed), DnisSettings(scope="field", blocks=2))
    widths = {n: [bits.bit_count() for bits in found.plan[n].columns] for n in ("item", "noise", "tags")}
    assert min(widths["item"]) >= 4
    assert sum(widths["noise"]) <= 3
    assert widths["tags"][0] >= 1
    assert widths["tags"][-1] == 0, "tags that hardly occur keep none"
    assert found.plan["history"] == found.plan["item"]
    assert found.result.test.auc >= 0.82
