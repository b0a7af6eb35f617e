"""Third step of a conversion: parts and ids to one Parquet file per part and split."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_embed.data.criteo.encode import FieldResult, PartRows, field_names, read_field
from recsys_embed.data.criteo.ingest import worker_count
from recsys_embed.data.criteo.layout import INT_NAMES
from recsys_embed.data.criteo.options import CriteoOptions
from recsys_embed.data.criteo.parts import ParsedPart
from recsys_embed.data.criteo.transform import log_transform, transform_record
from recsys_embed.data.folder import file_hash, write_file, write_json
from recsys_embed.data.manifest import Feature, Manifest, Shard, Split
from recsys_embed.data.publish import BuiltDataset
from recsys_embed.data.splits import SPLITS

ROW_GROUP = 65536


@dataclass(frozen=True)
class _SplitShard:
    """The shard that one part contributed to one split."""

    split: str
    shard: Shard
    positives: int | None
    missing: dict[str, int]
    oov: dict[str, int]


def write_shards(
    work: Path,
    parts: Sequence[ParsedPart],
    files: Sequence[Path],
    options: CriteoOptions,
    fields: Sequence[FieldResult],
    record: dict[str, Any],
    progress: Callable[[str, float, float, int], None],
) -> BuiltDataset:
    """Write all shards that are missing; returns the manifest and statistics of the whole set.

    Raises:
        RuntimeError: rows went missing on the way (cannot happen; it is checked all the same).
    """
    rows = PartRows(parts, options, options.split.file_codes(files))
    pieces: list[_SplitShard] = []
    done = 0
    ahead: deque[tuple[ParsedPart, Future[list[_SplitShard]]]] = deque()
    with ThreadPoolExecutor(worker_count(options)) as pool:

        def finish() -> None:
            nonlocal done
            part, future = ahead.popleft()
            pieces.extend(future.result())
            done += part.info.rows
            progress("write", done, rows.total, done)

        for part, first, codes in rows:
            ahead.append((part, pool.submit(_part_shards, work, part, first, codes, options, fields)))
            if len(ahead) > worker_count(options):
                finish()
        while ahead:
            finish()
    splits = {
        name: Split.of(
            [p.shard for p in pieces if p.split == name],
            sum(p.positives or 0 for p in pieces if p.split == name) if parts[0].info.labels else None,
        )
        for name in SPLITS
        if any(p.split == name for p in pieces)
    }
    good, bad = rows.total, sum(p.info.bad for p in parts)
    if sum(s.rows for s in splits.values()) != good:
        raise RuntimeError(f"{good} rows were parsed but {sum(s.rows for s in splits.values())} written")
    manifest = Manifest(
        labels=parts[0].info.labels,
        id_mode=options.ids,
        features=tuple(f.feature for f in fields),
        dense=() if options.dense == "bucket" else INT_NAMES,
        transform=transform_record(options.dense),
        splits=splits,
        rows_read=good + bad,
        quarantined=bad,
        settings=record["settings"],
        made_from=record,
        extra=record["extra"],
    )
    bad_files = tuple(p.path.with_suffix(".bad.jsonl") for p in parts if p.info.bad)
    faults = [f"{files[p.info.file]}: {p.info.fault}" for p in parts if p.info.fault]
    return BuiltDataset(work, manifest, _stats(pieces, fields, splits, faults, bad), bad_files)


def _part_shards(
    work: Path,
    part: ParsedPart,
    first: int,
    codes: NDArray[np.int8],
    options: CriteoOptions,
    fields: Sequence[FieldResult],
) -> list[_SplitShard]:
    done = work / "shards" / f"{part.info.index:06d}.json"
    if done.exists():
        saved = json.loads(done.read_text())
        return [_SplitShard(**{**piece, "shard": Shard(**piece["shard"])}) for piece in saved]
    frame = _frame(part, first, options, fields)
    present = np.unique(codes)
    pieces = []
    for code in present:
        some = frame if len(present) == 1 else frame.filter(pl.Series(codes == code))
        name = SPLITS[code]
        file = f"{name}-{part.info.index:06d}.parquet"
        path = work / "out" / file
        write_file(path, lambda p, f=some: write_parquet(p, f), durable=False)  # type: ignore[misc]
        shard = Shard(file, len(some), path.stat().st_size, file_hash(path))
        missing = {f.feature.name: _count_missing(some[f.feature.name], f.feature) for f in fields}
        oov = {f.feature.name: int((some[f.feature.name] == 0).sum()) for f in fields if f.ids}
        positives = int(some["label"].sum()) if part.info.labels else None
        pieces.append(_SplitShard(name, shard, positives, missing, oov))
    write_json(done, [asdict(piece) for piece in pieces], durable=False)
    return pieces


def write_parquet(path: Path, frame: pl.DataFrame) -> None:
    """Write a shard; equal frames give equal bytes."""
    frame.write_parquet(path, compression="lz4", statistics=False, row_group_size=ROW_GROUP)


def _count_missing(column: pl.Series, feature: Feature) -> int:
    if feature.vocab is None:
        return column.null_count()
    return int((column == feature.missing_id).sum()) if feature.missing_id else 0


def _frame(part: ParsedPart, first: int, options: CriteoOptions, fields: Sequence[FieldResult]) -> pl.DataFrame:
    """All columns of a part: label Int8, log integers Float32, ids Int32 (vocab) or nullable raw values."""
    n = part.info.rows
    columns: dict[str, Any] = {}
    labels = part.labels()
    if labels is not None:
        columns["label"] = labels
    if options.dense == "log":
        for i, name in enumerate(INT_NAMES):
            columns[name] = log_transform(name, part.ints(i))
    for result, name in zip(fields, field_names(options), strict=True):
        if result.ids is not None:
            columns[name] = np.fromfile(result.ids, np.int32, n, offset=4 * first)
        else:
            values, missing = read_field(part, name)
            series = pl.Series(name, values.view(np.int64) if name[0] == "I" else values)
            columns[name] = series.set(pl.Series(missing), None) if missing.any() else series
    return pl.DataFrame(columns)


def _stats(
    pieces: list[_SplitShard],
    fields: Sequence[FieldResult],
    splits: dict[str, Split],
    faults: list[str],
    bad: int,
) -> dict[str, Any]:
    """Content of ``stats.json``: training statistics per field, missing and unknown shares per field and split."""
    out: dict[str, Any] = {}
    for result in fields:
        name = result.feature.name
        stats = dict(result.stats)
        for key in ("missing", "oov"):
            if key == "oov" and result.ids is None:
                continue
            counts = {s: sum(getattr(p, key)[name] for p in pieces if p.split == s) for s in splits}
            stats[f"{key}_rate"] = {s: round(c / splits[s].rows, 6) for s, c in counts.items() if splits[s].rows}
        stats["num_embeddings"] = result.feature.num_embeddings
        out[name] = stats
    rates = {
        s: {"rows": v.rows, "click_rate": None if v.positives is None or not v.rows else round(v.positives / v.rows, 6)}
        for s, v in splits.items()
    }
    return {"splits": rates, "quarantined": bad, "file_faults": faults, "fields": out}
