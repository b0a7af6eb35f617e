"""Second step of a table's conversion: what the columns learn from the training rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl

from recsys_embed.data.columns import Column, Encoder, FixedColumn, LearnedColumn, Limits, read_encoder
from recsys_embed.data.columns.categorical import RawLearner, VocabularyLearner
from recsys_embed.data.columns.numeric import BucketEncoder
from recsys_embed.data.columns.vocabulary import DISTINCT_BYTES, vocabulary_file
from recsys_embed.data.conversion import PROCESS, Progress
from recsys_embed.data.field_counts import FieldCounts, describe
from recsys_embed.data.folder import write_bytes, write_json
from recsys_embed.data.splits import TRAIN
from recsys_embed.data.table.codes import SplitCodes
from recsys_embed.data.table.rows import Part, TableRows, in_order
from recsys_embed.utils.types import JSON

LEARNED = "learned"
"""Folder of what was learned, in the work folder."""
Learned = dict[str, tuple[Encoder, JSON]]
"""The encoder of every column by name, and its training statistics (those of features alone)."""


def learn_columns(rows: TableRows, codes: SplitCodes, progress: Progress) -> Learned:
    """Learn all columns, one vocabulary after another; what an earlier run learned is kept."""
    types = rows.source.types
    found: Learned = {c.name: (c.fixed(types[c.source]), {}) for c in rows.columns if isinstance(c, FixedColumn)}
    groups = _groups(rows.columns)
    for i, columns in enumerate(groups):
        path = rows.work / LEARNED / f"{i:04d}.json"
        if not path.exists():
            write_json(path, _learn(rows, codes, columns), durable=False)
        for entry, stats in json.loads(path.read_text()):
            found[entry["name"]] = (read_encoder(entry, rows.work / LEARNED), stats)
        progress("number", i + 1, len(groups), rows.total)
    return {c.name: found[c.name] for c in rows.columns}


def _groups(columns: Sequence[Column]) -> list[list[LearnedColumn]]:
    """Columns that learn together: each vocabulary by itself, which bounds the memory; all others in one pass."""
    vocabularies: dict[str, list[LearnedColumn]] = {}
    others: list[LearnedColumn] = []
    for column in columns:
        if not isinstance(column, LearnedColumn):
            continue
        if column.learns.startswith("vocab:"):
            vocabularies.setdefault(column.learns, []).append(column)
        else:
            others.append(column)
    return [*vocabularies.values(), *([others] if others else [])]


def _learn(rows: TableRows, codes: SplitCodes, columns: Sequence[LearnedColumn]) -> list[tuple[JSON, JSON]]:
    """Entries of the columns and their training statistics; vocabularies are written to the work folder."""
    types = rows.source.types
    limits = Limits(distinct=max(1, (rows.options.max_memory - PROCESS) // DISTINCT_BYTES))
    together: dict[str, list[LearnedColumn]] = {}
    for column in columns:
        together.setdefault(column.learns, []).append(column)
    learners = {
        key: some[0].learner([c.flat_type(types[c.source]) if hasattr(c, "flat_type") else types[c.source]
                              for c in some], limits)
        for key, some in together.items()
    }  # fmt: skip
    names = list(dict.fromkeys(c.source for c in columns))
    for frame in _training(rows, codes, names):
        for column in columns:
            learners[column.learns].add(column, frame[column.source])
    found = []
    for column in columns:
        learner = learners[column.learns]
        encoder = learner.result(column)
        stats: JSON = {}
        if encoder.vocabulary is not None:
            file = vocabulary_file(encoder.vocabulary.name)
            if column is together[column.learns][0]:
                encoder.vocabulary.write(rows.work / LEARNED / file, durable=False)
                _stage(rows.work, file)
        if isinstance(learner, VocabularyLearner | RawLearner):
            stats = _training_stats(learner.counts())
        elif isinstance(encoder, BucketEncoder):
            stats = _training_stats(encoder.counts())
        found.append((encoder.to_dict(), stats))
    return found


def _training_stats(counts: FieldCounts) -> JSON:
    """Statistics of a field, with the number of values that they are of: a list has any number per row."""
    occurrences = (int(counts.counts.sum()) << counts.level) + counts.missing
    return {**describe(counts), "occurrences": occurrences}


def _training(rows: TableRows, codes: SplitCodes, names: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Columns of the training rows, part by part, read ahead by one."""

    def read(_: int, job: tuple[Part, int]) -> pl.DataFrame | None:
        part, first = job
        train = codes.of(part, first) == TRAIN
        if not train.any():
            return None
        frame = rows.read(part, names)
        return frame if train.all() else frame.filter(pl.Series(train))

    with ThreadPoolExecutor(1) as pool:
        for frame in in_order(pool, read, list(rows.firsts()), 2):
            if frame is not None:
                yield frame


def borrowed(columns: Sequence[Column], encoders: dict[str, Encoder], stats: JSON) -> Learned:
    """Encoders of another folder for columns, with the training statistics it has of them."""
    rates = ("missing_rate", "oov_rate")
    fields = {name: {k: v for k, v in field.items() if k not in rates} for name, field in stats["fields"].items()}
    return {c.name: (encoders[c.name], fields.get(c.name, {})) for c in columns}


def copy_vocabularies(encoders: dict[str, Encoder], donor: Path, work: Path) -> None:
    """Copy the files that encoders' vocabularies come from."""
    for encoder in encoders.values():
        if encoder.vocabulary is not None:
            file = vocabulary_file(encoder.vocabulary.name)
            write_bytes(work / LEARNED / file, (donor / file).read_bytes(), durable=False)
            _stage(work, file)


def _stage(work: Path, file: str) -> None:
    """Put a vocabulary among what is published; the one that is learned stays, as a run that was killed needs it."""
    write_bytes(work / "out" / file, (work / LEARNED / file).read_bytes(), durable=False)
