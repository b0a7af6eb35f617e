"""``recsys-embed data table``, and what it shares with the other commands of ``data``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recsys_embed.cli._inspect import ReaderOptions, reader_options
from recsys_embed.core.footprint import parse_bytes
from recsys_embed.data import TableSchema, TableSplit, convert_table
from recsys_embed.data.conversion import ConvertReport, Progress
from recsys_embed.data.sources import join_options
from recsys_embed.errors import ConfigError

ValidShare = Annotated[str | None, typer.Option(help="Share of all rows, such as 0.1 (default) or 1/6.")]
TestShare = Annotated[str | None, typer.Option(help="Share of all rows, 1/6 by default.")]
SplitSeed = Annotated[int | None, typer.Option(help="Seed of --split random, 0 by default.")]
ValidFiles = Annotated[list[str] | None, typer.Option(help="Pattern of files that validate (split file).")]
TestFiles = Annotated[list[str] | None, typer.Option(help="Pattern of files that test (split file).")]
Only = Annotated[
    Literal["train", "valid", "test"] | None, typer.Option(help="The split of --split all; test by default.")
]
Memory = Annotated[str, typer.Option(help="Memory to stay under, at least 512MiB (912MiB with a CUDA build of torch).")]
Workers = Annotated[int, typer.Option(help="Threads; 0: one per core, at most 4.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the data set in OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Columns = Annotated[list[str] | None, typer.Option(help="Columns of this kind: a,b,c.")]
_KINDS = ("label", "categorical", "list", "sequence", "numeric", "vector", "time", "weight", "group")


def table(
    inputs: Annotated[list[str], typer.Argument(metavar="FILES... OUT", help="Files, globs or folders; then OUT.")],
    schema: Annotated[Path | None, typer.Option(help="TOML file that says what the columns are.")] = None,
    label: Columns = None,
    categorical: Columns = None,
    list_: Annotated[list[str] | None, typer.Option("--list", help="Columns of this kind: a,b,c.")] = None,
    sequence: Columns = None,
    numeric: Columns = None,
    vector: Columns = None,
    time: Columns = None,
    weight: Columns = None,
    group: Columns = None,
    min_count: Annotated[
        int | None, typer.Option(help="Training rows a value must occur in to get an id; 2 by default.")
    ] = None,
    ids: Annotated[Literal["vocab", "raw"] | None, typer.Option(help="raw: 64-bit ids without a vocabulary.")] = None,
    split: Annotated[
        Literal["time", "order", "random", "file", "column", "last", "all"] | None,
        typer.Option(help="time (default with --time), order (default else), random, file, column, last (per user)."),
    ] = None,
    valid: ValidShare = None,
    test: TestShare = None,
    split_seed: SplitSeed = None,
    split_column: Annotated[str | None, typer.Option(help="Of --split column: the splits; of last: the user.")] = None,
    valid_from: Annotated[str | None, typer.Option(help="Date at which validation begins (--split time).")] = None,
    test_from: Annotated[str | None, typer.Option(help="Date at which the test begins (--split time).")] = None,
    valid_file: ValidFiles = None,
    test_file: TestFiles = None,
    only: Only = None,
    source: ReaderOptions = None,
    like: Annotated[Path | None, typer.Option(help="Data folder whose vocabularies encode these rows.")] = None,
    on_bad_row: Annotated[
        Literal["fail", "quarantine"], typer.Option(help="Stop, or set bad rows aside in quarantine.jsonl.")
    ] = "fail",
    max_memory: Memory = "1GiB",
    workers: Workers = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert any table of events into a data folder.

    Its columns are those of --schema, or those named by kind: --label click --categorical user,item --list tags
    --numeric price --time ts. Killed conversions continue when the same command is run again. With --like DIR rows get
    the ids of that folder; all are the split test unless --only or --split says otherwise.
    """
    if len(inputs) < 2:
        raise typer.BadParameter("expected FILES... and OUT", param_hint="FILES... OUT")
    *sources, out = inputs
    given = dict(zip(_KINDS, (label, categorical, list_, sequence, numeric, vector, time, weight, group), strict=True))
    names: dict[str, Any] = {
        kind: [n for text in some for n in text.split(",") if n] for kind, some in given.items() if some
    }
    settings = given_settings(min_count=min_count, ids=ids)
    kind = split or ("file" if valid_file or test_file else None)
    rule = given_settings(
        kind=kind, valid=valid, test=test, seed=split_seed, valid_files=valid_file, test_files=test_file, only=only,
        column=split_column, valid_from=valid_from, test_from=test_from,
    )  # fmt: skip
    reader = reader_options(source or [])
    if schema is not None and (names or settings):
        raise ConfigError("columns are in --schema or named by kind; give one of them")
    if like is not None and (schema is not None or names or settings):
        raise ConfigError("with --like the columns are those of that folder; leave out the options that name columns")
    made = None
    if schema is not None:
        made = TableSchema.read(schema)
        former = {} if kind else made.split.to_dict()
        made = made.replace(split=TableSplit.from_dict({**former, **rule}), source=join_options(made.source, reader))
    elif like is None:
        if not names:
            raise ConfigError("name the columns: --schema FILE.toml, or --label, --categorical, --numeric ...")
        rule = {"kind": "time" if names.get("time") else "order", **rule}
        made = TableSchema.of(**{**names, **settings, "split": rule, "source": reader})
    new_split = None if like is None else TableSplit.from_dict({"kind": "all", **rule})
    with show_progress(as_json) as progress:
        report = convert_table(
            sources, out, made, like=like, split=new_split, options=reader if like is not None else None,
            on_bad_row=on_bad_row, max_memory=parse_bytes(max_memory), workers=workers, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    say_report(out, report, as_json)


def given_settings(**settings: Any) -> dict[str, Any]:
    """Those of some settings that the command line gives."""
    return {k: v for k, v in settings.items() if v is not None}


def say_report(out: str, report: ConvertReport, as_json: bool) -> None:
    """Print what a conversion gave; what a person should know of the values goes to standard error."""
    for notice in report.notices:
        print(notice, file=sys.stderr)
    if as_json:
        result = {"out": out, "rows": report.rows, "quarantined": report.quarantined}
        print(json.dumps({**result, "already_done": report.already_done}))
        return
    say_rows(out, report.rows, report.already_done)
    if report.quarantined:
        print(f"{report.quarantined:,} bad rows set aside in {out}/quarantine.jsonl")


def say_rows(out: str, rows: dict[str, int], already: bool) -> None:
    """Print how many rows each split has."""
    parts = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    print(f"{out}: {sum(rows.values()):,} rows ({parts})" + (" (made earlier, nothing to do)" if already else ""))


@contextmanager
def show_progress(silent: bool) -> Iterator[Progress]:
    """A progress bar with rows/s and time left on a terminal, nothing elsewhere."""
    if silent or not sys.stderr.isatty():
        yield lambda stage, done, total, rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:8s}"), BarColumn(), TextColumn("{task.fields[speed]}"))
    with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: float, total: float, rows: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, speed="")
            spent = bar.tasks[tasks[stage]].elapsed or 0.0
            share = 1.0 if stage != "number" else done / max(total, 1.0)
            speed = f"{share * rows / spent / 1000:,.0f} k rows/s" if spent > 0.2 else ""
            bar.update(tasks[stage], completed=done, total=total, speed=speed)

        yield show
