"""Raw rows of Criteo's 39 columns to batches: they are written as its text and read by its parser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.core.hashing import EMPTY_ID
from recsys_embed.data.criteo.layout import CAT_NAMES, INT_NAMES, LineLayout
from recsys_embed.data.criteo.parse import ParsedBlock, parse_block
from recsys_embed.data.criteo.transform import bucket_transform, log_transform
from recsys_embed.data.serving.lookups import IntegerIds, MappedVocabulary, make_vocabulary
from recsys_embed.data.serving.row_encoder import EncodedRows, RowEncoder
from recsys_embed.data.serving.stored import StoredEncoders
from recsys_embed.data.sources import READERS, Source, open_source
from recsys_embed.data.sources.bad_rows import row_numbers
from recsys_embed.data.sources.base import BadRow, Chunk, find_files
from recsys_embed.data.sources.csv import CsvFiles, CsvOptions
from recsys_embed.data.text_blocks import detect
from recsys_embed.errors import DataError, raise_faults

_TEXT = (".txt", ".tsv", ".csv")
_OTHERS = tuple(e for reader in READERS if reader.format != "csv" for e in reader.endings)


class CriteoEncoder(RowEncoder):
    """Rows with the columns ``I1`` to ``I13`` (integers) and ``C1`` to ``C26`` (hexadecimal text).

    Files that are text have them in this order, with or without a label before and a header above, as ``data criteo``
    reads them.
    """

    columns = (*INT_NAMES, *CAT_NAMES)

    def __init__(self, stored: StoredEncoders) -> None:
        super().__init__(stored)
        options = stored.about["options"]
        self.raw, self.bits, self.bucket = options["ids"] == "raw", options["id_bits"], options["dense"] == "bucket"
        if self.bits not in EMPTY_ID or set(self.dense) - set(INT_NAMES) or set(self.single) - set(self.columns):
            raise DataError("the encoders of the file are not those of Criteo's columns")
        known = {item.name: make_vocabulary(item, stored.arrays) for item in stored.vocabularies.values()}
        absent = [] if self.raw else [name for name in self.single if name not in known]
        raise_faults([f"the file holds no vocabulary of {name}" for name in absent], "the encoders", DataError)
        self.known = known

    def open(self, table: Any, options: Mapping[str, Any] | None = None) -> Source:
        paths = [table] if isinstance(table, str | Path) else table
        of_files = isinstance(paths, list | tuple) and all(isinstance(p, str | Path) for p in paths)
        if of_files and not _other_format(paths, options):
            source: Source = self._text(paths, dict(options or {}))
        else:
            source = open_source(table, options)
        types = source.types
        faults = [f"column {name!r} is missing" for name in self.columns if name not in types]
        for name in self.columns:
            dtype = types.get(name)
            number = name in INT_NAMES and dtype is not None and dtype.is_numeric()
            if dtype is not None and not number and dtype not in (pl.String, pl.Null):
                want = "integers" if name in INT_NAMES else "hexadecimal text"
                faults.append(f"column {name!r}: expected {want}; got {dtype}")
        raise_faults(faults, f"the rows and the model; the rows have {', '.join(types)}")
        return source

    def _text(self, paths: Any, options: dict[str, Any]) -> Source:
        files = find_files(paths, _TEXT)
        given = dict(options)
        given.pop("format", None)
        header, layout = detect(files[0], LineLayout(separator=given.pop("separator", "\t"), id_bits=self.bits))
        dialect = {
            "separator": layout.separator, "quote": "", "header": header, "names": layout.names,
            "types": dict.fromkeys(layout.names, "string"), **given,
        }  # fmt: skip
        return CsvFiles(files, CsvOptions.from_dict(dialect))

    def encode(self, source: Source, chunk: Chunk) -> EncodedRows:
        frame = chunk.frame
        text = _lines(frame)
        if text.count(b"\n") != len(frame) or text.count(b"\t") != len(frame) * (len(self.columns) - 1):
            odd = frame.select(pl.any_horizontal(pl.col(self.columns).cast(pl.String).str.contains(r"[\t\n]")))
            place = source.place(chunk.file, int(row_numbers(chunk)[odd.to_series().arg_max() or 0]))
            raise DataError(f"{place}: a value holds a tab or a newline, which none of Criteo's does")
        block = parse_block(text, LineLayout(labels=False, id_bits=self.bits))
        bad = list(chunk.bad)
        if block.bad:
            good = np.ones(len(frame), bool)
            good[[row.line - 1 for row in block.bad]] = False
            numbers = row_numbers(chunk).tolist()
            for row in block.bad:
                raw = row.raw.decode("utf-8", "replace")[:200]
                bad.append(BadRow(chunk.file, numbers[row.line - 1], row.column or "", row.reason, raw))
            frame = frame.filter(pl.Series(good))
        made = pl.DataFrame([*self._numbers(block), *self._ids(block)])
        return EncodedRows(self.batch(made, len(frame)), frame, tuple(sorted(bad, key=lambda r: r.row)))

    def _numbers(self, block: ParsedBlock) -> list[pl.Series]:
        return [pl.Series(name, log_transform(name, block.ints[INT_NAMES.index(name)])) for name in self.dense]

    def _ids(self, block: ParsedBlock) -> list[pl.Series]:
        found = []
        for name in self.single:
            if name in CAT_NAMES:
                at = CAT_NAMES.index(name)
                values, missing = block.cats[at], block.missing[at]
            else:
                values, missing = bucket_transform(block.ints[INT_NAMES.index(name)])
            found.append(
                pl.Series(name, self._raw(values, missing) if self.raw else self._known(name, values, missing))
            )
        return found

    def _raw(self, values: NDArray[Any], missing: NDArray[np.bool_]) -> NDArray[np.int64]:
        ids = values.astype(np.uint64).view(np.int64)
        ids[missing] = EMPTY_ID[self.bits]
        return ids

    def _known(self, name: str, values: NDArray[Any], missing: NDArray[np.bool_]) -> NDArray[np.int64]:
        vocabulary = self.known[name]
        if not isinstance(vocabulary, MappedVocabulary) or not isinstance(vocabulary.lookup, IntegerIds):
            raise DataError(f"the vocabulary of {name} is not one of integers")
        ids = vocabulary.lookup(values.view(np.int32 if values.dtype.itemsize == 4 else np.int64)).astype(np.int64)
        ids[missing] = vocabulary.missing_id
        return ids


def _other_format(paths: Any, options: Mapping[str, Any] | None) -> bool:
    """Whether files are of a format that names its columns."""
    named = (options or {}).get("format")
    return named not in (None, "csv") or all(str(p).lower().endswith(_OTHERS) for p in paths)


def _lines(frame: pl.DataFrame) -> bytes:
    """Rows as lines of Criteo's text without labels."""
    cells = []
    for name in CriteoEncoder.columns:
        values = frame[name]
        if values.dtype.is_float():
            values = values.fill_nan(None)
            whole = values.cast(pl.Int64, strict=False)
            values = whole if (whole.cast(values.dtype) == values).all() else values
        cells.append(values.cast(pl.String).fill_null("").alias(name))
    if not len(frame):
        return b""
    rows = pl.DataFrame(cells).select(pl.concat_str(CriteoEncoder.columns, separator="\t").alias("line"))
    joined: str = rows["line"].str.join("\n").item()
    return joined.encode() + b"\n"
