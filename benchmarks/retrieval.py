"""Items found on MovieLens-100K: two towers, whole and at a tenth of the bytes, beside the most frequent items.

Run: python benchmarks/retrieval.py FOLDER [--seeds 3] [--epochs 20] [--out FILE]

FOLDER holds u.data, u.user and u.item. Every rating is an event (no label); of each user the last one tests and the one
before it validates, and the history of a row is what its user rated before it (the newest 50). Metrics are over the
whole catalogue without what the user rated before. All end with the epoch of the best validation (NDCG@10).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import torch
from measure import report
from torch import Tensor

from recsys_embed.data import convert_table, open_dataset
from recsys_embed.data.loader import Dataset
from recsys_embed.models import ModelSpec, RetrievalModel
from recsys_embed.plan import Plan
from recsys_embed.train import Metrics, TrainConfig, evaluate, run_training
from recsys_embed.train.catalogue import learn_items

TOP_K = (10, 20)
GENRES = 19
COLUMNS: dict[str, Any] = {
    "user": {"kind": "categorical"},
    "item": {"kind": "categorical", "vocab": "item"},
    **{name: {"kind": "categorical"} for name in ("age", "gender", "occupation")},
    "genres": {"kind": "list"},
    "history": {"kind": "sequence", "vocab": "item", "max_length": 50},
    "group": {"kind": "group", "column": "user"},
    "time": {"kind": "time", "parts": []},
}
SCHEMA = {"columns": COLUMNS, "split": {"kind": "last", "column": "user"}}


def read(folder: Path, name: str, columns: list[str], separator: str) -> pl.DataFrame:
    """One of the data set's files; those of the items are Latin-1."""
    (file,) = folder.glob(f"{name}*")
    encoding = "latin-1" if name == "u.item" else "utf8"
    return pl.read_csv(
        file, separator=separator, has_header=False, new_columns=columns, encoding=encoding, quote_char=None
    )


def events(folder: Path) -> pl.DataFrame:
    """Ratings in the order of time, with what is known of user and item, and the user's history."""
    ratings = read(folder, "u.data", ["user", "item", "rating", "time"], "\t").sort("user", "time", "item")
    users = read(folder, "u.user", ["user", "age", "gender", "occupation", "zip"], "|")
    flags = [f"genre{i}" for i in range(GENRES)]
    items = read(folder, "u.item", ["item", "title", "released", "video", "address", *flags], "|")
    marked = [pl.when(pl.col(flag) == 1).then(pl.lit(flag)) for flag in flags]
    genres = items.select("item", pl.concat_list(marked).list.drop_nulls().alias("genres"))
    # What a user rated in one second has no order but that of the items' numbers.
    past = ratings.with_columns(pl.col("item").cum_count().over("user").alias("turn"))
    windows = past.rolling("turn", period="50i", closed="left", group_by="user")
    history = windows.agg(pl.col("item").alias("history"))
    found = past.join(history, on=["user", "turn"]).join(users, on="user").join(genres, on="item")
    return found.sort("time", "user", "turn")


class Popularity(RetrievalModel):
    """The most frequent items for everybody."""

    key = "popularity"

    def user_vectors(self, dense: Tensor, ids: Any) -> Tensor:
        return torch.ones(len(dense), 1)

    def items(self, item_ids: Tensor) -> Tensor:
        return self.item_counts[item_ids].float().unsqueeze(1)


def popularity(data: Dataset) -> Metrics | None:
    """Metrics of the most frequent items."""
    schema = data.schema(1)
    model = Popularity(ModelSpec(schema, Plan.full(schema), num_dense=data.num_dense), None)
    learn_items(model, data)
    return evaluate(model, data, "test", top_k=TOP_K)


def trained(data: Dataset, seed: int, epochs: int, **changes: Any) -> tuple[Metrics | None, int]:
    """Test metrics of two towers, and bytes of their tables."""
    args = {
        "hidden": [128], "output_dim": 64, "item_features": ["genres"], "item_lists": {"genres": 6}, "normalise": True,
    }  # fmt: skip
    settings: dict[str, Any] = {
        "model_args": args, "loss": "sampled_softmax", "loss_args": {"temperature": 0.1},
        "embedding_dim": 32, "embedding_init": "normal:0.05", "batch_size": 1024, "learning_rate": 1e-3,
        "epochs": epochs, "top_k": TOP_K, "patience": 4, "seed": seed, **changes,
    }  # fmt: skip
    settings["model_args"] = {**args, **changes.get("model_args", {})}
    outcome = run_training(TrainConfig(model="twotower", **settings), data, show_progress=False)
    return outcome.result.test, outcome.footprint.serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", help="also write the JSON there")
    options = parser.parse_args()
    contenders: dict[str, dict[str, Any]] = {
        "twotower": {},
        "twotower, a tenth of the bytes": {"method": "planned", "ratio": 10},
    }
    with tempfile.TemporaryDirectory() as name:
        convert_table(events(options.folder), Path(name) / "data", SCHEMA)
        data = open_dataset(Path(name) / "data")
        rows = [row("most frequent items", [popularity(data)], 0)]
        for contender, changes in contenders.items():
            each = [trained(data, seed, options.epochs, **changes) for seed in range(options.seeds)]
            rows.append(row(contender, [metrics for metrics, _ in each], each[0][1]))
        report("retrieval", rows)


def row(contender: str, each: list[Metrics | None], size: int) -> dict[str, Any]:
    """Means and standard deviations over seeds."""
    found: dict[str, Any] = {"contender": contender, "bytes": size}
    for title, values in (
        ("recall@20", [m.recall[20] for m in each if m is not None and m.recall]),
        ("ndcg@10", [m.ndcg[10] for m in each if m is not None and m.ndcg]),
    ):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found |= {title: round(statistics.mean(values), 4), f"{title} std": round(spread, 4)}
    print(found, file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
