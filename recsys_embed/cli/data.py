"""``recsys-embed data``: any table or Criteo text to a data folder, synthetic data, statistics."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from recsys_embed.cli._inspect import inspect
from recsys_embed.cli._preset import preset
from recsys_embed.cli._table import (
    Json,
    Memory,
    Only,
    Overwrite,
    SplitSeed,
    TestFiles,
    TestShare,
    ValidFiles,
    ValidShare,
    Workers,
    given_settings,
    say_rows,
    show_progress,
    table,
)
from recsys_embed.core.footprint import parse_bytes
from recsys_embed.data import CriteoOptions, SplitRule, TableSplit, convert_criteo, make_synthetic, open_dataset
from recsys_embed.data.criteo.planted import DEFAULT_ROWS, DEFAULT_SCALE
from recsys_embed.data.stats import read_stats, stats_table

data_app = typer.Typer(no_args_is_help=True, help="Make and inspect data folders.")
data_app.command("table")(table)
data_app.command("inspect")(inspect)
data_app.command("preset")(preset)

Ids = Annotated[Literal["vocab", "raw"], typer.Option(help="vocab: by training frequency; raw: the hashes themselves.")]
MinCount = Annotated[int, typer.Option(help="Training rows a category must occur in to get an id (vocab).")]
Dense = Annotated[Literal["log", "bucket"], typer.Option(help="Integers as logarithms, or bucketed to categories.")]
Split = Annotated[
    Literal["order", "random", "file", "all"],
    typer.Option(help="order: by time, the last rows test; random: by seed; file: by name; all: one split."),
]


def _rule(
    kind: str,
    valid: str | None,
    test: str | None,
    seed: int | None,
    valid_files: list[str] | None = None,
    test_files: list[str] | None = None,
    only: str | None = None,
) -> SplitRule:
    """The rule that options name.

    Raises:
        ConfigError: an option that the split does not have.
    """
    shares = given_settings(valid=valid, test=test, seed=seed)
    files = given_settings(valid_files=valid_files, test_files=test_files, only=only)
    rule = TableSplit.from_dict({"kind": kind, **shares, **files}).rule
    return cast("SplitRule", rule)  # the other kinds are no choices here


@data_app.command()
def criteo(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT... OUT", help="Files, globs or folders; then OUT.")],
    ids: Ids = "vocab",
    min_count: MinCount = 2,
    id_bits: Annotated[int, typer.Option(help="32: 8 hex digits; 64: up to 16.")] = 32,
    dense: Dense = "log",
    split: Annotated[
        Literal["order", "random", "file", "all"] | None,
        typer.Option(help="order (default): by time, the last rows test; random: by seed; file: by name; all: one."),
    ] = None,
    valid: ValidShare = None,
    test: TestShare = None,
    split_seed: SplitSeed = None,
    valid_file: ValidFiles = None,
    test_file: TestFiles = None,
    only: Only = None,
    header: Annotated[Literal["auto", "yes", "no"], typer.Option(help="Whether files start with a header.")] = "auto",
    labels: Annotated[Literal["auto", "yes", "no"], typer.Option(help="Whether rows start with a label.")] = "auto",
    separator: Annotated[Literal["tab", "comma", "semicolon", "pipe"], typer.Option(help="Between fields.")] = "tab",
    on_bad_row: Annotated[
        Literal["fail", "quarantine"], typer.Option(help="Stop, or set bad rows aside in quarantine.jsonl.")
    ] = "fail",
    max_memory: Memory = "1GiB",
    workers: Workers = 0,
    like: Annotated[Path | None, typer.Option(help="Data folder whose vocabularies encode these rows.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert Criteo's tab-separated text (plain, .gz or .zst) into a data folder.

    Killed conversions continue when the same command is run again. With --like DIR rows get the ids of that folder and
    go to one split (test unless --only says otherwise).
    """
    if len(inputs) < 2:
        raise typer.BadParameter("expected INPUT... and OUT", param_hint="INPUT... OUT")
    *sources, out = inputs
    kind = split or ("file" if valid_file or test_file else "all" if like else "order")
    rule = _rule(kind, valid, test, split_seed, valid_file, test_file, only)
    options = CriteoOptions(
        ids=ids, min_count=min_count, id_bits=cast("Any", id_bits), dense=dense, split=rule, header=header,
        labels=labels, separator=separator, on_bad_row=on_bad_row, max_memory=parse_bytes(max_memory),
        workers=workers, like=like,
    )  # fmt: skip
    with show_progress(as_json) as progress:
        report = convert_criteo(list(sources), out, options, overwrite=overwrite, progress=progress)
    for notice in report.notices:
        print(notice, file=sys.stderr)
    stats = read_stats(out)
    result = {"out": out, "rows": report.rows, "quarantined": report.quarantined, "already_done": report.already_done}
    if as_json:
        print(json.dumps({**result, "file_faults": stats["file_faults"]}))
        return
    say_rows(out, report.rows, report.already_done)
    if report.quarantined:
        print(f"{report.quarantined:,} bad rows set aside in {out}/quarantine.jsonl")
    for fault in stats["file_faults"]:
        print(f"fault: {fault}")
    if any("oov_rate" in f for f in stats["fields"].values()):
        print(f"unknown ids (mean over fields): {_mean_rates(stats, 'oov_rate')}")


@data_app.command()
def synthetic(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    rows: Annotated[int, typer.Option(help="Rows to make.")] = DEFAULT_ROWS,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    scale: Annotated[float, typer.Option(help="Factor on Criteo's cardinalities.")] = DEFAULT_SCALE,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave out the data folder.")] = False,
    ids: Ids = "vocab",
    min_count: MinCount = 2,
    dense: Dense = "log",
    split: Split = "order",
    valid: ValidShare = None,
    test: TestShare = None,
    split_seed: SplitSeed = None,
    max_memory: Memory = "1GiB",
    workers: Workers = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make Criteo-shaped rows from a planted click model, whose attainable AUC is known, and their data folder."""
    rule = _rule(split, valid, test, split_seed)
    options = CriteoOptions(
        ids=ids, min_count=min_count, dense=dense, split=rule, max_memory=parse_bytes(max_memory), workers=workers
    )
    with show_progress(as_json) as progress:
        made = make_synthetic(
            out, rows, seed, scale=scale, options=options, text_only=text_only, overwrite=overwrite, progress=progress
        )
    if as_json:
        result = {"out": str(out), "rows": rows, "click_rate": made.click_rate, "attainable": made.attainable}
        print(json.dumps({**result, "already_done": made.already_done}))
        return
    if text_only:
        print(f"{out}: {rows:,} rows of text")
    else:
        say_rows(str(out), open_dataset(out).splits, made.already_done)
    print(f"click rate {made.click_rate:.4f}; attainable by the planted model itself:")
    for name, best in made.attainable.items():
        print(f"  {name:5s} AUC {best['auc']:.4f}  logloss {best['logloss']:.4f}")


@data_app.command()
def stats(
    folder: Annotated[Path, typer.Argument(help="A data folder.")],
    as_json: Json = False,
) -> None:
    """Cardinality, frequency curve, missing and unknown shares of every field."""
    data = open_dataset(folder)
    if as_json:
        print(json.dumps(data.stats))
        return
    header, rows = stats_table(data.stats)
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    for name, split in data.stats["splits"].items():
        mean = split.get("label_mean")
        rate = "no labels" if mean is None else f"mean label {mean:.4f}"
        rate = rate if split["click_rate"] is None else f"click rate {split['click_rate']:.4f}"
        console.print(f"{name}: {split['rows']:,} rows, {rate}", highlight=False)
    table = Table(caption="Distinct values, frequency curve: training rows; the empty field counts as a value.")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _mean_rates(stats: dict[str, Any], key: str) -> str:
    rates: dict[str, list[float]] = {}
    for field in stats["fields"].values():
        for split, value in field.get(key, {}).items():
            rates.setdefault(split, []).append(value)
    return ", ".join(f"{split} {100 * sum(v) / len(v):.2f} %" for split, v in rates.items())
