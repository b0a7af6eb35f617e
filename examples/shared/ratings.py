"""What the examples of ratings have in common: their options, and the reader of MovieLens-100K."""

import argparse
from pathlib import Path

import polars as pl


def read_options(about: str) -> argparse.Namespace:
    """Options ``[--smoke] [FOLDER]`` of a script whose docstring is ``about``."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--smoke", action="store_true", help="few rows and epochs")
    return parser.parse_args()


def read_ratings(folder: Path) -> pl.DataFrame:
    """Columns ``user``, ``item``, ``rating`` and ``time`` of u.data."""
    (file,) = folder.glob("u.data*")
    names = ["user", "item", "rating", "time"]
    return pl.read_csv(
        file, separator="\t", has_header=False, new_columns=names, schema_overrides=[pl.Int64] * len(names)
    )
