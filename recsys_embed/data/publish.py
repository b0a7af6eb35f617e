"""Last step of a conversion: move the finished files into place, ``schema.json`` last."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_embed.data.folder import SCHEMA_FILE, STATS_FILE, WORK_DIR, storage_error, write_file, write_json
from recsys_embed.data.manifest import Manifest
from recsys_embed.errors import DataError
from recsys_embed.utils.files import move_into_place

QUARANTINE_FILE = "quarantine.jsonl"


def data_files(manifest: Manifest) -> list[str]:
    """Relative paths of everything a manifest names."""
    shards = [s.file for split in manifest.splits.values() for s in split.shards]
    # Features may share a vocabulary.
    return [*shards, *dict.fromkeys(f.vocab for f in manifest.features if f.vocab)]


@dataclass(frozen=True)
class BuiltDataset:
    """A finished data set in the work folder, ready to be published."""

    work: Path
    manifest: Manifest
    stats: dict[str, Any]
    bad_files: tuple[Path, ...]


def publish(out: Path, built: BuiltDataset) -> None:
    """Replace the content of ``out`` by ``built``.

    A data set that was there goes first. A crash in between leaves files that the next run moves or finds in place.
    """
    files = data_files(built.manifest)
    staged = built.work / "out"
    moved: dict[Path, list[Path]] = {}
    try:
        if any((staged / f).exists() for f in files):
            (out / SCHEMA_FILE).unlink(missing_ok=True)
        for name in files:
            if (staged / name).exists():
                moved.setdefault((out / name).parent, []).append(staged / name)
            elif not (out / name).exists():
                raise DataError(f"{out / name}: is missing, though an earlier run wrote it; pass --restart")
        # Flushed here, each folder once: until now a restart of the machine would have discarded them.
        for folder, ready in moved.items():
            folder.mkdir(parents=True, exist_ok=True)
            move_into_place(ready, folder)
        _remove_others(out, set(files))
    except OSError as e:
        raise storage_error(out, e) from e
    if built.bad_files:
        write_file(out / QUARANTINE_FILE, lambda p: _join(p, built.bad_files))
    else:
        (out / QUARANTINE_FILE).unlink(missing_ok=True)
    write_json(out / STATS_FILE, built.stats)
    write_json(out / SCHEMA_FILE, built.manifest.to_dict())
    shutil.rmtree(out / WORK_DIR, ignore_errors=True)


def _remove_others(out: Path, keep: set[str]) -> None:
    """Remove Parquet files of an earlier data set."""
    for pattern in ("*-[0-9]*.parquet", "vocab/*.parquet"):
        for path in out.glob(pattern):
            if str(path.relative_to(out)) not in keep:
                path.unlink()


def _join(path: Path, files: tuple[Path, ...]) -> None:
    with path.open("wb") as f:
        for piece in files:
            f.write(piece.read_bytes())
