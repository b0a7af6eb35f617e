"""DIN and SASRec beside RecBole's, on the same rows of MovieLens-100K with the same histories.

Run: python benchmarks/beside_recbole.py FOLDER [--task din|next] [--seeds 3] [--epochs 8] [--out FILE]

FOLDER holds u.data. All contenders of a task see the same rows, and have equal widths, batch sizes, rates and epochs;
all end with the epoch of the best validation. Needs: pip install recbole==1.2.1

``din``: a rating of 4 or more is a click, the history of a row is what its user rated so before it (the newest 50), and
validation and test are the last two tenths in time, as in ``examples/histories.py``. RecBole's DIN has no vector of the
user, so that ``din`` has none either; ``din, user`` adds it.

``next``: every rating is an event, the history of a row is what its user rated before it (the newest 20), the last
event of a user tests and the one before validates. Recall@10 and NDCG@10 rank all items, seen ones too, as RecBole does
for models of sequences. The loss is the cross entropy over all items.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from measure import report

from recsys_embed.data import convert_table, open_dataset
from recsys_embed.train import TrainConfig, run_training

SPLITS = ("train", "valid", "test")
HIDDEN = [64, 32]
RATE = {"din": 1e-3, "next": 3e-3}
WIDTH = {"din": 16, "next": 32}
BATCH = {"din": 512, "next": 512}
LONGEST = {"din": 50, "next": 20}
Contender = Callable[[int], dict[str, float]]


def read(file: Path) -> pl.DataFrame:
    names = ["user", "item", "rating", "time"]
    return pl.read_csv(file, separator="\t", has_header=False, new_columns=names).sort("user", "time", "item")


def clicks(file: Path) -> pl.DataFrame:
    """Ratings in the order of time, with what was liked before, and the split each belongs to."""
    ratings = read(file)
    windows = ratings.rolling("time", period=f"{2**40}i", closed="left", group_by="user")
    history = windows.agg(pl.col("item").filter(pl.col("rating") >= 4).tail(LONGEST["din"]).alias("history"))
    found = ratings.join(history.unique(["user", "time"]), on=["user", "time"]).sort("time", "user", "item")
    share = pl.int_range(pl.len()) / pl.len()
    split = pl.when(share < 0.8).then(pl.lit("train")).when(share < 0.9).then(pl.lit("valid")).otherwise(pl.lit("test"))
    return found.with_columns((pl.col("rating") >= 4).cast(pl.Int8).alias("label"), split.alias("split"))


def next_items(file: Path) -> pl.DataFrame:
    """All but the first event of each user, with what came before; events of one second are in the order of items."""
    events = read(file).with_columns(pl.int_range(pl.len()).over("user").alias("number"))
    windows = events.rolling("number", period=f"{LONGEST['next']}i", closed="left", group_by="user")
    history = windows.agg(pl.col("item").alias("history"))
    left = pl.len().over("user") - 1 - pl.col("number")
    split = pl.when(left == 0).then(pl.lit("test")).when(left == 1).then(pl.lit("valid")).otherwise(pl.lit("train"))
    found = events.with_columns(split.alias("split")).join(history, on=["user", "number"])
    return found.filter(pl.col("number") > 0)


def as_recbole_knew_it() -> None:
    """What RecBole 1.2.1 expects of ray, of numpy before 2 and of pandas before 3."""
    import pandas as pd

    for name in ("ray", "ray.tune"):
        sys.modules.setdefault(name, types.ModuleType(name))
    for old, new in {"float_": "float64", "complex_": "complex128", "unicode_": "str_", "bool8": "bool_"}.items():
        if not hasattr(np, old):
            setattr(np, old, getattr(np, new))
    # It reads the checkpoints that it wrote, which hold more than weights.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    # ``agg(len)`` was the length of every list.
    agg = pd.Series.agg
    pd.Series.agg = lambda self, func, *args, **kw: self.map(len) if func is len else agg(self, func, *args, **kw)
    sys.argv = ["recbole"]
    logging.disable(logging.CRITICAL)


def recbole_files(table: pl.DataFrame, folder: Path) -> None:
    """The splits as RecBole's atomic files."""
    (folder / "ml").mkdir()
    names = {
        "user": "user_id:token",
        "history": "item_id_list:token_seq",
        "item": "item_id:token",
        "label": "label:float",
    }
    # A separator alone is an empty history; nothing would be a missing value.
    table = table.with_columns(pl.col("history").cast(pl.List(pl.String)).list.join(" ") + " ")
    for split in SPLITS:
        part = table.filter(pl.col("split") == split).select(pl.col(k).alias(v) for k, v in names.items() if k in table)
        part.write_csv(folder / "ml" / f"ml.{split}.inter", separator="\t", quote_style="never")


def recbole(model: str, folder: Path, task: str, epochs: int, seed: int) -> dict[str, float]:
    """Test metrics of a model of RecBole's."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    columns = ["user_id", "item_id", "item_id_list"]
    options: dict[str, Any] = {
        "data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "benchmark_filename": list(SPLITS),
        "alias_of_item_id": ["item_id_list"], "MAX_ITEM_LIST_LENGTH": LONGEST[task], "train_neg_sample_args": None,
        "metric_decimal_place": 6, "epochs": epochs, "stopping_step": epochs, "train_batch_size": BATCH[task],
        "learning_rate": RATE[task], "seed": seed, "use_gpu": False, "gpu_id": "", "show_progress": False,
        "state": "ERROR",
    }  # fmt: skip
    if task == "din":
        options |= {
            "load_col": {"inter": [*columns, "label"]}, "LABEL_FIELD": "label", "metrics": ["AUC"],
            "eval_args": {"mode": "labeled", "order": "TO", "group_by": None}, "valid_metric": "AUC",
            "embedding_size": WIDTH[task], "mlp_hidden_size": HIDDEN, "dropout_prob": 0.0,
        }  # fmt: skip
    else:
        options |= {
            "load_col": {"inter": columns}, "metrics": ["Recall", "NDCG"], "topk": [10], "valid_metric": "NDCG@10",
            "eval_args": {"mode": "full", "order": "TO", "group_by": None}, "loss_type": "CE", "n_layers": 1,
            "n_heads": 1, "hidden_size": WIDTH[task], "inner_size": WIDTH[task], "hidden_dropout_prob": 0.2,
            "attn_dropout_prob": 0.2,
        }  # fmt: skip
    config = Config(model=model, dataset="ml", config_dict=options)
    init_seed(seed, True)
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(seed, True)
    made = get_model(model)(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, made)
    trainer.fit(train, valid, verbose=False, saved=True, show_progress=False)
    return {name: float(value) for name, value in trainer.evaluate(test, show_progress=False).items()}


def ours(model: str, folder: Path, task: str, epochs: int, seed: int, **more: Any) -> dict[str, float]:
    """Test metrics of a model of this library's."""
    config = TrainConfig(
        model=model,
        embedding_dim=WIDTH[task],
        batch_size=BATCH[task],
        learning_rate=RATE[task],
        epochs=epochs,
        seed=seed,
        **more,
    )
    test = run_training(config, open_dataset(folder), show_progress=False).result.test
    if task == "din":
        return {"auc": test.auc}
    return {"recall@10": test.recall[10], "ndcg@10": test.ndcg[10]}


def contenders(task: str, folder: Path, epochs: int) -> dict[str, Contender]:
    items, user = folder / "items", folder / "user"
    tenth = {"method": "planned", "ratio": 10}
    if task == "din":
        args = {"model_args": {"hidden": HIDDEN}}
        return {
            "RecBole's DIN": lambda seed: recbole("DIN", folder, task, epochs, seed),
            "din": lambda seed: ours("din", items, task, epochs, seed, **args),
            "din, 10x": lambda seed: ours("din", items, task, epochs, seed, **args, **tenth),
            "dnn (mean of the history)": lambda seed: ours("dnn", items, task, epochs, seed, **args),
            "din, user": lambda seed: ours("din", user, task, epochs, seed, **args),
        }
    loss: dict[str, Any] = {"loss": "softmax", "exclude_seen": False}
    sasrec = {"model_args": {"max_length": LONGEST[task], "blocks": 1, "heads": 1, "dropout": 0.2}, **loss}
    towers = {"model_args": {"hidden": [64], "item_hidden": [], "output_dim": 32}, **loss}
    return {
        "RecBole's SASRec": lambda seed: recbole("SASRec", folder, task, epochs, seed),
        "sasrec": lambda seed: ours("sasrec", items, task, epochs, seed, **sasrec),
        "sasrec, 10x": lambda seed: ours("sasrec", items, task, epochs, seed, **sasrec, **tenth),
        "twotower (mean of the history, user)": lambda seed: ours("twotower", user, task, epochs, seed, **towers),
        "twotower, 10x": lambda seed: ours("twotower", user, task, epochs, seed, **towers, **tenth),
    }


def convert(table: pl.DataFrame, folder: Path, task: str) -> None:
    """Data folders with and without a vector of the user."""
    columns: dict[str, Any] = {
        "item": {"kind": "categorical", "vocab": "item"},
        "history": {"kind": "sequence", "vocab": "item", "max_length": LONGEST[task]},
    }
    if task == "din":
        columns["label"] = {"kind": "label"}
    split = {"kind": "column", "column": "split"}
    convert_table(table, folder / "items", {"columns": columns, "split": split})
    convert_table(table, folder / "user", {"columns": {"user": {"kind": "categorical"}, **columns}, "split": split})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=["din", "next"], default="din")
    parser.add_argument("--only", nargs="*", help="of the contenders, those whose names begin so")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", help="also write the JSON there")
    options = parser.parse_args()
    (file,) = options.folder.resolve().glob("u.data*")
    if options.out:
        options.out = str(Path(options.out).resolve())
    given, here, rows = sys.argv, Path.cwd(), []
    table = clicks(file) if options.task == "din" else next_items(file)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert(table, folder, options.task)
        recbole_files(table, folder)
        as_recbole_knew_it()
        os.chdir(folder)  # where it leaves logs
        for contender, run in contenders(options.task, folder, options.epochs).items():
            if options.only and not any(contender.startswith(start) for start in options.only):
                continue
            each = [run(seed) for seed in range(options.seeds)]
            for metric in each[0]:
                values = [round(found[metric], 5) for found in each]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                about = {"task": options.task, "contender": contender, "metric": metric}
                rows.append(
                    {**about, "mean": round(statistics.mean(values), 5), "std": round(spread, 5), "each": values}
                )
                print(rows[-1], file=sys.stderr, flush=True)
        os.chdir(here)
    sys.argv = ["", "--out", options.out] if options.out else given
    report("beside_recbole", rows)


if __name__ == "__main__":
    main()
