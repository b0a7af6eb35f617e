"""Scores of raw rows: of a table in memory as one array, of files of any size as a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.batch import Batch
from recsys_embed.data.columns.categorical import all_unknown
from recsys_embed.data.conversion import OnBadRow, Progress, no_progress
from recsys_embed.data.folder import storage_error
from recsys_embed.data.serving.read import rows_of
from recsys_embed.data.serving.row_encoder import EncodedRows, RowEncoder
from recsys_embed.data.sources import Source
from recsys_embed.data.sources.bad_rows import QUARANTINE, bad_row_line, bad_rows_error
from recsys_embed.data.sources.base import BadRow
from recsys_embed.data.table.rows import TableOptions
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.utils.files import replacing
from recsys_embed.utils.types import RowsLike

Score = Callable[[Batch], NDArray[np.float32]]
SCORE = "score"
"""Name of the scores' column."""
ROW = "row"
"""Name of the column that numbers the rows from 0, where each may have several."""
ENDINGS = (".parquet", ".csv")
_CHUNK_ROWS = 1 << 16
_SAMPLE_ROWS = 2048


class Output(NamedTuple):
    """What is written of rows.

    Args:
        columns: by name, beside those that are kept; with ``ROW`` among them any number for each row.
        make: these columns for some rows with their batches; ``ROW`` counts these rows from 0.
        row_bytes: what making them holds for a row.
    """

    columns: Mapping[str, pl.DataType]
    make: Callable[[pl.DataFrame, list[Batch]], pl.DataFrame]
    row_bytes: int = 0


@dataclass(frozen=True)
class ScoreReport:
    """What was scored.

    Args:
        out: the file of scores.
        rows: that were scored.
        quarantined: bad rows that are not.
        quarantine: the file that tells them; None where there are none.
        ignored: columns that neither the model nor the output uses.
        unknown: columns of which the model knows no value.
    """

    out: Path
    rows: int
    quarantined: int
    quarantine: Path | None
    ignored: tuple[str, ...]
    unknown: tuple[str, ...] = ()


def score_rows(encoder: RowEncoder, score: Score, rows: RowsLike, batch_size: int) -> NDArray[np.float32]:
    """Scores float32 ``[n]`` of rows in memory, or of files whose scores memory holds.

    Raises:
        ConfigError: no table, or one row that is in no list; columns that are absent or of another type.
        DataError: values that cannot be used, with row, column and reason.
    """
    if isinstance(rows, Sequence) and not isinstance(rows, str) and not len(rows):
        return np.zeros(0, np.float32)
    with staged(encoder.open(rows_of(rows, encoder))) as source:
        found = [score(batch) for _, batches in batches_of(encoder, source, batch_size) for batch in batches]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def batches_of(encoder: RowEncoder, source: Source, size: int) -> Iterator[tuple[pl.DataFrame, list[Batch]]]:
    """All rows of a source with their batches, see :func:`_batches`.

    Raises:
        DataError: values that cannot be used, with row, column and reason.
    """
    yield from _batches(_parts(encoder, source, _CHUNK_ROWS, (), _refuse(source)), size)


@contextmanager
def staged(source: Source, folder: Path | None = None) -> Iterator[Source]:
    """A source whose rows can be read in parts; only those of a query are written down, into ``folder``, for that."""
    if type(source).stage is Source.stage:
        yield source
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rows.", dir=folder) as work:
        yield source.stage(Path(work))


def _refuse(source: Source) -> Callable[[Sequence[BadRow]], None]:
    def refuse(bad: Sequence[BadRow]) -> None:
        raise bad_rows_error(source, bad, "correct these rows or leave them out")

    return refuse


def _parts(
    encoder: RowEncoder, source: Source, rows: int, keep: Sequence[str], tell: Callable[[Sequence[BadRow]], None]
) -> Iterator[EncodedRows]:
    """All rows, encoded; bad ones are told."""
    wanted = list(dict.fromkeys([*encoder.columns, *keep]))
    for file in range(len(source.files)):
        for chunk in source.chunks(file, 0, rows, wanted):
            part = encoder.encode(source, chunk)
            if part.bad:
                tell(part.bad)
            if len(part.frame):
                yield part


def _batches(parts: Iterator[EncodedRows], size: int) -> Iterator[tuple[pl.DataFrame, list[Batch]]]:
    """Raw rows and their batches; every batch but the last has ``size`` rows.

    A model therefore gives the same bits, whatever files the rows are in and however many are read at once.
    """
    if type(size) is not int or size < 1:
        raise ConfigError(f"`batch_size` must be an integer of at least 1; got {size!r}")
    frame, batch = pl.DataFrame(), None
    for part in parts:
        frame = part.frame if batch is None else pl.concat([frame, part.frame], rechunk=True)
        batch = part.batch if batch is None else Batch.cat([batch, part.batch])
        whole = len(frame) // size * size
        if whole:
            yield frame.head(whole), [_rows(batch, at, at + size) for at in range(0, whole, size)]
            frame, batch = frame.slice(whole), _rows(batch, whole, len(frame))
    if batch is not None and len(frame):
        yield frame, [batch]


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    return batch.map(lambda part: part[start:stop])


def score_files(
    encoder: RowEncoder,
    score: Score,
    source: Source,
    out: str | Path,
    batch_size: int,
    *,
    keep: Sequence[str] = (),
    on_bad_row: OnBadRow = "fail",
    max_memory: int = 1 << 30,
    progress: Progress = no_progress,
) -> ScoreReport:
    """Write the score of every row to a file, in the order of the rows; it appears when it is whole.

    Args:
        encoder: of the model.
        score: scores of a batch.
        source: the rows, as ``encoder.open`` gives them.
        out: ends in ``.parquet`` or ``.csv``; columns ``keep`` and ``score`` (float32).
        batch_size: rows of a batch.
        keep: columns of the rows that stand beside their scores.
        on_bad_row: ``"fail"``, or ``"quarantine"``: bad rows have no score and are told in ``OUT.quarantine.jsonl``.
        max_memory: bytes the process should stay under, see :func:`recsys_embed.data.convert_table`.
        progress: called as ``progress("score", done, total, rows)``.

    Raises:
        ConfigError: another ending, a file of the rows, or columns to keep that the rows lack.
        DataError: bad rows under ``on_bad_row="fail"``.
    """

    def make(frame: pl.DataFrame, batches: list[Batch]) -> pl.DataFrame:
        return pl.DataFrame({SCORE: np.concatenate([score(batch) for batch in batches])})

    output = Output({SCORE: pl.Float32()}, make)
    return write_rows(
        encoder, output, source, out, batch_size, keep=keep, on_bad_row=on_bad_row, max_memory=max_memory,
        progress=progress,
    )  # fmt: skip


def write_rows(
    encoder: RowEncoder,
    output: Output,
    source: Source,
    out: str | Path,
    batch_size: int,
    *,
    keep: Sequence[str] = (),
    on_bad_row: OnBadRow = "fail",
    max_memory: int = 1 << 30,
    progress: Progress = no_progress,
) -> ScoreReport:
    """Write what ``output`` makes of every row to a file; see :func:`score_files`."""
    out = Path(out)
    faults = [f"the rows have no column {name!r} to keep; they have {', '.join(source.types)}"
              for name in keep if name not in source.types]  # fmt: skip
    if out.suffix not in ENDINGS:
        faults.append(f"the scores' file must end in {' or '.join(ENDINGS)}; got {str(out)!r}")
    faults += [f"column {name!r} cannot be kept beside the scores, which have a column of that name; rename it"
               for name in output.columns if name in keep]  # fmt: skip
    quarantine = _quarantine(out)
    read = {os.path.realpath(f) for f in source.files}
    faults += [f"{p} is one of the files of rows and would be replaced: write the scores to another file"
               for p in (out, quarantine) if os.path.exists(p) and os.path.realpath(p) in read]  # fmt: skip
    nested = [n for n in keep if n in source.types and out.suffix == ".csv" and source.types[n].is_nested()]
    faults += [f"column {n!r} holds lists, which CSV cannot: write Parquet, or leave it out" for n in nested]
    raise_faults(faults, "the scores")
    with staged(source, out.parent) as rows:
        return _write_to(encoder, output, rows, out, batch_size, keep, on_bad_row, max_memory, progress)


def _quarantine(out: Path) -> Path:
    return out.with_name(out.name + ".quarantine.jsonl")


def _write_to(
    encoder: RowEncoder,
    output: Output,
    source: Source,
    out: Path,
    batch_size: int,
    keep: Sequence[str],
    on_bad_row: OnBadRow,
    max_memory: int,
    progress: Progress,
) -> ScoreReport:
    wanted = list(dict.fromkeys([*encoder.columns, *keep]))
    options = TableOptions(on_bad_row=on_bad_row, max_memory=max_memory, workers=1)
    options.readers(source, wanted)
    sample = source.sample(_SAMPLE_ROWS).select(wanted)
    held = sample.estimated_size() / max(1, len(sample)) + 16 * len(wanted) + output.row_bytes
    size = min(_CHUNK_ROWS, options.part_rows(held))
    quarantine = _quarantine(out)
    told: list[IO[bytes]] = []
    counts = {"rows": 0, "bad": 0}

    def tell(rows: Sequence[BadRow]) -> None:
        if on_bad_row == "fail":
            raise bad_rows_error(source, rows, QUARANTINE.replace("table", "rows"))
        if not told:
            told.append(stack.enter_context(replacing(quarantine, failed=storage_error))[0])
        counts["bad"] += len(rows)
        told[0].write("".join(bad_row_line(source, row) for row in rows).encode())

    total = sum(source.length(i) for i in range(len(source.files))) if source.seekable else 0

    needed: dict[str, Counter[str]] = {}

    def counted() -> Iterator[EncodedRows]:
        for part in _parts(encoder, source, size, keep, tell):
            for name, some in part.counts.items():
                needed.setdefault(name, Counter()).update(some)
            yield part

    def written() -> Iterator[pl.DataFrame]:
        for frame, batches in _batches(counted(), batch_size):
            made, kept = output.make(frame, batches), frame.select(keep)
            if ROW in output.columns:
                kept = kept[made[ROW].to_numpy()] if keep else kept
                made = made.with_columns((pl.col(ROW) + counts["rows"]).cast(output.columns[ROW]))
            yield pl.DataFrame([*kept.get_columns(), *made.get_columns()])
            counts["rows"] += len(frame)
            progress("score", counts["rows"], total or counts["rows"], counts["rows"])

    empty = pl.DataFrame(schema={**{n: source.types[n] for n in keep}, **output.columns})
    with ExitStack() as stack:
        (_write_csv if out.suffix == ".csv" else _write_parquet)(out, written(), empty)
    if not told and on_bad_row == "quarantine":
        quarantine.unlink(missing_ok=True)
    ignored = tuple(name for name in source.types if name not in wanted)
    unknown = tuple(name for name, some in needed.items() if all_unknown(some, counts["rows"]))
    return ScoreReport(out, counts["rows"], counts["bad"], quarantine if told else None, ignored, unknown)


def _write_csv(out: Path, frames: Iterator[pl.DataFrame], empty: pl.DataFrame) -> None:
    with replacing(out, failed=storage_error) as (file, _):
        file.write(empty.write_csv().encode())
        for frame in frames:
            file.write(frame.write_csv(include_header=False).encode())


def _write_parquet(out: Path, frames: Iterator[pl.DataFrame], empty: pl.DataFrame) -> None:
    """Parquet in one file: pieces are written first, as none of its writers takes one piece after another."""
    with replacing(out, failed=storage_error) as (_, temporary):
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            pieces = []
            for number, frame in enumerate(frames):
                # The earliest polars that is supported streams Parquet into Parquet, and no other format.
                pieces.append(work / f"{number:06d}.parquet")
                frame.write_parquet(pieces[-1], compression="lz4")
            if pieces:
                pl.scan_parquet(pieces).sink_parquet(temporary, compression="zstd", row_group_size=_CHUNK_ROWS)
            else:
                empty.write_parquet(temporary)
        except pl.exceptions.PolarsError as e:
            raise storage_error(out, e) from e
        finally:
            shutil.rmtree(work, ignore_errors=True)
