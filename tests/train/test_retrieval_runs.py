"""Runs of retrieval models: resumed, exported, planned, from the command line, and refused where they cannot."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import recsys_embed as rse
from recsys_embed.cli import main
from recsys_embed.data import Batch, convert_table, open_dataset
from recsys_embed.errors import ConfigError
from recsys_embed.models import RetrievalModel
from recsys_embed.train import Interrupted, TrainConfig, run_training
from recsys_embed.train.build import model_from_config
from recsys_embed.train.inputs import schema_of
from recsys_embed.train.loop import Trainer
from recsys_embed.train.plans import plans_for

from .events import ARGS, GENRES, ITEMS, Events

CONFIG = TrainConfig(
    model="twotower", model_args={**ARGS, "dropout": 0.2}, loss="sampled_softmax", loss_args={"negatives": 7},
    batch_size=100, epochs=2, embedding_dim=4, learning_rate=0.01, top_k=(5,),
)  # fmt: skip


def test_a_trainer_learns_items_that_the_model_has_not() -> None:
    """A model built without the data trains as that of a run, bit for bit; what it has learned is left alone."""
    data, config = Events(), CONFIG.replace(standardise=False, epochs=1)
    wanted = run_training(config, data, show_progress=False).model.state_dict()
    model = model_from_config(config, schema_of(data, config), data.num_dense)
    assert isinstance(model, RetrievalModel)
    Trainer(model, data, config).run()
    assert int(wanted["item_counts"].sum()) > 0
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    model.in_catalogue[3] = False
    Trainer(model, data, config)
    assert not model.in_catalogue[3]


class Stopping(Events):
    """Sends an interrupt while a training batch is at work."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def batches(self, split: str, *args: Any, **kwargs: Any) -> Any:
        made = super().batches(split, *args, **kwargs)
        return Counted(self, made) if split == "train" and kwargs.get("shuffle") else made


class Counted:
    def __init__(self, owner: Stopping, made: Any) -> None:
        self.owner, self.made = owner, made

    def __len__(self) -> int:
        return len(self.made)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.made:
            self.owner.left -= 1
            if self.owner.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


@pytest.mark.parametrize("loss", ["sampled_softmax", "bpr"])
def test_a_stopped_run_draws_the_same_negatives(tmp_path: Path, loss: Any) -> None:
    config = CONFIG.replace(loss=loss)
    whole = run_training(config, Events(), folder=tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(config, Stopping(19), folder=tmp_path / "parts")
    resumed = run_training(config, Events(), folder=tmp_path / "parts", resume=True)
    assert resumed.result.test == whole.result.test
    wanted = whole.model.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in resumed.model.state_dict().items())


def test_a_run_is_exported_with_its_items(tmp_path: Path) -> None:
    model = run_training(CONFIG, Events(), folder=tmp_path / "run").model.eval()
    assert isinstance(model, RetrievalModel)
    rows = Events().read("train", 0, 1500)
    items, positive = rows.ids[:, 1].long(), rows.label > 0
    assert model.item_counts.tolist() == items[positive].bincount(minlength=ITEMS).tolist()
    assert model.in_catalogue.nonzero().flatten().tolist() == items.unique().tolist()
    for item in items.unique().tolist():
        years, first, second = model.item_ids[item].tolist()  # type: ignore[union-attr]
        lengths = model.item_lengths[item].tolist()  # type: ignore[union-attr]
        assert (years, first, lengths) == (item % 6, item % GENRES, [1, 1 + item % 2])
        assert not item % 2 or second == (item + 1) % GENRES
    rse.export(tmp_path / "run", tmp_path / "model.rse")
    served, batch = rse.load(tmp_path / "model.rse"), Events().read("test", 0, 50)
    given = batch.dense, batch.map(lambda part: part.long() if part is batch.ids else part).inputs
    every = torch.arange(ITEMS)
    assert torch.equal(served.users(*given), model.users(*given))  # type: ignore[operator]
    assert torch.equal(served.items(every), model.items(every))  # type: ignore[operator]
    assert torch.equal(served.recommend(*given, 5)[0], model.recommend(*given, 5)[0])  # type: ignore[operator]


def test_items_that_stand_for_others_are_not_found(tmp_path: Path) -> None:
    """Rare and missing values of a folder share ids; no user has chosen those."""
    rng = np.random.default_rng(0)
    item = [None if i == 0 else f"i{i}" if i < 20 else f"rare{n}" for n, i in enumerate(rng.integers(0, 25, 600))]
    events = pl.DataFrame({"user": rng.integers(0, 30, 600), "item": item, "time": np.arange(600)})
    columns = {"user": {"kind": "categorical"}, "item": {"kind": "categorical", "min_count": 5},
               "time": {"kind": "time", "parts": []}}  # fmt: skip
    convert_table(events, tmp_path / "data", {"columns": columns, "split": {"kind": "time"}})
    data = open_dataset(tmp_path / "data")
    config = CONFIG.replace(model_args={"hidden": [8], "output_dim": 4})
    model = run_training(config, data).model
    assert isinstance(model, RetrievalModel)
    missing = data.vocabulary("item").missing_id
    assert missing > 0
    assert not model.in_catalogue[[0, missing]].any()
    assert int(model.in_catalogue.sum()) == 19
    found, _ = model.recommend(torch.zeros(3, 0), torch.tensor([[1, 1], [2, 1], [3, 1]]), 25)
    assert not np.isin(found.numpy(), [0, missing]).any()
    assert bool((found[:, 19:] == -1).all())


def test_plans_hold_items_apart() -> None:
    """Where rows are shared without need, no network tells items of one row apart."""
    data = Events()
    config = CONFIG.replace(method="planned", ratio=4, embedding_dim=16)
    plan = plans_for(data.schema(16), config, data).vectors
    found = run_training(config.replace(epochs=1), data)
    assert found.footprint.serve <= found.full_bytes / 4
    assert plan["item"].method not in ("hash", "unified", "compositional"), plan["item"]
    vectors = found.model.vectors.lookup("item", torch.arange(ITEMS))
    assert len(vectors.unique(dim=0)) == ITEMS


def test_what_users_have_seen_needs_users() -> None:
    class Nameless(Events):
        def schema(self, embedding_dim: int) -> rse.Schema:
            first, *rest = super().schema(embedding_dim)
            return rse.Schema([rse.FeatureSpec("visitor", first.num_embeddings, embedding_dim), *rest])

    with pytest.raises(ConfigError, match="`exclude_seen` needs rows that say whose they are"):
        run_training(CONFIG.replace(exclude_seen=True), Nameless(group=False))
    left = run_training(CONFIG.replace(epochs=1), Nameless(group=False)).result.test
    assert left is not None
    assert left.recall is not None


def test_real_labels_are_no_choices() -> None:
    """Ratings by their squared error: no row is a negative one, so nothing is ranked."""
    config = CONFIG.replace(loss="squared_error", loss_args={}, epochs=1)
    test = run_training(config, Events()).result.test
    assert test is not None
    assert test.recall is None
    assert test.score == -float(test.rmse or 0)


def test_processes_refuse_them() -> None:
    sharding = pytest.importorskip("recsys_embed.sharding.run")
    with pytest.raises(ConfigError, match="train it without torchrun"):
        sharding.run_sharded(CONFIG, Events(), device="cpu")


def test_the_command_line_trains_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    item = rng.integers(0, 30, 900)
    events = pl.DataFrame(
        {"user": rng.integers(0, 20, 900), "item": item, "genres": [[i % 4, i % 3 + 4] for i in item.tolist()]}
    )
    events.write_parquet(tmp_path / "events.parquet")

    def run(*args: str) -> str:
        assert main(list(args)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    data = str(tmp_path / "data")
    run("data", "table", str(tmp_path / "events.parquet"), data, "--categorical", "user,item", "--list", "genres")
    settings = [
        "--set", 'model_args.item_features=["genres"]', "--set", "model_args.item_lists={genres=2}",
        "--set", "model_args.hidden=[8]", "--set", "loss=sampled_softmax", "--set", "loss_args={negatives=5}",
        "--set", "top_k=[3,5]", "--set", "exclude_seen=false", "--batch-size", "200", "--embedding-dim", "4",
    ]  # fmt: skip
    out = run("train", "--data", data, "--model", "twotower", *settings, "--out", str(tmp_path / "run"))
    assert "recall@3" in out
    assert "NDCG@5" in out
    assert "AUC" not in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test"]["ndcg"].keys() == {"3", "5"}
    out = run("compare", "--data", data, "--model", "twotower", "--methods", "hash", "--ratios", "4", *settings,
              "--out", str(tmp_path / "compared"))  # fmt: skip
    assert "dNDCG@3" in out.replace("\n", "")
    assert "recall@5" in (tmp_path / "compared" / "table.md").read_text()
    run("report", str(tmp_path / "run"))
    done = json.loads(run("export", str(tmp_path / "run"), "--out", str(tmp_path / "m.rse"), "--data", data, "--json"))
    # Measured as the run did: the same list length, and nothing left out.
    assert done["metric"]["name"] == "test NDCG@3"
    assert done["metric"]["before"] == done["metric"]["after"] == result["test"]["ndcg"]["3"]
