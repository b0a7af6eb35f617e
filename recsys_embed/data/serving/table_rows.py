"""Raw rows of a table of events to batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from recsys_embed.data.columns import KINDS, Encoder, Fault, Time, read_encoder
from recsys_embed.data.columns.categorical import CategoricalEncoder, SavedIds, VocabularyEncoder
from recsys_embed.data.columns.numeric import BucketEncoder, NumericEncoder
from recsys_embed.data.columns.time import SavedTime
from recsys_embed.data.columns.vector import SavedVector, Vector
from recsys_embed.data.serving.lookups import MappedVocabulary, make_vocabulary
from recsys_embed.data.serving.row_encoder import EncodedRows, RowEncoder
from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.data.sources import Source, open_like
from recsys_embed.data.sources.bad_rows import find_bad_rows
from recsys_embed.data.sources.base import Chunk
from recsys_embed.data.sources.frames import FrameSource
from recsys_embed.data.sources.learned_spelling import check_spelling
from recsys_embed.data.sources.learned_types import read_as_learned
from recsys_embed.data.sources.other_dialect import check_dialect
from recsys_embed.errors import DataError, raise_faults
from recsys_embed.utils.settings import FilePart


def _check_learned(entry: Mapping[str, Any]) -> FilePart:
    """What a column learned, of which every value is of its type.

    Raises:
        ConfigError: names those that are not.
    """
    kind = entry.get("kind")
    encoder = KINDS[kind][1] if isinstance(kind, str) and kind in KINDS else CategoricalEncoder
    if encoder is NumericEncoder and entry.get("buckets") is not None:
        encoder = BucketEncoder
    # What is no input of a model has nothing saved, and is refused as a category would be.
    made: FilePart = getattr(encoder, "saved", SavedIds).read(entry.get("learned"), f"column {entry.get('name')!r:.80}")
    if isinstance(made, SavedTime) and not {*entry.get("parts", Time.parts)} <= made.means.keys():
        raise DataError(f"column {entry.get('name')!r:.80} has no mean of each part")
    return made


class TableEncoder(RowEncoder):
    """Rows of a table of events.

    Args:
        stored: encoders as a file holds them.
        unread: features and numeric columns that do not matter: the columns of the rows that give nothing else need
            not be there, and are not read where they are.
    """

    def __init__(self, stored: StoredEncoders, unread: Collection[str] = ()) -> None:
        super().__init__(stored)
        about = stored.about
        learned = [_check_learned(entry) for entry in about["columns"]]
        widths = [values.width for values in learned if isinstance(values, SavedVector)]
        # A vector's components are counted before their names are made.
        if sum(widths) > len(self.dense):
            raise DataError(f"vectors of {widths[:5]} components do not make {len(self.dense)} numeric columns")
        vocabularies = _FileVocabularies(stored)
        self.encoders: list[Encoder] = [read_encoder(entry, vocabularies) for entry in about["columns"]]
        given = {name: "dense" for e in self.encoders for name in e.dense}
        given |= {f.name: f.form for e in self.encoders for f in e.features}
        wanted = {**dict.fromkeys(self.dense, "dense"), **{f["name"]: f["form"] for f in about["features"]}}
        odd = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
        if odd:
            raise DataError(f"columns and inputs of the model differ in {', '.join(odd[:5])}")
        for encoder in self.encoders:
            known: Any = encoder.vocabulary
            edges = isinstance(encoder, BucketEncoder)
            if known is not None and (isinstance(known, MappedVocabulary) == edges or (
                isinstance(encoder, VocabularyEncoder) and known.dtype != encoder.dtype
            )):  # fmt: skip
                raise DataError(f"the vocabulary of column {encoder.column.name!r} is of another type")
        self.matters = [not {*e.dense, *(f.name for f in e.features)} <= {*unread} for e in self.encoders]
        self.read = [e for e, matters in zip(self.encoders, self.matters, strict=True) if matters]
        self.columns = tuple(dict.fromkeys(e.column.source for e in self.read))
        lists = [e.column for e in self.read if getattr(e.column, "separator", e.column) is None]
        vectors = [e.column for e in self.read if isinstance(e.column, Vector)]
        self.nested = tuple(dict.fromkeys(c.source for c in [*lists, *vectors]))
        self.texts = tuple(e.column.source for e in self.encoders if getattr(e, "dtype", None) == pl.String)
        self.options = dict(about.get("source") or {})

    def open(self, table: Any, options: Mapping[str, Any] | None = None) -> Source:
        given = dict(options or {})
        source = open_like(table, self.options, given)
        check_dialect(source, self.columns, given)
        encoders = [*self.read, *self.others(source.types)]
        read_as_learned(source, encoders)
        if isinstance(source, FrameSource):
            source = FrameSource(_with_64_bits(source.frame), source.files[0], source.written)
        types = source.types
        faults = [f"column {name!r} is missing" for name in self.columns if name not in types]
        for encoder in encoders:
            name = encoder.column.source
            why = None if name not in types or types[name] == pl.Null else encoder.refuse(types[name])
            if why is not None:
                faults.append(f"column {name!r} as {encoder.column.kind}: {why}")
        raise_faults(faults, f"the rows and the model; the rows have {', '.join(types)}")
        check_spelling(source, encoders, given)
        return source

    def others(self, types: Mapping[str, pl.DataType]) -> Sequence[Encoder]:
        """Encoders of columns that rows must have besides those of the model, by the types of the rows' columns."""
        return ()

    def encode(self, source: Source, chunk: Chunk) -> EncodedRows:
        frame = chunk.frame
        good, bad = find_bad_rows(chunk, self._faults(frame))
        frame = frame if good.all() else frame.filter(pl.Series(good))
        columns: dict[str, pl.Series] = {}
        counts: dict[str, dict[str, int]] = {}
        nothing = pl.repeat(None, len(frame), dtype=pl.Null, eager=True)
        for encoder, matters in zip(self.encoders, self.matters, strict=True):
            values = frame[encoder.column.source] if matters else nothing
            encoded = encoder.encode(values)
            columns.update(encoded.columns)
            counts[encoder.column.name] = encoded.counts
        made = pl.DataFrame([values.rename(name) for name, values in columns.items()])
        return EncodedRows(self.batch(made, len(frame)), frame, tuple(bad), counts)

    def _faults(self, frame: pl.DataFrame) -> Iterator[tuple[str, Fault]]:
        for encoder in [*self.read, *self.others(frame.schema)]:
            name = encoder.column.source
            if encoder.checks(frame[name].dtype) and frame[name].dtype != pl.Null:
                yield from ((name, fault) for fault in encoder.faults(frame[name]))


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
