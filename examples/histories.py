"""Histories from a plain list of ratings: what a user liked before, as a column, and DIN beside a network without it.

    python examples/histories.py [--smoke] [FOLDER]

FOLDER holds MovieLens-100K's u.data (https://files.grouplens.org/datasets/movielens/ml-100k.zip); without it the
ratings are made up. A rating of 4 or more is a click. The history of a row is the items that its user rated so before
that moment, and all events of the test rows come after those of training.
Needs: pip install 'recsys-embed[train]'
"""

import tempfile
from pathlib import Path

import numpy as np
import polars as pl
from shared.ratings import read_options, read_ratings

from recsys_embed.data import convert_table, open_dataset
from recsys_embed.train import TrainConfig, run_training

options = read_options(__doc__)

# -- ratings: user, item, rating, time ---------------------------------------------------------------------------------

if options.folder:
    ratings = read_ratings(options.folder)
else:
    # Users come and go, so that test rows are of users whose ids training has hardly seen.
    rows, genres, rng = 5_000 if options.smoke else 50_000, 8, np.random.default_rng(0)
    user = (np.arange(rows) + rng.integers(0, 2_000, rows)) // 40
    item = (rng.random(rows) ** 2 * 200).astype(np.int64)
    liked = rng.random(rows) < np.where(item % genres < 3, 0.2, 0.1) + 0.7 * (item % genres == user % genres)
    ratings = pl.DataFrame({"user": user, "item": item, "rating": 3 + liked, "time": np.arange(rows)})

# -- a history for every rating: the window of its user that ends before it --------------------------------------------

ratings = ratings.sort("user", "time", "item")
windows = ratings.rolling("time", period=f"{2**40}i", closed="left", group_by="user")
history = windows.agg(pl.col("item").filter(pl.col("rating") >= 4).tail(50).alias("history"))
events = ratings.join(history.unique(["user", "time"]), on=["user", "time"]).sort("time", "user", "item")
print(events.select("user", "item", "rating", "history").tail(3))

# -- a data folder: one vocabulary, and so one table, for items and histories ------------------------------------------

folder = Path(tempfile.mkdtemp())
schema = {
    "columns": {
        "rating": {"kind": "label", "threshold": 4},
        "user": {"kind": "categorical"},
        "item": {"kind": "categorical", "vocab": "item"},
        "history": {"kind": "sequence", "vocab": "item", "max_length": 50},
        "time": {"kind": "time", "parts": []},
    },
    "split": {"kind": "time", "valid": 0.1, "test": 0.1},
}
print(convert_table(events, folder / "data", schema).rows)
data = open_dataset(folder / "data")

# -- with the history as a mean of its items, and weighed by the candidate ---------------------------------------------

common = {"embedding_dim": 16, "batch_size": 256, "epochs": 2 if options.smoke else 6}
for model, method in (("dnn", {}), ("din", {}), ("din", {"method": "planned", "ratio": 10})):
    config = TrainConfig(model=model, model_args={"hidden": [64, 32]}, **method, **common)
    outcome = run_training(config, data)
    test, size = outcome.result.test, outcome.footprint.serve / 2**10
    print(f"{model}, {method.get('method', 'full')}: AUC {test.auc:.4f}, tables {size:.0f} KiB")
