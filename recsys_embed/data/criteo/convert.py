"""Criteo text to a data folder: parse into parts, count and number each field, write Parquet, publish.

Every step leaves whole files behind and is skipped when they are there already, so a conversion that was killed goes
on where it stopped and ends with the bytes it would have had. Memory is bounded by the size of a part and by one
field's vocabulary at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recsys_embed.data.conversion import ConvertReport, Progress, check_target, finished, no_progress
from recsys_embed.data.criteo.encode import encode_fields
from recsys_embed.data.criteo.ingest import Ingest, input_record
from recsys_embed.data.criteo.options import CriteoOptions
from recsys_embed.data.folder import WORK_DIR, lock
from recsys_embed.data.manifest import Manifest, read_manifest
from recsys_embed.data.publish import publish
from recsys_embed.data.shards import write_shards
from recsys_embed.data.text_blocks import find_files
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.utils.types import JSON


def convert_criteo(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    options: CriteoOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
    extra: JSON | None = None,
) -> ConvertReport:
    """Convert Criteo's tab-separated text (label, 13 integers, 26 hex categories) into a data folder.

    Args:
        inputs: files, globs or folders; plain, gzip or zstandard.
        out: folder to make; an unfinished conversion in it is continued.
        options: see :class:`CriteoOptions`.
        overwrite: replace a finished data set in ``out``.
        progress: see ``Progress``.
        extra: JSON values to keep in the schema under ``"extra"``.

    Raises:
        ConfigError: bad options or inputs; ``out`` holds something else.
        DataError: bad rows under ``on_bad_row="fail"``, with file, line, column and reason.
        StorageError: ``out`` cannot be written or another process is writing it.
    """
    options = options or CriteoOptions()
    files = find_files([inputs] if isinstance(inputs, str | Path) else inputs)
    out = Path(out)
    options, donor = _adopt(options)
    record: dict[str, Any] = {
        "settings": options.content,
        "inputs": [input_record(f) for f in files],
        "extra": extra or {},
    }
    if donor is not None:
        record["settings"]["like"] = donor.fingerprint
    check_target(out)
    with lock(out):
        done = finished(out, record, overwrite)
        if done is not None:
            shutil.rmtree(out / WORK_DIR, ignore_errors=True)
            return done
        notices: list[str] = []
        ingest = Ingest(out / WORK_DIR, files, options, record, notices)
        parts = ingest.run(progress)
        if not any(p.info.rows for p in parts):
            bad = [p.path.with_suffix(".bad.jsonl") for p in parts if p.info.bad]
            seen = f"; the bad rows are in {bad[0]}" if bad else ""
            raise DataError(f"no row could be read from {', '.join(map(str, files[:3]))}{seen}")
        fields = encode_fields(out / WORK_DIR, parts, files, options, donor, progress)
        built = write_shards(out / WORK_DIR, parts, files, options, fields, record, progress)
        publish(out, built)
    rows = {name: split.rows for name, split in built.manifest.splits.items()}
    return ConvertReport(out, rows, sum(p.info.bad for p in parts), False, tuple(notices))


def _adopt(options: CriteoOptions) -> tuple[CriteoOptions, Manifest | None]:
    """With ``like``, take the settings that ids and numbers depend on from that folder."""
    if options.like is None:
        return options, None
    from dataclasses import replace

    donor = read_manifest(options.like)
    theirs = donor.settings
    try:
        return replace(
            options,
            ids=theirs["ids"],
            id_bits=theirs["id_bits"],
            dense=theirs["dense"],
            min_count=theirs["min_count"] or options.min_count,
        ), donor
    except (KeyError, ConfigError) as e:
        raise DataError(f"{options.like}: its settings are not those of a conversion: {e}; name another folder") from e
