"""Properties of items that rows of users bring along are found, however many items there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recsys_embed.data import Batch
from recsys_embed.errors import ConfigError
from recsys_embed.models import TwoTower
from recsys_embed.train import TrainConfig
from recsys_embed.train import catalogue as catalogue_module
from recsys_embed.train.build import model_from_config
from recsys_embed.train.catalogue import learn_items
from recsys_embed.train.inputs import schema_of

from .events import ARGS, ITEMS, Events


class Odd(Events):
    """Events in which years of some items are anything."""

    def __init__(self, odd: range, unknown: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.odd, self.unknown, self.passes = odd, unknown, 0

    def unknown_ids(self, feature: str) -> tuple[int, ...]:
        return self.unknown if feature == "item" else ()

    def read(self, split: str, start: int, stop: int) -> Batch:
        batch = super().read(split, start, stop)
        self.passes += start == 0
        rows = torch.isin(batch.ids[:, 1], torch.tensor([*self.odd]))
        batch.ids[rows, 2] = torch.arange(int(rows.sum())).int() % 6
        return batch


def learned(data: Events, **args: Any) -> TwoTower:
    given = {"hidden": [4], "item_features": ["genres"], "item_lists": {"genres": 2}, **args}
    config = TrainConfig(model="twotower", model_args=given, loss="bpr", embedding_dim=4)
    model: Any = model_from_config(config, schema_of(data, config), data.num_dense)
    learn_items(model, data)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("prints", [1 << 24, 40, 1], ids=["all items", "some items", "one item"])
def test_properties_are_refused_and_nothing_else(prints: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "MAX_PRINTS", prints)
    monkeypatch.setattr(catalogue_module, "CHUNK_ROWS", 128)
    with pytest.raises(ConfigError, match="features year are the same in all training rows of an item"):
        learned(Odd(range(0)))
    with pytest.raises(ConfigError, match="features year, genres are the same"):
        learned(Odd(range(0)), item_features=[], item_lists={})
    # Of the most frequent items, which are looked at first, the year looks like a property.
    fine = Odd(range(20, ITEMS))
    learned(fine)
    # What stands for unknown items tells nothing of one.
    learned(Odd(range(1)))
    with pytest.raises(ConfigError, match="features year are the same"):
        learned(Odd(range(1), unknown=(0,)))


def test_items_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "CHUNK_ROWS", 128)
    model, rows = learned(Odd(range(0)), **ARGS), Events().read("train", 0, 1500)
    items, positive = rows.ids[:, 1].long(), rows.label > 0
    assert model.item_counts.tolist() == items[positive].bincount(minlength=ITEMS).tolist()
    assert model.in_catalogue.nonzero().flatten().tolist() == items.unique().tolist()
    first = {item: place for place, item in reversed(list(enumerate(items.tolist())))}
    years = {item: int(rows.ids[place, 2]) for item, place in first.items()}
    assert {item: int(model.item_ids[item, 0]) for item in first} == years
