"""Models that hold their embeddings elsewhere too, and measures that are no numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.exports import export, load

HASH = rse.get_method("hash").config_cls(num_buckets=50)
IDS = torch.randint(0, 300, (16, 2), generator=torch.Generator().manual_seed(0))


class Towers(nn.Module):
    """Two tables, read through a list, a dictionary and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(300, 8), nn.Embedding(300, 8)
        self.listed = [self.user, self.item]
        self.named = {"user": self.user, "pair": (self.item, [self.user])}

    def forward(self, ids: Tensor) -> Tensor:
        pair: Any = self.named["pair"]
        read = [self.listed[0](ids[:, 0]), self.listed[1](ids[:, 1]), pair[0](ids[:, 0]), pair[1][0](ids[:, 1])]
        return torch.cat([*read, self.named["user"](ids[:, 0])], 1)  # type: ignore[operator]


class Weights(nn.Module):
    """A table whose weight is held in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(300, 8)
        self.rows = [self.user.weight]

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[0][ids[:, 0]]


class Bound(nn.Module):
    """A table that is read by a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(300, 8)
        self.look = self.user.forward

    def forward(self, ids: Tensor) -> Tensor:
        return self.look(ids[:, 0])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_else_holds_an_embedding_serves_the_file_too(compressed: bool, precision: Any, tmp_path: Path) -> None:
    model = Towers()
    if compressed:
        rse.compress_(model, {"user": HASH, "item": HASH})
    wanted = model(IDS).detach()

    def measure(m: nn.Module) -> float:
        return float(m(IDS).detach().abs().sum())

    report = export(model, tmp_path / "m", precision, evaluate=measure)
    served = load(tmp_path / "m", into=Towers())
    torch.testing.assert_close(served(IDS), wanted, atol=0 if precision == "fp32" else 0.05, rtol=0)
    assert report.metric is not None
    assert report.metric.after == measure(served)
    assert (report.metric.after == report.metric.before) is (precision == "fp32")


def test_a_weight_in_a_list_is_that_of_the_file(tmp_path: Path) -> None:
    model = Weights()
    export(model, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", into=Weights())(IDS), model(IDS))
    export(model, tmp_path / "q", "int8")
    served = load(tmp_path / "q", into=Weights())
    torch.testing.assert_close(served(IDS), model(IDS).detach(), atol=0.05, rtol=0)
    assert torch.equal(served(IDS), served.user(IDS[:, 0])), "rows are read from the file's integers"
    fresh = Bound()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"look holds the replaced user.*remove it first"):
        load(tmp_path / "q", into=fresh)
    assert type(fresh.user) is nn.Embedding
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, None, torch.tensor(math.nan)])
def test_a_measure_that_is_no_number_writes_nothing(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`evaluate` must return a (finite )?number \(AUC\); got"):
        export(rse.make_embedding("full", 9, 2), tmp_path / "m", evaluate=lambda m: value, metric="AUC")
    assert list(tmp_path.iterdir()) == []
