"""Public data sets: what their files look like, where they are, and the published protocol, one TOML file each."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

from recsys_embed.data.conversion import ConvertReport, OnBadRow, Progress, no_progress
from recsys_embed.data.criteo.convert import convert_criteo
from recsys_embed.data.criteo.options import CriteoOptions
from recsys_embed.data.sources import READERS, Source
from recsys_embed.data.sources.joined import Joined, Side, read_side
from recsys_embed.data.splits import SplitRule, fraction
from recsys_embed.data.table.convert import convert_table
from recsys_embed.data.table.schema import TableSchema
from recsys_embed.errors import ConfigError, unknown_name

_FOLDER = files("recsys_embed.data.presets")
_SCHEMA = ("columns", "split", "label")
_COMPRESSED = ("", ".gz", ".zst")


@dataclass(frozen=True)
class Preset:
    """A public data set.

    Args:
        name: of the preset.
        title: of the data set.
        protocol: whose labels, split and rare values these are.
        where: to get the files.
        files: by role, what a file is called and how it is read; the first are the events, the others have a ``key``.
        schema: of the joined table; None for Criteo's own format.
        criteo: options of ``data criteo``.
    """

    name: str
    title: str
    protocol: str
    where: str
    files: Mapping[str, Mapping[str, Any]]
    schema: TableSchema | None
    criteo: Mapping[str, Any]


def preset_names() -> list[str]:
    """All presets.

    >>> "movielens_100k" in preset_names()
    True
    """
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """The TOML of a preset.

    Raises:
        UnknownNameError: there is no such preset.
    """
    if name not in preset_names():
        raise unknown_name("preset", name, preset_names())
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def read_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UnknownNameError: there is no such preset.

    >>> read_preset("movielens_1m").schema.split.kind
    'random'
    """
    data = tomllib.loads(preset_text(name))
    schema = None if "criteo" in data else TableSchema.from_dict({k: data[k] for k in _SCHEMA if k in data})
    return Preset(
        name, data["title"], data["protocol"], data["where"], data["files"], schema, data.get("criteo", {})
    )  # fmt: skip


def convert_preset(
    name: str,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    on_bad_row: OnBadRow = "fail",
    max_memory: int = 1 << 30,
    workers: int = 0,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ConvertReport:
    """Convert a public data set into a data folder, as published results have it.

    Args:
        name: of the preset.
        inputs: its files, plain, ``.gz`` or ``.zst``, or a folder that holds them.
        out, on_bad_row, max_memory, workers, overwrite, progress: see :func:`recsys_embed.data.convert_table`.

    Raises:
        UnknownNameError: there is no such preset.
        ConfigError: files are missing; says what they hold and where they are.
        DataError: bad rows under ``on_bad_row="fail"``.
    """
    preset = read_preset(name)
    paths = [Path(inputs)] if isinstance(inputs, str | Path) else [Path(p) for p in inputs]
    found = _find(preset, paths)
    extra = {"preset": name, "protocol": preset.protocol}
    if preset.schema is None:
        options = dict(preset.criteo)
        if "split" in options:
            split = dict(options["split"])
            shares = {k: fraction(split[k], k) for k in ("valid", "test") if k in split}
            options["split"] = SplitRule(**{**split, **shares})
        settings = CriteoOptions(**options, on_bad_row=on_bad_row, max_memory=max_memory, workers=workers)
        events = next(iter(found.values()))
        return convert_criteo(events, out, settings, overwrite=overwrite, progress=progress, extra=extra)
    return convert_table(
        _table(preset, found), out, preset.schema, on_bad_row=on_bad_row, max_memory=max_memory, workers=workers,
        overwrite=overwrite, progress=progress, extra=extra,
    )  # fmt: skip


def preset_table(name: str, inputs: str | Path | Sequence[str | Path]) -> Source | list[Path]:
    """The rows of a public data set's own files, joined as its preset has them, e.g. to score them.

    Args:
        name: of the preset.
        inputs: its files, plain, ``.gz`` or ``.zst``, or a folder that holds them.

    Returns:
        A table for :meth:`recsys_embed.models.CTRModel.predict`; of Criteo's text the files.

    Raises:
        UnknownNameError: there is no such preset.
        ConfigError: files are missing; says what they hold and where they are.
    """
    preset = read_preset(name)
    found = _find(preset, [Path(inputs)] if isinstance(inputs, str | Path) else [Path(p) for p in inputs])
    return next(iter(found.values())) if preset.schema is None else _table(preset, found)


def _find(preset: Preset, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by role.

    Raises:
        ConfigError: names those that are missing, what they hold and where to get them.
    """
    absent = [str(p) for p in paths if not p.exists()]
    if absent:
        raise ConfigError(f"no such file or folder: {', '.join(absent)}")
    known = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    found: dict[str, list[Path]] = {}
    missing = []
    for role, entry in preset.files.items():
        by_pattern = [
            [f for f in known if any(fnmatch(f.name, pattern + more) for more in _COMPRESSED)]
            for pattern in entry["match"]
        ]
        hits = next((some for some in by_pattern if some), [])
        if not hits and len(preset.files) == 1 and not entry.get("every") and all(p.is_file() for p in paths):
            # The one table of the data set, under a name of the user's own.
            hits = list(paths)
        if entry.get("every"):
            lacking = [p for p, some in zip(entry["match"], by_pattern, strict=True) if not some]
            hits = [some[0] for some in by_pattern if some]
        else:
            lacking = [] if hits else [" or ".join(entry["match"])]
            # Criteo's days are files of one table; elsewhere a table is one file.
            hits = hits if preset.schema is None else hits[:1]
        if lacking:
            missing.append(f"{', '.join(lacking)} ({entry['holds']})")
        found[role] = hits
    if missing:
        raise ConfigError(
            f"preset {preset.name!r} needs {'; '.join(missing)}, which {', '.join(map(str, paths))} does not hold: get "
            f"{preset.title} from {preset.where} and give its folder"
        )
    return found


def _table(preset: Preset, found: Mapping[str, Sequence[Path]]) -> Source:
    formats = {reader.format: reader for reader in READERS}
    sources: dict[str, Source] = {}
    for role, entry in preset.files.items():
        reader = formats[entry.get("format", "csv")]
        sources[role] = reader(found[role], reader.options_type.from_dict(entry.get("source", {})))
    events, *others = preset.files
    sides: list[Side] = []
    for role in others:
        entry = preset.files[role]
        sides.append(read_side(role, sources[role], entry["key"], entry.get("lists", {})))
    return Joined(sources[events], sides) if sides else sources[events]
