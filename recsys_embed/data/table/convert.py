"""Any table of events to a data folder: check, learn from the training rows, encode, write Parquet, publish.

Every step leaves whole files behind and is skipped when they are there already, so a conversion that was killed goes
on where it stopped and ends with the bytes it would have had.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recsys_embed.data.columns import Column, Encoder, Vector, Weight, read_encoder
from recsys_embed.data.columns.categorical import all_unknown
from recsys_embed.data.columns.vector import first_width
from recsys_embed.data.conversion import ConvertReport, OnBadRow, Progress, check_target, finished, no_progress
from recsys_embed.data.folder import WORK_DIR, lock
from recsys_embed.data.manifest import Manifest, read_manifest
from recsys_embed.data.publish import BuiltDataset, publish
from recsys_embed.data.sources import Source, join_options, open_like, open_source
from recsys_embed.data.sources.learned_spelling import (
    check_spelling,
    distinct_texts,
    first_rows,
    list_separator,
    other_separator,
)
from recsys_embed.data.sources.learned_types import read_as_learned, read_floats
from recsys_embed.data.sources.other_dialect import check_dialect
from recsys_embed.data.sources.text import TextFiles
from recsys_embed.data.splits import TRAIN
from recsys_embed.data.stats import read_stats
from recsys_embed.data.table.codes import SplitCodes
from recsys_embed.data.table.learn import borrowed, copy_vocabularies, learn_columns
from recsys_embed.data.table.rows import TableOptions, TableRows
from recsys_embed.data.table.schema import TableSchema
from recsys_embed.data.table.split import TableSplit, check_codes
from recsys_embed.data.table.write import write_table
from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.utils.types import JSON, JSONMapping, TableLike


def convert_table(
    source: TableLike | Source,
    out: str | Path,
    schema: TableSchema | JSONMapping | str | Path | None = None,
    *,
    like: str | Path | None = None,
    split: TableSplit | None = None,
    options: JSONMapping | None = None,
    on_bad_row: OnBadRow = "fail",
    max_memory: int = 1 << 30,
    workers: int = 0,
    overwrite: bool = False,
    progress: Progress = no_progress,
    extra: JSON | None = None,
) -> ConvertReport:
    """Convert a table of events into a data folder, which :func:`recsys_embed.data.open_dataset` opens.

    Args:
        source: files, globs or folders; a polars (lazy) or pandas frame, an Arrow table, or columns by name.
        out: folder to make; an unfinished conversion in it is continued.
        schema: the columns: a :class:`TableSchema`, its values, or a TOML file.
        like: in place of a schema: a data folder whose schema and vocabularies encode these rows.
        split: in place of the schema's; with ``like`` all rows are ``"test"`` by default.
        options: of the reader of files, as ``[source]`` of a schema has them; they win over those of the schema or of
            the folder ``like``.
        on_bad_row: ``"fail"`` stops at the first part with a bad row; ``"quarantine"`` sets them aside, counted.
        max_memory: bytes the process should stay under; at least 512 MiB, or 912 MiB beside a CUDA build of torch.
        workers: parts that are encoded at the same time; 0 means one per core, at most 4.
        overwrite: replace a finished data set in ``out``.
        progress: see ``Progress``.
        extra: JSON values to keep in the manifest under ``"extra"``.

    Raises:
        ConfigError: a bad schema, columns that are absent or of the wrong type, ``out`` holds something else.
        DataError: bad rows under ``on_bad_row="fail"``, with file, row, column and reason.
        StorageError: ``out`` cannot be written or another process is writing it.

    >>> import tempfile
    >>> table = {"click": [1, 0] * 6, "user": ["ann", "bob"] * 6, "price": [1.5, None, 3.0] * 4}
    >>> schema = TableSchema.of(label="click", categorical="user", numeric="price")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     convert_table(table, folder, schema).rows
    {'train': 9, 'valid': 1, 'test': 2}
    """
    how = TableOptions(on_bad_row=on_bad_row, max_memory=max_memory, workers=workers)
    out = Path(out)
    made, donor = _schema(schema, like, split)
    former, made = made.source, made.replace(source=join_options(made.source, options or {}))
    found = open_source(source, made.source) if donor is None else open_like(source, former, options or {})
    check_target(out)
    _keep_apart(out, like, found)
    with lock(out):
        work = out / WORK_DIR
        table = found.stage(work)
        needed = [c.source for c in made.used if donor is None or not _may_lack(c)]
        check_dialect(table, needed, made.source if donor is None else options or {})
        encoders: dict[str, Encoder] = {}
        if donor is not None and like is not None:
            encoders = _encoders(donor, Path(like), made.used)
            read_as_learned(table, encoders.values())
            kept = tuple(c for c in made.used if c.source in table.types or not _may_lack(c))
            made = made.replace(columns=kept, label=None)
            encoders = {c.name: encoders[c.name] for c in kept}
        elif isinstance(table, TextFiles):
            read_floats(table, made.used)
        made.check_types(table.types, kinds=not encoders)
        if encoders:
            _check_learned(encoders, table.types, Path(str(like)))
            check_spelling(table, encoders.values(), options or {})
            columns = tuple(e.column for e in encoders.values())
        else:
            columns = tuple(_with_width(c, table) if isinstance(c, Vector) else c for c in made.used)
        record = _record(made, donor, on_bad_row, table, extra)
        done = finished(out, record, overwrite)
        if done is not None:
            shutil.rmtree(work, ignore_errors=True)
            return done
        notices: list[str] = []
        rows = TableRows(work, table, made, columns, how, record, notices, encoders)
        rows.scan(progress)
        if not rows.total:
            bad = [rows.bad_path(p.index) for p in rows.parts if p.bad]
            seen = f"; the bad rows are in {bad[0]}" if bad else ""
            raise DataError(f"no row could be read from {', '.join(table.files[:3])}{seen}")
        codes = SplitCodes(rows, made.split)
        if donor is not None and like is not None:
            copy_vocabularies(encoders, Path(like), work)
            learned = borrowed(columns, encoders, read_stats(like))
        else:
            counts = codes.counts()
            check_codes(counts, made.split, any(c.learns for c in columns) and not counts.get(TRAIN))
            learned = learn_columns(rows, codes, progress)
        built = write_table(rows, codes, learned, record, progress)
        notices += _unknown(built, donor) if donor else _remarks(made, built) + _odd_separators(table, made)
        publish(out, built)
    return ConvertReport(
        out, {name: s.rows for name, s in built.manifest.splits.items()}, rows.bad, False, tuple(notices)
    )


def _keep_apart(out: Path, like: str | Path | None, source: Source) -> None:
    """Refuse to write where the rows or the vocabularies are read from.

    Raises:
        ConfigError: names them.
    """
    inside = [f for f in source.files if out.resolve() in Path(f).resolve().parents]
    faults = [f"{f} is in it, and would be replaced" for f in inside[:1]]
    if like is not None and Path(like).resolve() == out.resolve():
        faults.append("its schema and vocabularies encode these rows")
    raise_faults(faults, f"{out} is to be written; choose another folder")


def _record(
    schema: TableSchema, donor: Manifest | None, on_bad_row: OnBadRow, table: Source, extra: JSON | None
) -> JSON:
    """Settings and inputs as JSON, to recognise a repeated conversion."""
    settings: JSON = {"schema": schema.to_dict(), "on_bad_row": on_bad_row}
    if donor is not None:
        settings["like"] = donor.fingerprint
    record: JSON = {"settings": settings, "inputs": table.inputs, "extra": extra or {}}
    return dict(json.loads(json.dumps(record, default=str)))


def _remarks(schema: TableSchema, built: BuiltDataset) -> list[str]:
    """What a person should know of a folder that was made."""
    manifest = built.manifest
    found = [
        f"no row is in split {name!r}, of which {schema.split.kind!r} had too few"
        for name in schema.split.wanted
        if name not in manifest.splits
    ]
    train = manifest.splits.get("train")
    if train is not None and train.positives in (0, train.rows):
        value = 0 if train.positives == 0 else 1
        found.append(f"every label of the training rows is {value}, of which nothing can be learned")
    counts = [built.stats["columns"][c.name].get("zero", {}) for c in schema.used if isinstance(c, Weight)]
    if train is not None and train.rows in [zeros.get("train") for zeros in counts]:
        found.append("the weight of every training row is 0, of which nothing can be learned: training refuses them")
    return found


def _unknown(built: BuiltDataset, donor: Manifest) -> list[str]:
    """Columns of which another folder knows no value."""
    rows = sum(split.rows for split in built.manifest.splits.values())
    totals = {
        name: {what: sum(n.values()) for what, n in some.items()} for name, some in built.stats["columns"].items()
    }
    names = [name for name, counts in totals.items() if all_unknown(counts, rows)]
    return (
        [f"no value of {', '.join(map(repr, names))} is known: is it written as in the other folder?"] if names else []
    )


def _odd_separators(table: Source, schema: TableSchema) -> list[str]:
    """Lists as text in which the first rows never have the separator, and mostly another one."""
    found = []
    for column in schema.used:
        separator = list_separator(table, column)
        if separator is not None:
            other = other_separator(distinct_texts(first_rows(table, 0, [column.source])[column.source]), separator)
            if other is not None:
                found.append(
                    f"column {column.source!r}: no value of the first rows holds the separator {separator!r}, and most "
                    f"hold {other!r}"
                )
    return found


def _with_width(column: Vector, table: Source) -> Vector:
    """A vector column with its width: that of the first row that has one."""
    if column.width is not None:
        return column
    for file in range(len(table.files)):
        for chunk in table.chunks(file, 0, 1 << 16, [column.source]):
            width = first_width(chunk.frame[column.source])
            if width is not None:
                return column.replace(width=width)
    return column


def _schema(
    schema: TableSchema | JSONMapping | str | Path | None, like: str | Path | None, split: TableSplit | None
) -> tuple[TableSchema, Manifest | None]:
    """The schema that was given, or that of the folder ``like``."""
    if (schema is None) == (like is None):
        raise ConfigError("give a schema, or the folder `like` whose schema and vocabularies are used")
    donor = None
    if like is not None:
        donor = read_manifest(like)
        if "schema" not in donor.settings:
            raise ConfigError(f"{like} was not made of a table; `data criteo --like` encodes rows like it")
        made = TableSchema.from_dict(donor.settings["schema"])
        split = split or TableSplit("all")
    elif isinstance(schema, TableSchema):
        made = schema
    elif isinstance(schema, Mapping):
        made = TableSchema.from_dict(schema)
    elif isinstance(schema, str | Path):
        made = TableSchema.read(schema)
    else:
        raise ConfigError(f"`schema` must be a TableSchema or a TOML file; got {type(schema).__name__}")
    return (made if split is None else made.replace(split=split)), donor


def _may_lack(column: Column) -> bool:
    """Whether rows that are encoded like others may lack a column: one that gives no input of a model."""
    return column.part is not None and not getattr(column, "parts", ())


def _encoders(donor: Manifest, folder: Path, columns: Sequence[Column]) -> dict[str, Encoder]:
    """The encoders of a folder."""
    entries = {entry["name"]: entry for entry in donor.columns}
    return {c.name: read_encoder(entries[c.name], folder) for c in columns}


def _check_learned(encoders: Mapping[str, Encoder], types: Mapping[str, pl.DataType], folder: Path) -> None:
    """Refuse columns of another type than those that were learned from.

    Raises:
        ConfigError: names all of them.
    """
    why = [(e.column.source, e.refuse(types[e.column.source])) for e in encoders.values()]
    raise_faults([f"column {name!r}: {text}" for name, text in why if text], f"the table beside {folder}")
