"""``recsys-embed predict``: scores of raw rows by an exported model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.cli._inspect import ReaderOptions, reader_options
from recsys_embed.core.footprint import parse_bytes
from recsys_embed.errors import ConfigError
from recsys_embed.utils.types import JSON

if TYPE_CHECKING:
    from recsys_embed.data.serving.score import ScoreReport

_FOUND = 1 << 21
"""Recommended items that are held at once."""


def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="File of `recsys-embed export`.")],
    inputs: Annotated[list[str], typer.Argument(metavar="FILES...", help="Raw rows: files, globs or folders.")],
    out: Annotated[Path, typer.Option("--out", help="File of scores to write: .parquet or .csv.")],
    keep: Annotated[
        list[str] | None, typer.Option(help="Columns of the rows to write beside the score: a,b,c.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="FILES are a public data set's own, joined as `data preset` joins them, e.g. movielens_100k."
        ),
    ] = None,
    source: ReaderOptions = None,
    on_bad_row: Annotated[
        Literal["fail", "quarantine"], typer.Option(help="Stop, or set bad rows aside in OUT.quarantine.jsonl.")
    ] = "fail",
    top: Annotated[
        int | None,
        typer.Option("--top", min=1, help="Recommend the best TOP items to each row, by a retrieval model."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="With --top: columns of the rows with items to leave out, such as those seen: a,b,c."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that go through the model at once.")] = 8192,
    max_memory: Annotated[str, typer.Option(help="Memory to stay under, see `data table`.")] = "1GiB",
    device: opt.Device = "cpu",
    as_json: opt.Json = False,
) -> None:
    """Score raw rows: the file holds what turns them into ids, so that they need no conversion.

    A score is a probability where the model was trained by logloss, else the value that it predicts. The rows keep
    their order; labels, weights and columns that the model does not use are not needed. A folder of the files of the
    public data set that the model was trained on (`data preset`) is joined by itself.

    With --top the output has a row for each recommended item: columns of --keep, row (from 0), rank (from 1), item and
    score. The rows then need the columns of the user only.
    """
    from recsys_embed.cli._table import show_progress
    from recsys_embed.data import preset_table, recommended, score_files, write_rows
    from recsys_embed.exports import load
    from recsys_embed.models import RetrievalModel

    _check_out(out, inputs)
    served = load(model, device=None if device == "cpu" else device)
    scorer: Any = getattr(served, "scorer", None)
    if scorer is None:
        raise ConfigError(
            f"{model} does not hold what turns raw rows into ids: export the run again with its data, `recsys-embed "
            "export RUN --data FOLDER --out FILE`"
        )
    left_out = [name for text in exclude or [] for name in text.split(",") if name]
    if top is not None and not isinstance(served, RetrievalModel):
        raise ConfigError(f"--top is of retrieval models (twotower, sasrec); {model} scores the rows' own items")
    if top is None and left_out:
        raise ConfigError("--exclude goes with --top, which says how many items are recommended")
    given = reader_options(source or [])
    if preset is not None and given:
        raise ConfigError("with --preset files are read as its data set's are; leave out --source")
    own = scorer.stored.about.get("preset")
    joined: Any = None
    if preset is not None:
        joined = preset_table(preset, inputs)
    elif own is not None and not given and all(Path(p).is_dir() for p in inputs):
        # A folder of other files, of rows that were joined before, is a table as any other.
        try:
            joined = preset_table(own, inputs)
            print(f"reading the files of {own} (--preset)", file=sys.stderr)
        except ConfigError as e:
            print(f"reading a table, not the files of {own} (--preset): {e}", file=sys.stderr)
    encoder = scorer.encoder if top is None else scorer.user_encoder(served, left_out)
    table = encoder.open(inputs if joined is None else joined, given)
    names = [name for text in keep or [] for name in text.split(",") if name]
    with show_progress(as_json) as progress:
        options: Any = {"keep": names, "on_bad_row": on_bad_row, "max_memory": parse_bytes(max_memory)}
        if top is None:
            score = scorer.score(served)
            report = score_files(encoder, score, table, out, batch_size, **options, progress=progress)
        else:
            catalogue: Any = served.in_catalogue
            most = min(top, len(catalogue))
            found = recommended(encoder, scorer.find(served, encoder, most), most)
            size = min(batch_size, max(1, _FOUND // most))
            report = write_rows(encoder, found, table, out, size, **options, progress=progress)
    _tell(report, scorer.output, top, as_json)


def _tell(report: ScoreReport, output: str, top: int | None, as_json: bool) -> None:
    """Print what was scored."""
    if as_json:
        bad = None if report.quarantine is None else str(report.quarantine)
        values: JSON = {"out": str(report.out), "rows": report.rows, "output": output}
        values |= {"quarantined": report.quarantined, **({} if top is None else {"top": top}), "quarantine": bad}
        print(json.dumps({**values, "ignored": list(report.ignored), "unknown": list(report.unknown)}))
        return
    what = "probabilities" if output == "probability" else "values"
    told = f"rows scored ({what})" if top is None else f"rows, the best {top:,} items of each"
    print(f"{report.out}: {report.rows:,} {told}")
    if report.unknown:
        names = ", ".join(report.unknown)
        print(f"the model knows no value of these columns: {names}; are they written as in training?")
    if report.ignored:
        print(f"columns that were not used: {', '.join(report.ignored)}")
    if report.quarantine is not None:
        print(f"{report.quarantined:,} bad rows set aside in {report.quarantine}")


def _check_out(out: Path, inputs: list[str]) -> None:
    """Refuse a file of scores that the next call would read as rows."""
    place = Path(os.path.abspath(out))
    for given in inputs:
        found = Path(os.path.abspath(given))
        inside = Path(os.path.realpath(out)), Path(os.path.realpath(given))
        # Of a folder all is read but what is hidden, or begins with an underscore.
        if (
            found.is_dir()
            and inside[0].is_relative_to(inside[1])
            and not any(part.startswith((".", "_")) for part in inside[0].relative_to(inside[1]).parts)
        ):
            raise ConfigError(f"--out {out} lies in {given}, whose files are read as rows: write it elsewhere")
        if found.exists() and place.exists() and found.samefile(place):
            raise ConfigError(f"--out {out} is one of the files of rows and would be replaced: write to another file")
        if not found.exists() and place.match(str(found)):
            raise ConfigError(f"--out {out} matches {given}, whose files are read as rows: write it elsewhere")
