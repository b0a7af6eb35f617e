"""Recall and NDCG beside a sort of every user's items, with ties, seen items and items that cannot be found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.data import Batch
from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.exports.encoders import FileScorer
from recsys_embed.models.base import ModelSpec
from recsys_embed.models.retrieval import RetrievalModel
from recsys_embed.report.comparison import cells, header, markdown_table, rich_table
from recsys_embed.report.pareto import plot_pareto
from recsys_embed.train import TrainConfig, evaluate, run_training
from recsys_embed.train.compare import Comparison, run_comparison, summarise

from .events import ARGS, Events


class Scored(RetrievalModel):
    """Whole numbers as scores of users and items, so that ties are ties."""

    key = "scored"

    def __init__(self, scores: Tensor) -> None:
        schema = Schema([FeatureSpec("user", len(scores), 1), FeatureSpec("item", scores.shape[1], 1)])
        super().__init__(ModelSpec(schema, Plan.full(schema), num_dense=0), None)
        self.register_buffer("scores", scores.float())

    def user_vectors(self, dense: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.get_buffer("scores")[ids[:, 0]]

    def items(self, item_ids: Tensor) -> Tensor:
        return torch.eye(len(self.in_catalogue))[item_ids]


class Split:
    """Rows of splits as single batches."""

    def __init__(self, **parts: Batch) -> None:
        self.parts, self.splits = parts, list(parts)

    def batches(self, split: str, batch_size: int, **_: object) -> list[Batch]:
        whole = self.parts[split]
        return [
            whole.map(lambda part, s=start: part[s : s + batch_size])  # type: ignore[misc]
            for start in range(0, whole.num_rows, batch_size)
        ]


def brute_force(
    scores: np.ndarray, listed: np.ndarray, wanted: list[set[int]], seen: list[set[int]], k: int
) -> tuple[float, float]:
    """Sort all items of every user, equal scores of items that were not chosen first."""
    recalls, ndcgs = [], []
    for user, positives in enumerate(wanted):
        if not positives:
            continue
        items = [i for i in range(scores.shape[1]) if listed[i] and (i not in seen[user] or i in positives)]
        items.sort(key=lambda i: (-scores[user, i], i in positives))
        hits = [place for place, i in enumerate(items[:k]) if i in positives]
        recalls.append(len(hits) / len(positives))
        ideal = sum(1 / np.log2(place + 2) for place in range(min(k, len(positives))))
        ndcgs.append(sum(1 / np.log2(place + 2) for place in hits) / ideal)
    return float(np.mean(recalls)), float(np.mean(ndcgs))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    users=st.integers(1, 9),
    items=st.integers(1, 14),
    rows=st.integers(1, 60),
    levels=st.integers(1, 6),
    exclude=st.sampled_from([None, True, False]),
    size=st.integers(1, 70),
    labels=st.booleans(),
)
def test_metrics_are_those_of_a_sort(
    seed: int, users: int, items: int, rows: int, levels: int, exclude: bool | None, size: int, labels: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (users, items))
    model, listed = Scored(torch.from_numpy(scores)), rng.random(items) < 0.8
    model.in_catalogue.copy_(torch.from_numpy(listed))
    parts, chosen, seen = {}, [set[int]() for _ in range(users)], [set[int]() for _ in range(users)]
    for split in ("train", "valid", "test"):
        ids = np.stack([rng.integers(0, users, rows), rng.integers(0, items, rows)], 1)
        label = (rng.random(rows) < 0.6).astype(np.float32) if labels else np.full(rows, np.nan, np.float32)
        parts[split] = Batch(torch.zeros(rows, 0), torch.from_numpy(ids), torch.from_numpy(label))
        for (user, item), y in zip(ids.tolist(), label.tolist(), strict=True):
            if split != "test":
                seen[user].add(item)
            elif y != 0:
                chosen[user].add(item)
    ks = (1, 3, items, items + 5)
    got = evaluate(model, Split(**parts), "test", batch_size=size, top_k=ks, exclude_seen=exclude, loss="bpr")
    assert got is not None
    if not any(chosen):
        assert got.recall is None
        return
    none = [set[int]() for _ in range(users)]
    for k in ks:
        wanted = brute_force(scores, listed, chosen, none if exclude is False else seen, k)
        assert got.recall is not None
        assert got.ndcg is not None
        assert (got.recall[k], got.ndcg[k]) == pytest.approx(wanted, abs=1e-12)


def test_blocks_of_users_and_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    model = Scored(torch.from_numpy(rng.integers(0, 5, (20, 15))))
    ids = torch.from_numpy(np.stack([rng.integers(0, 20, 300), rng.integers(0, 15, 300)], 1))
    data = Split(train=Batch(torch.zeros(300, 0), ids.flip(0), torch.ones(300)),
                 test=Batch(torch.zeros(300, 0), ids, torch.rand(300).round()))  # fmt: skip
    whole = evaluate(model, data, "test")
    for name, value in {
        "train.retrieval_metrics.BLOCK_SCORES": 40,
        "train.retrieval_metrics.MAX_PAIRS": 30,
        "train.retrieval_metrics.CHUNK_ROWS": 8,
        "models.retrieval.BLOCK_ITEMS": 4,
        "models.retrieval.KEPT_BYTES": 0,
    }.items():
        monkeypatch.setattr(f"recsys_embed.{name}", value)
    read, batches = [], data.batches
    data.batches = lambda split, size, **_: read.append(split) or batches(split, size)  # type: ignore[method-assign,func-returns-value]
    held = dict[str, object]()
    assert evaluate(model, data, "test", seen=held) == whole  # type: ignore[arg-type]
    assert len(read) > 5, "earlier rows are read for a part of the users at a time"
    assert not held


@pytest.mark.parametrize("memory_limit", [1 << 30, 0], ids=["in memory", "streamed"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "none"])
def test_a_run_tells_its_metrics_everywhere(tmp_path: Path, labels: bool, memory_limit: int) -> None:
    data = Events(labels=labels, memory_limit=memory_limit)
    config = TrainConfig(
        model="twotower", model_args=ARGS, loss="sampled_softmax", loss_args={"negatives": 10}, epochs=8,
        batch_size=100, learning_rate=0.02, embedding_dim=8, embedding_init="normal:0.1", top_k=(3, 10),
        exclude_seen=False,
    )  # fmt: skip
    outcome = run_training(config, data, folder=tmp_path)
    test = outcome.result.test
    assert test is not None
    assert test.recall is not None
    assert test.ndcg is not None
    assert test.recall[3] > 0.35, "three rows in ten are noise; chance finds one in ten"
    assert test.score == test.ndcg[3]
    assert np.isnan(test.auc) == (not labels)
    written = json.loads((tmp_path / "result.json").read_text())["test"]
    assert written["recall"] == {"3": test.recall[3], "10": test.recall[10]}
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["ndcg@10"] == test.ndcg[10]
    again = evaluate(outcome.model, data, "test", loss=config.loss, top_k=(3, 10), exclude_seen=False)
    assert again is not None
    assert again.recall == test.recall


def test_rows_that_do_not_say_whose_they_are_are_users_each() -> None:
    """One positive each: recall@1 counts rows."""
    scores = torch.tensor([[3, 2, 1], [1, 2, 3]])
    model = Scored(scores)
    model.vectors.schema = Schema([FeatureSpec("person", 2, 1), FeatureSpec("item", 3, 1)])
    ids = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 2], [1, 0]])
    data = Split(test=Batch(torch.zeros(5, 0), ids, torch.tensor([1.0, 1, 1, 1, 0])))
    got = evaluate(model, data, "test", top_k=(1,))
    assert got is not None
    assert got.recall == {1: 3 / 4}


@pytest.mark.parametrize("by", ["user", "padding", "group", "group of strings"])
def test_rows_of_unknown_users_are_users_each_who_have_seen_nothing(by: str) -> None:
    """Users 0 and 1 are one and have seen their best item; the three rows of nobody find theirs."""
    model = Scored(torch.tensor([[3, 2, 1], [3, 2, 1]]))
    if by == "padding":
        model.vectors.schema = Schema([FeatureSpec("user", 2, 1, padding_idx=0), FeatureSpec("item", 3, 1)])
    ids = torch.tensor([[0, 0], [0, 1], [0, 0], [1, 1], [1, 2]])
    nobody = 1 << 32 if by == "group of strings" else -(1 << 63)
    extra = {"group": torch.tensor([nobody, nobody, nobody, 5, 5])} if "group" in by else {}
    train = Batch(torch.zeros(5, 0), torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0], [1, 0]]), torch.ones(5), extra)
    data = Split(train=train, test=Batch(torch.zeros(5, 0), ids, torch.ones(5), extra))
    if by == "user":
        data.unknown_ids = lambda feature: (0,)  # type: ignore[attr-defined]
    for size in (2, 5):
        got = evaluate(model, data, "test", batch_size=size, top_k=(1,))
        assert got is not None
        assert got.recall == {1: (1 + 0 + 1 + 1 / 2) / 4}


def test_items_whose_vectors_are_not_numbers_are_refused() -> None:
    model = Scored(torch.ones(2, 3))
    vectors = torch.eye(3)
    vectors[1] = float("nan")
    model.items = lambda item_ids: vectors[item_ids]  # type: ignore[method-assign]
    ids = torch.tensor([[0, 0], [1, 1]])
    data = Split(test=Batch(torch.zeros(2, 0), ids, torch.full((2,), float("nan"))))
    with pytest.raises(DataError, match="vectors of items are not numbers"):
        evaluate(model, data, "test", top_k=(2,))
    model.in_catalogue[1] = False
    got = evaluate(model, data, "test", top_k=(2,))
    assert got is not None
    assert got.recall == {2: 1 / 2}


@pytest.mark.parametrize("by", ["evaluate", "predict"])
def test_evaluation_leaves_frozen_modules_frozen(by: str) -> None:
    model, batch = Scored(torch.ones(2, 3)), Batch(torch.zeros(1, 0), torch.tensor([[0, 0]]), torch.ones(1))
    model.vectors.eval()
    if by == "evaluate":
        evaluate(model, Split(test=batch), "test")
    else:
        FileScorer(StoredEncoders({"output": "value"}, {})).score(model)(batch)
    assert model.training
    assert not any(module.training for module in model.vectors.modules())


def test_comparisons_tell_recall_and_ndcg(tmp_path: Path) -> None:
    config = TrainConfig(model_args=ARGS, loss="bpr", batch_size=300, embedding_dim=4, top_k=(3, 10))
    comparison = Comparison(models=("twotower",), methods=("hash",), ratios=(3.0,), seeds=2, train=config)
    for labels, clicks in ((True, ("test AUC",)), (False, ())):
        folder = tmp_path / str(labels)
        rows = run_comparison(comparison, Events(labels=labels), folder)
        full, hashed = summarise(rows)
        names = ("recall@3", "recall@10", "NDCG@3", "NDCG@10", *clicks, "dNDCG@3 vs full", "weights MiB")
        titles = header([full, hashed])
        assert titles[3 : 3 + len(names)] == names
        line = dict(zip(titles, cells(hashed, titles), strict=True))
        tests = [r["test"]["ndcg"]["3"] for r in rows]
        mean, gain = (tests[1] + tests[3]) / 2, (tests[1] + tests[3] - tests[0] - tests[2]) / 2
        assert line["NDCG@3"].startswith(f"{mean:.4f} ± ")
        assert line["dNDCG@3 vs full"].startswith(f"{gain:+.4f} ± ")
        assert markdown_table([full, hashed]).count("\n") == 4
        rich_table([full, hashed])
        assert plot_pareto([full, hashed], tmp_path / "p.png") is not None
        assert json.loads(json.dumps(rows)) == run_comparison(comparison, Events(labels=labels), folder)
    other = Comparison(
        models=("twotower",), methods=("hash",), ratios=(3.0,), seeds=2, train=config.replace(loss="logloss")
    )
    with pytest.raises(ConfigError, match=r"other settings \(loss\)"):
        run_comparison(other, Events(), tmp_path / "True")
