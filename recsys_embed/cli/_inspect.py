"""``recsys-embed data inspect``."""

from __future__ import annotations

import json
import tomllib
from typing import Annotated, Any

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.data import inspect_table
from recsys_embed.errors import ConfigError

_BY_COLUMN = {"types": "price=float", "kinds": "7=numeric", "lists": "tags='|'"}
"""Options of readers that have a value per column, and an example."""
ReaderOptions = Annotated[
    list[str] | None,
    typer.Option(help="Option of the reader of files, NAME=VALUE: separator=';', names=user,item, types.price=float."),
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
    """Options of a reader of files as the command line has them.

    >>> reader_options(["separator=;", "nulls=n/a,-", "types.price=float", "types.zip=string"])
    {'separator': ';', 'nulls': ['n/a', '-'], 'types': {'price': 'float', 'zip': 'string'}}
    """
    found: dict[str, Any] = {}
    by_column: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--source takes NAME=VALUE, e.g. separator=';'; got {text!r}")
        name = name.strip()
        kind, dot, column = name.partition(".")
        if dot and kind in _BY_COLUMN:
            by_column.setdefault(kind, {})[column] = value
        elif name in _BY_COLUMN:
            by_column.setdefault(name, {}).update(_table(name, value))
        elif name in ("names", "nulls"):
            found[name] = value.split(",")
        else:
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value.replace("\\t", "\t")
    return {**found, **by_column}


def _table(name: str, value: str) -> dict[str, Any]:
    """An option that goes by column, as a table of TOML or JSON."""
    for read in (json.loads, lambda text: tomllib.loads(f"x = {text}")["x"]):
        try:
            found = read(value)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise ConfigError(f"--source {name} goes by column, e.g. --source {name}.{_BY_COLUMN[name]}; got {value!r}")
