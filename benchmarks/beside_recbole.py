"""DIN beside RecBole's, on the same rows of MovieLens-100K with the same histories.

Run: python benchmarks/beside_recbole.py FOLDER [--seeds 3] [--epochs 10] [--out FILE]

FOLDER holds u.data. A rating of 4 or more is a click, the history of a row is what its user rated so before it (the
newest 50), and validation and test are the last two tenths in time, as in ``examples/histories.py``. RecBole's DIN has
no vector of the user, so that ``din`` has none either; ``din, user`` adds it. Widths, batch size, rate and epochs are
equal; all end with the epoch of the best validation. Needs: pip install recbole==1.2.1
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from measure import report

from recsys_embed.data import convert_table, open_dataset
from recsys_embed.train import TrainConfig, run_training

HIDDEN, WIDTH, BATCH, RATE, LONGEST = [64, 32], 16, 512, 1e-3, 50
SPLITS = ("train", "valid", "test")


def events(file: Path) -> pl.DataFrame:
    """Ratings in the order of time, with histories and the split each belongs to."""
    names = ["user", "item", "rating", "time"]
    ratings = pl.read_csv(file, separator="\t", has_header=False, new_columns=names).sort("user", "time", "item")
    windows = ratings.rolling("time", period=f"{2**40}i", closed="left", group_by="user")
    history = windows.agg(pl.col("item").filter(pl.col("rating") >= 4).tail(LONGEST).alias("history"))
    found = ratings.join(history.unique(["user", "time"]), on=["user", "time"]).sort("time", "user", "item")
    share = pl.int_range(pl.len()) / pl.len()
    split = pl.when(share < 0.8).then(pl.lit("train")).when(share < 0.9).then(pl.lit("valid")).otherwise(pl.lit("test"))
    return found.with_columns((pl.col("rating") >= 4).cast(pl.Int8).alias("label"), split.alias("split"))


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
    """The splits as RecBole's atomic files; an empty history is padding alone."""
    (folder / "ml").mkdir()
    columns = {
        "user": "user_id:token",
        "history": "item_id_list:token_seq",
        "item": "item_id:token",
        "label": "label:float",
    }
    for split in SPLITS:
        # A separator alone is an empty history; nothing would be a missing value.
        history = pl.col("history").cast(pl.List(pl.String)).list.join(" ") + " "
        part = table.filter(pl.col("split") == split).with_columns(history)
        part.select(pl.col(old).alias(new) for old, new in columns.items()).write_csv(
            folder / "ml" / f"ml.{split}.inter", separator="\t", quote_style="never"
        )


def recbole_auc(folder: Path, epochs: int, seed: int) -> float:
    """Test AUC of RecBole's DIN."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    config = Config(
        model="DIN",
        dataset="ml",
        config_dict={
            "data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "benchmark_filename": list(SPLITS),
            "load_col": {"inter": ["user_id", "item_id", "item_id_list", "label"]},
            "alias_of_item_id": ["item_id_list"], "MAX_ITEM_LIST_LENGTH": LONGEST, "LABEL_FIELD": "label",
            "train_neg_sample_args": None, "eval_args": {"mode": "labeled", "order": "TO", "group_by": None},
            "metrics": ["AUC"], "valid_metric": "AUC", "metric_decimal_place": 6, "epochs": epochs,
            "stopping_step": epochs, "train_batch_size": BATCH, "learning_rate": RATE, "embedding_size": WIDTH,
            "mlp_hidden_size": HIDDEN, "dropout_prob": 0.0, "seed": seed, "use_gpu": False, "gpu_id": "",
            "show_progress": False, "state": "ERROR",
        },
    )  # fmt: skip
    init_seed(seed, True)
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    init_seed(seed, True)
    model = get_model("DIN")(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], "DIN")(config, model)
    trainer.fit(train, valid, verbose=False, saved=True, show_progress=False)
    return float(trainer.evaluate(test, show_progress=False)["auc"])


def our_auc(folder: Path, model: str, epochs: int, seed: int, **more: Any) -> float:
    config = TrainConfig(
        model=model,
        model_args={"hidden": HIDDEN},
        embedding_dim=WIDTH,
        batch_size=BATCH,
        learning_rate=RATE,
        epochs=epochs,
        seed=seed,
        **more,
    )
    return float(run_training(config, open_dataset(folder), show_progress=False).result.test.auc)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", help="also write the JSON there")
    options = parser.parse_args()
    (file,) = options.folder.glob("u.data*")
    table, given = events(file), sys.argv
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recbole_files(table, folder)
        columns: dict[str, Any] = {
            "label": {"kind": "label"},
            "user": {"kind": "categorical"},
            "item": {"kind": "categorical", "vocab": "item"},
            "history": {"kind": "sequence", "vocab": "item", "max_length": LONGEST},
        }
        split = {"kind": "column", "column": "split"}
        convert_table(table, folder / "user", {"columns": columns, "split": split})
        del columns["user"]
        convert_table(table, folder / "items", {"columns": columns, "split": split})
        as_recbole_knew_it()
        os.chdir(folder)  # where it leaves logs
        contenders = {
            "RecBole's DIN": lambda seed: recbole_auc(folder, options.epochs, seed),
            "din": lambda seed: our_auc(folder / "items", "din", options.epochs, seed),
            "din, a tenth of the bytes": lambda seed: our_auc(
                folder / "items", "din", options.epochs, seed, method="planned", ratio=10
            ),
            "dnn (mean of the history)": lambda seed: our_auc(folder / "items", "dnn", options.epochs, seed),
            "din, user": lambda seed: our_auc(folder / "user", "din", options.epochs, seed),
        }
        rows = []
        for name, auc in contenders.items():
            each = [auc(seed) for seed in range(options.seeds)]
            spread = statistics.stdev(each) if len(each) > 1 else 0.0
            rows.append(
                {"contender": name, "auc": round(statistics.mean(each), 5), "std": round(spread, 5), "each": each}
            )
            print(rows[-1], file=sys.stderr)
        sys.argv = given
        report("beside_recbole", rows)


if __name__ == "__main__":
    main()
