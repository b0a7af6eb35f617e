"""Third step of a table's conversion: rows to one Parquet file per part and split."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from recsys_embed.data.columns import PARTS
from recsys_embed.data.columns.vocabulary import vocabulary_file
from recsys_embed.data.conversion import Progress
from recsys_embed.data.folder import file_hash, write_file, write_json
from recsys_embed.data.manifest import Feature, Manifest, Shard, Split
from recsys_embed.data.publish import BuiltDataset
from recsys_embed.data.shards import write_parquet
from recsys_embed.data.splits import SPLITS
from recsys_embed.data.table.codes import SplitCodes
from recsys_embed.data.table.learn import LEARNED, Learned
from recsys_embed.data.table.rows import Part, TableRows, in_order
from recsys_embed.utils.types import JSON


@dataclass(frozen=True)
class _Piece:
    """The shard that one part contributed to one split, and counts of what its values needed, by column."""

    split: str
    shard: Shard
    label_sum: float | None
    counts: dict[str, dict[str, int]]


def write_table(rows: TableRows, codes: SplitCodes, learned: Learned, record: JSON, progress: Progress) -> BuiltDataset:
    """Write all shards that are missing; returns the manifest and statistics of the whole set.

    Raises:
        RuntimeError: rows went missing on the way (cannot happen; it is checked all the same).
    """
    pieces: list[_Piece] = []
    done = 0

    def write(_: int, job: tuple[Part, int]) -> list[_Piece]:
        return _part_shards(rows, codes, learned, *job)

    jobs = list(rows.firsts())
    with ThreadPoolExecutor(rows.column_readers) as pool:
        for (part, _), found in zip(jobs, in_order(pool, write, jobs, rows.column_readers), strict=True):
            pieces += found
            done += part.good
            progress("write", done, rows.total, done)
    labels = any(c.part == "label" for c in rows.columns)
    binary = any(getattr(c, "task", None) == "binary" for c in rows.columns)
    splits = {}
    for name in SPLITS:
        some = [p for p in pieces if p.split == name]
        if some:
            clicks = round(sum(p.label_sum or 0 for p in some)) if labels and binary else None
            splits[name] = Split.of([p.shard for p in some], clicks)
    if sum(s.rows for s in splits.values()) != rows.total:
        raise RuntimeError(f"{rows.total} rows were read but {sum(s.rows for s in splits.values())} written")
    features = _features(rows, learned)
    kinds = {"raw" if f.vocab is None else "vocab" for f in features}
    encoders = [encoder for encoder, _ in learned.values()]
    manifest = Manifest(
        labels=labels,
        id_mode="mixed" if len(kinds) > 1 else next(iter(kinds), "vocab"),
        features=features,
        dense=_dense(learned),
        transform={"kind": "table"},
        splits=splits,
        rows_read=rows.total + rows.bad,
        quarantined=rows.bad,
        settings=record["settings"],
        made_from=record,
        extra=record["extra"],
        columns=tuple(encoder.to_dict() for encoder in encoders),
    )
    bad = tuple(rows.bad_path(p.index) for p in rows.parts if p.bad)
    return BuiltDataset(rows.work, manifest, _stats(pieces, learned, splits, labels, rows.bad), bad)


def _dense(learned: Learned) -> tuple[str, ...]:
    """Numeric columns in the order of a batch: numbers, parts of times, components of vectors."""
    order = ("numeric", "time", "vector")
    return tuple(
        name
        for kind in order
        for encoder, _ in learned.values()
        if encoder.column.kind == kind
        for name in encoder.dense
    )


def _features(rows: TableRows, learned: Learned) -> tuple[Feature, ...]:
    """Features in the order of a batch: single ones first, then lists and sequences."""
    hashes: dict[str, str] = {}
    found = []
    for encoder, _ in learned.values():
        for f in encoder.features:
            file = None
            if f.vocab is not None:
                file = vocabulary_file(f.vocab)
                hashes.setdefault(file, file_hash(rows.work / LEARNED / file))
            found.append(
                Feature(
                    f.name, f.num_embeddings, f.missing_id, f.estimated, file, hashes[file] if file else None,
                    f.form, f.table, f.max_length,
                )
            )  # fmt: skip
    return tuple(sorted(found, key=lambda f: f.form != "single"))


def _part_shards(rows: TableRows, codes: SplitCodes, learned: Learned, part: Part, first: int) -> list[_Piece]:
    done = rows.work / "shards" / f"{part.index:06d}.json"
    if done.exists():
        saved = json.loads(done.read_text())
        return [_Piece(**{**piece, "shard": Shard(**piece["shard"])}) for piece in saved]
    which = codes.of(part, first)
    pieces = []
    present = np.unique(which).tolist()
    for code in present:
        mask = None if len(present) == 1 else pl.Series(which == code)
        encoded, counts = _encode(rows, part, mask, learned)
        name = SPLITS[code]
        file = f"{name}-{part.index:06d}.parquet"
        path = rows.work / "out" / file
        write_file(path, lambda p, f=encoded: write_parquet(p, f), durable=False)  # type: ignore[misc]
        shard = Shard(file, len(encoded), path.stat().st_size, file_hash(path))
        total: Any = encoded["label"].cast(pl.Float64).sum() if "label" in encoded.columns else None
        pieces.append(_Piece(name, shard, total, counts))
    write_json(done, [asdict(piece) for piece in pieces], durable=False)
    return pieces


def _encode(
    rows: TableRows, part: Part, mask: pl.Series | None, learned: Learned
) -> tuple[pl.DataFrame, dict[str, dict[str, int]]]:
    """All columns of a shard: label, numeric columns, features, and the further parts."""
    columns: dict[str, pl.Series] = {}
    counts: dict[str, dict[str, int]] = {}
    # One column of the table after another, so that memory holds what is encoded and one column of raw values.
    by_source: dict[str, list[str]] = {}
    for name, (encoder, _) in learned.items():
        by_source.setdefault(encoder.column.source, []).append(name)
    for source, names in by_source.items():
        values = rows.read(part, [source])[source]
        if mask is not None:
            values = values.filter(mask)
        for name in names:
            encoded = learned[name][0].encode(values)
            columns.update(encoded.columns)
            counts[name] = encoded.counts
        del values
    first = ["label"] if "label" in columns else []
    last = [p for p in PARTS if p in columns and p != "label"]
    middle = [c for c in columns if c not in first and c not in last]
    return pl.DataFrame([columns[c].rename(c) for c in (*first, *middle, *last)]), counts


def _stats(pieces: list[_Piece], learned: Learned, splits: dict[str, Split], labels: bool, bad: int) -> dict[str, Any]:
    """Content of ``stats.json``: as of Criteo's folders, and per column and split what its values needed."""
    totals: dict[str, dict[str, dict[str, int]]] = {name: {} for name in learned}
    for piece in pieces:
        for name, counts in piece.counts.items():
            for what, n in counts.items():
                by_split = totals[name].setdefault(what, dict.fromkeys(splits, 0))
                by_split[piece.split] += n
    fields: dict[str, Any] = {}
    for name, (encoder, stats) in learned.items():
        for feature in encoder.features:
            found = totals[name]
            of = found.get("values", {s: splits[s].rows for s in splits})
            field = dict(stats)
            missing = {s: sum(found.get(w, {}).get(s, 0) for w in ("null", "empty", "nan")) for s in splits}
            field["missing_rate"] = {s: round(n / splits[s].rows, 6) for s, n in missing.items()}
            if "unknown" in found:
                field["oov_rate"] = {s: round(n / of[s], 6) if of[s] else 0.0 for s, n in found["unknown"].items()}
            field["num_embeddings"] = feature.num_embeddings
            if encoder.vocabulary is not None:
                field["kept"] = feature.num_embeddings - 1
            fields[feature.name] = field
    about: dict[str, Any] = {}
    for split, known in splits.items():
        total = sum(p.label_sum or 0.0 for p in pieces if p.split == split)
        about[split] = {
            "rows": known.rows,
            "click_rate": None if known.positives is None else round(known.positives / known.rows, 6),
        }
        if labels and known.positives is None:
            about[split]["label_mean"] = round(total / known.rows, 6)
    return {"splits": about, "quarantined": bad, "file_faults": [], "fields": fields, "columns": totals}
