"""``recsys-embed data inspect``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.data import inspect_table
from recsys_embed.errors import ConfigError

ReaderOptions = Annotated[
    list[str] | None,
    typer.Option(help="Option of the reader of files, NAME=VALUE: separator=';', names=user,item, format=csv."),
]


def inspect(
    inputs: Annotated[list[str], typer.Argument(metavar="FILES...", help="Files, globs or folders.")],
    rows: Annotated[int, typer.Option(min=1, help="Most rows to look at.")] = 100_000,
    source: ReaderOptions = None,
    as_json: opt.Json = False,
) -> None:
    """Print a schema guessed from a sample, as TOML for `data table --schema`.

    Comments tell each column's cardinality, missing share and examples, and warn of what a person should look at.
    """
    found = inspect_table(inputs, rows=rows, options=reader_options(source or []))
    print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False, default=str) if as_json else found.to_toml())


def reader_options(texts: list[str]) -> dict[str, Any]:
    """Options of a reader of files as the command line has them."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--source takes NAME=VALUE, e.g. separator=';'; got {text!r}")
        name = name.strip()
        if name in ("names", "nulls"):
            found[name] = value.split(",")
        else:
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value.replace("\\t", "\t")
    return found
