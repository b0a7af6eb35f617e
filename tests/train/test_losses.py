"""Losses and weights of rows beside torch's formulas; runs on real labels, lists and groups from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys_embed import FeatureSpec, Schema
from recsys_embed.data import Batch, RowSource
from recsys_embed.data.list_ids import ListIds
from recsys_embed.errors import DataError
from recsys_embed.train import DivergedError, TrainConfig, Trainer, evaluate, run_training
from recsys_embed.train.build import model_from_config
from recsys_embed.train.loss import loss_of

ROWS = {"train": 2000, "valid": 400, "test": 400}


class Ratings(RowSource):
    """Users rate items; a row holds the tags of its item and belongs to a user."""

    num_dense, digest = 1, "ratings"

    def __init__(self, real: bool, weights: bool = False, memory_limit: int = 1 << 30) -> None:
        self.real, self.weights, self.memory_limit = real, weights, memory_limit

    @property
    def splits(self) -> dict[str, int]:
        return ROWS

    @property
    def num_lists(self) -> int:
        return 1

    def schema(self, embedding_dim: int) -> Schema:
        names = (("user", 40, "sum"), ("item", 60, "sum"), ("tags", 12, "mean"))
        return Schema([FeatureSpec(n, size, embedding_dim, pooling=pooling) for n, size, pooling in names])  # type: ignore[arg-type]

    def read(self, split: str, start: int, stop: int) -> Batch:
        whole = torch.Generator().manual_seed(sorted(ROWS).index(split))
        user, item = (torch.randint(0, n, (ROWS[split],), generator=whole)[start:stop] for n in (40, 60))
        tags = torch.stack([item % 12, item // 12], 1).reshape(-1)
        keep = torch.ones_like(tags, dtype=torch.bool)
        keep[1::2] = item % 3 > 0  # some items have one tag
        ends = F.pad(keep.view(-1, 2).sum(1).cumsum(0), (1, 0))
        rating = 3 + torch.sin(user.float()) + torch.cos(item.float()) + (item % 12 == 4)
        label = rating if self.real else (rating > 3).float()
        extra = {"group": user}
        if self.weights:
            extra["weight"] = (user % 2).float() * 2
        return Batch(
            torch.zeros(len(user), 1), torch.stack([user, item], 1).int(), label, extra, ListIds(tags[keep], ends, 1)
        )


def test_rows_are_weighed_as_torchs_losses_weigh_them() -> None:
    class Net(torch.nn.Module):
        def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
            return dense[:, 0]

    dense, label, weight = torch.randn(9, 1), torch.rand(9).round(), torch.rand(9)
    batch = Batch(dense, torch.zeros(9, 1, dtype=torch.int64), label, {"weight": weight})
    wanted = F.binary_cross_entropy_with_logits(dense[:, 0], label, weight=weight)
    torch.testing.assert_close(loss_of(Net(), batch), wanted)
    squares = F.mse_loss(dense[:, 0], label, reduction="none")
    torch.testing.assert_close(loss_of(Net(), batch, loss="squared_error"), (squares * weight).mean())
    torch.testing.assert_close(loss_of(Net(), batch, "sum", "squared_error"), (squares * weight).sum())


@pytest.mark.parametrize("memory_limit", [1 << 30, 0], ids=["in memory", "streamed"])
def test_real_labels_and_lists_are_trained_on(tmp_path: Path, memory_limit: int) -> None:
    data = Ratings(real=True, memory_limit=memory_limit)
    config = TrainConfig(
        model="deepfm", model_args={"hidden": [16]}, loss="squared_error", epochs=12, batch_size=100,
        learning_rate=0.01, embedding_dim=8, method="full",
    )  # fmt: skip
    result = run_training(config, data, folder=tmp_path).result
    assert result.test is not None
    assert result.test.rmse is not None
    assert math.isnan(result.test.auc)
    labels = data.read("test", 0, 400).label
    assert result.test.rmse < 0.4 * float(labels.std()), "much better than the mean label"
    assert result.test.score == -result.test.rmse
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["rmse"] for line in log if line["event"] == "test"] == [result.test.rmse]


def test_grouped_auc_is_told_where_rows_have_a_group() -> None:
    data = Ratings(real=False)
    outcome = run_training(TrainConfig(model="dnn", model_args={"hidden": [16]}, batch_size=100, epochs=2), data)
    test = outcome.result.test
    assert test is not None
    assert test.grouped_auc is not None
    assert test.grouped_auc != test.auc
    assert test.pr_auc is not None
    again = evaluate(outcome.model, data, "test")
    assert again == test


def test_rows_of_weight_zero_teach_nothing() -> None:
    config = TrainConfig(model="lr", method="full", batch_size=100, epochs=2, embedding_optimizer="sgd")
    outcome = run_training(config, Ratings(real=False, weights=True))
    assert outcome.model.linear is not None
    users = outcome.model.linear.table("user.weight").detach()[:, 0]
    fresh = run_training(TrainConfig(**{**config.to_dict(), "steps": 1}), Ratings(real=False, weights=True))
    before = fresh.model.linear.table("user.weight").detach()[:, 0]  # type: ignore[union-attr]
    assert torch.equal(users[::2], before[::2])
    assert bool((users[1::2] != before[1::2]).all())


class Weightless(Ratings):
    """Rows of weight 0, but for one."""

    def __init__(self, heavy: int | None) -> None:
        super().__init__(real=False)
        self.heavy = heavy

    def read(self, split: str, start: int, stop: int) -> Batch:
        batch = super().read(split, start, stop)
        weight = torch.tensor([float(row == self.heavy) for row in range(start, start + batch.num_rows)])
        return dataclasses.replace(batch, extra={"weight": weight})


def test_rows_that_all_have_weight_zero_are_refused_before_anything_changed() -> None:
    config = TrainConfig(model="lr", batch_size=100, embedding_weight_decay=0.1, shuffle=False)
    data = Weightless(None)
    trainer = Trainer(model_from_config(config, data.schema(16), data.num_dense), data, config)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(DataError, match="the `weight` of every training row is 0, so nothing can be learned: correct"):
        trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    run_training(config, Weightless(1999))


class Heavy(Ratings):
    def read(self, split: str, start: int, stop: int) -> Batch:
        batch = super().read(split, start, stop)
        return dataclasses.replace(batch, extra={"weight": torch.full_like(batch.label, 2e38)})


def test_weights_that_drive_the_loss_out_of_range_are_named() -> None:
    with pytest.raises(DivergedError, match=r"weights of rows reach 2e\+38; divide the `weight` column by its mean"):
        run_training(TrainConfig(model="lr", batch_size=100), Heavy(real=False))


def test_labels_that_do_not_fit_the_loss_are_refused() -> None:
    with pytest.raises(DataError, match=r"labels must be 0 or 1.*loss='squared_error'"):
        run_training(TrainConfig(), Ratings(real=True))
