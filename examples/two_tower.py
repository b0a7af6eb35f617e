"""Two towers from a plain list of events to a file that finds items for users, on MovieLens-100K or made-up ratings.

    python examples/two_tower.py [--smoke] [FOLDER]

FOLDER holds MovieLens-100K's u.data (https://files.grouplens.org/datasets/movielens/ml-100k.zip); without it the
events are made up. Every rating is an event, there are no labels: a softmax over the items of the batch and some more
learns which item a user took. The last event of each user tests.
Needs: pip install 'recsys-embed[train]'
"""

import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import torch
from shared.ratings import read_options, read_ratings

import recsys_embed as rse
from recsys_embed.data import convert_table, open_dataset
from recsys_embed.train import TrainConfig, run_training

options = read_options(__doc__)

# -- events: user, item, time ------------------------------------------------------------------------------------------

if options.folder:
    events = read_ratings(options.folder).drop("rating")
else:
    # Items are of a kind each; a user likes one kind, and frequent items of it most.
    rows, kinds, rng = 6_000 if options.smoke else 60_000, 8, np.random.default_rng(0)
    user = rng.integers(0, rows // 40, rows)
    item = (rng.random(rows) ** 2 * 60).astype(np.int64) * kinds
    item += np.where(rng.random(rows) < 0.8, user % kinds, rng.integers(0, kinds, rows))
    events = pl.DataFrame({"user": user, "item": item, "time": np.arange(rows)})

# -- a data folder without labels; the history of a row is what its user took before it --------------------------------

events = events.sort("user", "time", "item").with_columns(pl.col("item").cum_count().over("user").alias("turn"))
past = events.rolling("turn", period="20i", closed="left", group_by="user").agg(pl.col("item").alias("history"))
events = events.join(past, on=["user", "turn"]).sort("time", "user", "turn")
folder = Path(tempfile.mkdtemp())
schema = {
    "columns": {
        "user": {"kind": "categorical"},
        "item": {"kind": "categorical", "vocab": "item"},
        "history": {"kind": "sequence", "vocab": "item", "max_length": 20},
        "group": {"kind": "group", "column": "user"},
        "time": {"kind": "time", "parts": []},
    },
    "split": {"kind": "last", "column": "user"},
}
print(convert_table(events, folder / "data", schema).rows)
data = open_dataset(folder / "data")

# -- whole tables, and a tenth of their bytes --------------------------------------------------------------------------

common = {
    "model": "twotower",
    "model_args": {"hidden": [64], "output_dim": 32, "normalise": True},
    "loss": "sampled_softmax",
    "loss_args": {"temperature": 0.1, "negatives": 100},
    "embedding_dim": 16,
    "embedding_init": "normal:0.05",
    "batch_size": 512,
    "learning_rate": 3e-3,
    "top_k": [10, 20],
    "epochs": 2 if options.smoke else 10,
}
for method in ({}, {"method": "planned", "ratio": 10}):
    outcome = run_training(TrainConfig(**common, **method), data)
    test, size = outcome.result.test, outcome.footprint.serve / 2**10
    print(
        f"{method.get('method', 'full')}: recall@20 {test.recall[20]:.4f}, NDCG@10 {test.ndcg[10]:.4f}, "
        f"tables {size:.0f} KiB"
    )

# -- one file: from raw rows to the items that a user does not know yet, and vectors for an index of neighbours --------

rse.export(outcome.model, folder / "towers.rse", "int8", encoders=data)
served = rse.load(folder / "towers.rse")
rows = events.tail(3).select("user", "history")
best = served.recommend(rows, k=5, exclude="history")
for user, items in zip(rows["user"], best.items.tolist(), strict=True):
    print(f"user {user}: items {items}")
batch = next(iter(data.batches("test", 3, shuffle=False)))
print("vectors", tuple(served.users(batch.dense, batch.inputs).shape), tuple(served.items(torch.arange(10)).shape))
