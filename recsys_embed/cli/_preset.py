"""``recsys-embed data preset``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from recsys_embed.cli._table import Json, Memory, Overwrite, Workers, say_report, show_progress
from recsys_embed.core.footprint import parse_bytes
from recsys_embed.data import convert_preset
from recsys_embed.data.presets import preset_names, preset_text, read_preset


def preset(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME FILES... OUT", help="Preset; its files or the folder that holds them; OUT."),
    ] = None,
    on_bad_row: Annotated[
        Literal["fail", "quarantine"], typer.Option(help="Stop, or set bad rows aside in quarantine.jsonl.")
    ] = "fail",
    max_memory: Memory = "1GiB",
    workers: Workers = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a public data set with the split and the labels that published results have.

    Without arguments it lists the presets; with NAME alone it prints the preset, whose columns and split are a schema.
    """
    name, *rest = inputs or [""]
    if not name:
        for each in preset_names():
            about = read_preset(each)
            print(f"{each:16s} {about.title}: {about.protocol}")
        return
    if not rest:
        print(preset_text(name), end="")
        return
    if len(rest) < 2:
        raise typer.BadParameter("expected NAME FILES... and OUT", param_hint="NAME FILES... OUT")
    *sources, out = rest
    with show_progress(as_json) as progress:
        report = convert_preset(
            name, sources, out, on_bad_row=on_bad_row, max_memory=parse_bytes(max_memory), workers=workers,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if not as_json:
        print(f"{name}: {read_preset(name).protocol}")
    say_report(out, report, as_json)
