"""Second step of a conversion: count every field on the training rows and number its values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys_embed.core.hashing import EMPTY_ID
from recsys_embed.data.conversion import PROCESS
from recsys_embed.data.criteo.ingest import worker_count
from recsys_embed.data.criteo.layout import CAT_NAMES, INT_NAMES
from recsys_embed.data.criteo.options import CriteoOptions
from recsys_embed.data.criteo.parts import ParsedPart
from recsys_embed.data.criteo.transform import bucket_transform
from recsys_embed.data.field_counts import FieldCounter, describe
from recsys_embed.data.folder import file_hash, write_file, write_json
from recsys_embed.data.manifest import Feature, Manifest
from recsys_embed.data.splits import TRAIN
from recsys_embed.data.vocab import Vocabulary
from recsys_embed.errors import ConfigError

_FIXED, _ROW_COST, _DISTINCT_COST = PROCESS - (100 << 20), 64, 150
"""Bytes of the process, which parses nothing now; measured peaks per pending row and distinct value of a field."""
RAW_MISSING = EMPTY_ID
"""Raw id of the empty field: outside the range of 32-bit ids; for 64 bits the one value the parser refuses."""


@dataclass(frozen=True)
class FieldResult:
    """A numbered field: its feature, its training statistics, and its ids of all rows (int32; None in raw mode)."""

    feature: Feature
    stats: dict[str, Any]
    ids: Path | None


@dataclass(frozen=True)
class PartRows:
    """The rows of all parts, with the split of each."""

    parts: Sequence[ParsedPart]
    options: CriteoOptions
    file_codes: list[int]

    @property
    def total(self) -> int:
        return sum(p.info.rows for p in self.parts)

    def __iter__(self) -> Iterator[tuple[ParsedPart, int, NDArray[np.int8]]]:
        """Part, number of its first row among all, split codes of its rows."""
        first = 0
        total = self.total
        for part in self.parts:
            n = part.info.rows
            rows = np.arange(first, first + n)
            yield part, first, self.options.split.codes(total, rows, self.file_codes[part.info.file])
            first += n


def field_names(options: CriteoOptions) -> tuple[str, ...]:
    """Categorical features in column order: bucketed integers come first."""
    return (INT_NAMES if options.dense == "bucket" else ()) + CAT_NAMES


def read_field(part: ParsedPart, name: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Unsigned values of a categorical field, and where it is empty."""
    number = int(name[1:]) - 1
    return bucket_transform(part.ints(number)) if name[0] == "I" else part.cats(number)


def encode_fields(
    work: Path,
    parts: Sequence[ParsedPart],
    files: Sequence[Path],
    options: CriteoOptions,
    donor: Manifest | None,
    progress: Callable[[str, float, float, int], None],
) -> list[FieldResult]:
    """Number all fields, one after another; what an earlier run finished is kept."""
    rows = PartRows(parts, options, options.split.file_codes(files))
    names = field_names(options)
    results = []
    with ThreadPoolExecutor(worker_count(options)) as pool:
        for i, name in enumerate(names):
            done = work / "fields" / f"{name}.json"
            if not done.exists():
                write_json(done, _one_field(work, name, rows, options, donor, pool), durable=False)
            saved = json.loads(done.read_text())
            ids = work / "fields" / f"{name}.ids" if options.ids == "vocab" else None
            results.append(FieldResult(Feature(**saved["feature"]), saved["stats"], ids))
            progress("number", i + 1, len(names), rows.total)
    return results


def _one_field(
    work: Path, name: str, rows: PartRows, options: CriteoOptions, donor: Manifest | None, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    raw = options.ids == "raw"
    limit = (options.max_memory - _FIXED) // _DISTINCT_COST
    counter = FieldCounter(max_rows=options.max_memory // 4 // _ROW_COST, max_distinct=limit)
    for part, _, codes in rows:
        train = codes == TRAIN
        if train.any():
            values, missing = read_field(part, name)
            counter.add(*((values, missing) if train.all() else (values[train], missing[train])))
    counts = counter.result()
    stats = describe(counts)
    if raw:
        missing_id = RAW_MISSING[options.id_bits]
        size = max(1, min(stats["distinct"], 2**31 - 1))
        theirs = None if donor is None else next(f for f in donor.features if f.name == name)
        feature = theirs or Feature(name, size, missing_id, counts.level > 0, vocab=None, vocab_sha256=None)
        return {"feature": asdict(feature), "stats": stats}
    if counts.level and donor is None:
        need = _FIXED + (len(counts.values) << counts.level) * _DISTINCT_COST * 5 // 4
        raise ConfigError(
            f"field {name} has more than {limit} distinct values; its vocabulary needs about {need >> 20} MiB and "
            f"--max-memory is {options.max_memory >> 20} MiB: raise --max-memory, or use --ids raw with hashing methods"
        )
    target = work / "out" / "vocab" / f"{name}.parquet"
    if donor is not None and options.like is not None:
        file = options.like / "vocab" / f"{name}.parquet"
        vocab = Vocabulary.read(file, name)
        write_file(target, lambda p: _copy(file, p), durable=False)
    else:
        vocab = Vocabulary.from_counts(name, counts, min_count=1 if name[0] == "I" else options.min_count)
        vocab.write(target, durable=False)
    del counts, counter
    vocab.prepare()
    _write_ids(work / "fields" / f"{name}.ids", name, rows, vocab, pool)
    stats["kept"] = vocab.size - 1
    feature = Feature(name, vocab.size, vocab.missing_id, False, f"vocab/{name}.parquet", file_hash(target))
    return {"feature": asdict(feature), "stats": stats}


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _write_ids(path: Path, name: str, rows: PartRows, vocab: Vocabulary, pool: ThreadPoolExecutor) -> None:
    def encode(part: ParsedPart) -> NDArray[np.int32]:
        return vocab.encode(*read_field(part, name))

    def save(temporary: Path) -> None:
        width = max(1, worker_count(rows.options))
        with temporary.open("wb") as f:
            for at in range(0, len(rows.parts), width):
                for ids in pool.map(encode, rows.parts[at : at + width]):
                    f.write(ids.data)

    write_file(path, save, durable=False)
