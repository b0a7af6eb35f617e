"""A company's table of events, from Parquet files to scores: convert, plan, train with histories, export, predict.

    python examples/own_table.py [--smoke] [--rows 3000000] [--folder FOLDER]

The events are made up, as a shop writes them: users are strings, items are integers beyond 2^53, countries are missing
for some, prices too; a row has the items seen last, tags, a flag, a time and a weight. Clicks follow what a user saw
before and what the item is. The files and everything made from them are left in FOLDER.
Needs: pip install 'recsys-embed[train]'
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import torch

import recsys_embed as rse
from recsys_embed.data import TableSchema, convert_table, open_dataset
from recsys_embed.train import TrainConfig, run_training

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="few rows")
parser.add_argument("--rows", type=int, default=300_000)
parser.add_argument("--folder", type=Path, help="where files go; by default a new temporary folder")
options = parser.parse_args()
rows = 16_000 if options.smoke else options.rows
folder = options.folder or Path(tempfile.mkdtemp())

# -- the table: eight Parquet files, in the order of time --------------------------------------------------------------

ITEMS, KINDS, FILES = 2_000, 40, 8
rng = np.random.default_rng(0)
users = np.sort(rng.choice(max(200, rows // 60), rows))[rng.permutation(rows)]
items = (rng.random(rows) ** 2 * ITEMS).astype(np.int64)
seen = (rng.random((rows, 4)) ** 2 * ITEMS).astype(np.int64)
seen_count = rng.integers(0, 5, rows)
alike = ((seen % KINDS == (items % KINDS)[:, None]) & (np.arange(4) < seen_count[:, None])).sum(1)
taste, appeal = rng.normal(size=users.max() + 1), rng.normal(size=ITEMS)
price = rng.lognormal(2, 1, rows)
logits = 0.5 * taste[users] + 0.5 * appeal[items] + 2.5 * np.minimum(alike, 1) - 0.1 * np.log(price) - 1
clicks = rng.random(rows) < 1 / (1 + np.exp(-logits))
raw = folder / "events"
raw.mkdir(parents=True, exist_ok=True)
for number, part in enumerate(np.array_split(np.arange(rows), FILES)):
    ends = np.append(0, np.cumsum(seen_count[part]))
    flat = pl.Series(seen[part][np.arange(4) < seen_count[part][:, None]] + 2**60)
    frame = pl.DataFrame(
        {
            "click": clicks[part],
            "user": [f"user-{u:08d}" for u in users[part]],
            "item": items[part] + 2**60,
            "country": [None if u % 7 == 0 else f"C{u % 30}" for u in users[part]],
            "last_items": [flat[a:b] for a, b in pairwise(ends)],
            "tags": [[f"tag{i % KINDS}", f"brand{i % 90}"][: 1 + i % 2] for i in items[part]],
            "price": pl.Series(np.where(rng.random(len(part)) < 0.05, np.nan, price[part])).fill_nan(None),
            "member": users[part] % 3 == 0,
            "ts": pl.Series(1_700_000_000 + part * 30).cast(pl.Int64),
            "weight": 0.5 + rng.random(len(part)),
        }
    )
    frame.write_parquet(raw / f"part-{number}.parquet")

# -- a data folder -----------------------------------------------------------------------------------------------------

(folder / "events.toml").write_text(
    """
[columns]
click = { kind = "label" }
user = { kind = "categorical" }
item = { kind = "categorical", vocab = "item" }
country = { kind = "categorical" }
member = { kind = "categorical" }
tags = { kind = "list" }
last_items = { kind = "sequence", vocab = "item", max_length = 20 }
price = { kind = "numeric", transform = "log", indicator = true }
ts = { kind = "time", parts = ["hour", "weekday"] }
weight = { kind = "weight" }

[split]
kind = "time"
valid = 0.1
test = 0.2
"""
)
schema = TableSchema.read(folder / "events.toml")
begin = time.perf_counter()
report = convert_table(str(raw / "*.parquet"), folder / "data", schema)
print(f"converted {sum(report.rows.values()):,} rows in {time.perf_counter() - begin:.1f} s: {report.rows}")
data = open_dataset(folder / "data")
features = data.schema(16)
print(*(f"  {f.name}: {f.num_embeddings:,} ids, table {f.table_name!r}" for f in features), sep="\n")

# -- full tables, and a plan at a tenth of their bytes -----------------------------------------------------------------

common = {"embedding_dim": 16, "batch_size": 512 if options.smoke else 4096, "epochs": 1 if options.smoke else 2}
runs = {
    "dnn, full tables": TrainConfig(model="dnn", model_args={"hidden": [64, 32]}, **common),
    "din, full tables": TrainConfig(model="din", model_args={"hidden": [64, 32]}, **common),
    "din, a tenth": TrainConfig(model="din", model_args={"hidden": [64, 32]}, method="planned", ratio=10, **common),
}
for name, config in runs.items():
    outcome = run_training(config, data, folder=folder / name.replace(", ", "-").replace(" ", "-"), resume=True)
    test = outcome.result.test
    print(
        f"{name:17s} AUC {test.auc:.4f}  logloss {test.logloss:.4f}  tables {outcome.footprint.serve / 2**20:.2f} MiB"
    )

# -- one file to serve, which takes the rows as they are ---------------------------------------------------------------

file = folder / "din.safetensors"
print(rse.export(outcome.model, file, precision="int8", encoders=data))
served = rse.load(file)
begin = time.perf_counter()
scores = served.predict(str(raw / "*.parquet"))
print(f"{len(scores):,} raw rows scored in {time.perf_counter() - begin:.1f} s")
# The rows after training's are the folder's test split: the same ids, so the same scores.
test = data.read("test", 0, data.splits["test"])
with torch.no_grad():
    encoded = torch.sigmoid(served(test.dense, test.inputs)).numpy()
print(f"largest difference from the data folder's own rows: {np.abs(scores[-len(encoded) :] - encoded).max():.1e}")
row = {"user": "user-00000001", "item": 2**60, "country": None, "tags": ["tag0"], "last_items": [2**60 + 40]}
(score,) = served.predict([{**row, "price": None, "member": True, "ts": 1_700_000_000}])
print(f"one row: {score:.4f}")
print(
    f"the same in files: recsys-embed predict {file} '{raw}/*.parquet' --out {folder}/scores.parquet --keep user,item"
)
