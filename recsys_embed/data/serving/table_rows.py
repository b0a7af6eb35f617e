"""Raw rows of a table of events to batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from recsys_embed.data.columns import Encoder, Fault, read_encoder
from recsys_embed.data.serving.lookups import make_vocabulary
from recsys_embed.data.serving.row_encoder import EncodedRows, RowEncoder
from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.data.sources import Source, open_source
from recsys_embed.data.sources.bad_rows import find_bad_rows
from recsys_embed.data.sources.base import Chunk
from recsys_embed.data.sources.frames import FrameSource
from recsys_embed.data.sources.learned_types import read_as_learned
from recsys_embed.errors import DataError, raise_faults


class TableEncoder(RowEncoder):
    """Rows of a table of events."""

    def __init__(self, stored: StoredEncoders) -> None:
        super().__init__(stored)
        about = stored.about
        widths = [e.get("learned", {}).get("width") for e in about["columns"] if e.get("kind") == "vector"]
        # A vector's components are counted before their names are made.
        if any(type(w) is not int or w < 1 for w in widths) or sum(widths) > len(self.dense):
            raise DataError(f"vectors of {widths} components do not make {len(self.dense)} numeric columns")
        vocabularies = _FileVocabularies(stored)
        self.encoders: list[Encoder] = [read_encoder(entry, vocabularies) for entry in about["columns"]]
        given = {name for e in self.encoders for name in (*e.dense, *(f.name for f in e.features))}
        absent = {*self.dense, *self.single, *self.lists} ^ given
        if absent:
            raise DataError(f"columns and inputs of the model differ in {', '.join(sorted(absent)[:5])}")
        self.columns = tuple(dict.fromkeys(e.column.source for e in self.encoders))
        self.options = dict(about.get("source") or {})

    def open(self, table: Any, options: Mapping[str, Any] | None = None) -> Source:
        given = dict(options or {})
        source = open_source(table, {**self.options, **given}, known_only=not given)
        read_as_learned(source, self.encoders)
        if isinstance(source, FrameSource):
            source = FrameSource(_with_64_bits(source.frame), source.files[0])
        types = source.types
        faults = [f"column {name!r} is missing" for name in self.columns if name not in types]
        for encoder in self.encoders:
            name = encoder.column.source
            why = None if name not in types or types[name] == pl.Null else encoder.refuse(types[name])
            if why is not None:
                faults.append(f"column {name!r} as {encoder.column.kind}: {why}")
        raise_faults(faults, f"the rows and the model; the rows have {', '.join(types)}")
        return source

    def encode(self, source: Source, chunk: Chunk) -> EncodedRows:
        frame = chunk.frame
        good, bad = find_bad_rows(chunk, self._faults(frame))
        frame = frame if good.all() else frame.filter(pl.Series(good))
        columns: dict[str, pl.Series] = {}
        for encoder in self.encoders:
            columns.update(encoder.encode(frame[encoder.column.source]).columns)
        made = pl.DataFrame([values.rename(name) for name, values in columns.items()])
        return EncodedRows(self.batch(made, len(frame)), frame, tuple(bad))

    def _faults(self, frame: pl.DataFrame) -> Iterator[tuple[str, Fault]]:
        for encoder in self.encoders:
            column, values = encoder.column, frame[encoder.column.source]
            if column.checks(values.dtype) and values.dtype != pl.Null:
                yield from ((column.source, fault) for fault in column.faults(values))


@dataclass(frozen=True)
class _FileVocabularies:
    """The vocabularies of stored encoders."""

    stored: StoredEncoders

    def read(self, file: str, name: str, *, missing_count: int = 0, unknown_count: int = 0) -> Any:
        known = self.stored.vocabularies
        if file not in known:
            raise DataError(f"there is no vocabulary {file!r:.80}")
        return make_vocabulary(known[file], self.stored.arrays)


def _with_64_bits(frame: pl.DataFrame) -> pl.DataFrame:
    """A frame whose integers of 128 bits, which polars makes of Python's beyond 2^63, have 64 where these hold them."""
    found = frame
    for name, dtype in frame.schema.items():
        wide = dtype == pl.Int128 or (isinstance(dtype, pl.List) and dtype.inner == pl.Int128)
        for narrow in (pl.Int64(), pl.UInt64()) if wide else ():
            try:
                found = found.with_columns(pl.col(name).cast(pl.List(narrow) if isinstance(dtype, pl.List) else narrow))
            except pl.exceptions.PolarsError:
                continue
            break
    return found
