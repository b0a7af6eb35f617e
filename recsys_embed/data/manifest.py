"""The manifest of a data folder (``schema.json``): versioned; unknown keys and damage are reported."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from recsys_embed.data.folder import SCHEMA_FILE
from recsys_embed.errors import DataError
from recsys_embed.utils.settings import refuse_unknown

T = TypeVar("T")

FORMAT = "recsys_embed.data"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a split."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split: its rows, its clicks (None without labels), its files in row order, and a hash over theirs."""

    rows: int
    positives: int | None
    sha256: str
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: list[Shard], positives: int | None) -> Split:
        digest = hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest()
        return cls(sum(s.rows for s in shards), positives, digest, tuple(shards))


@dataclass(frozen=True)
class Feature:
    """One categorical feature.

    ``num_embeddings`` rows a table needs (vocab) or the distinct training values, estimated if ``estimated`` (raw);
    ``vocab`` is the file with its values, None in raw mode; ``missing_id`` the id of the empty field.
    """

    name: str
    num_embeddings: int
    missing_id: int
    estimated: bool
    vocab: str | None
    vocab_sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """The content of ``schema.json``.

    ``settings`` are the conversion's options that decide content, ``made_from`` adds the inputs, to recognise a
    repeated conversion; ``dense`` names the float columns, ``transform`` says how they were made.
    """

    labels: bool
    id_mode: str
    features: tuple[Feature, ...]
    dense: tuple[str, ...]
    transform: dict[str, Any]
    splits: dict[str, Split]
    rows_read: int
    quarantined: int
    settings: dict[str, Any]
    made_from: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of the encoding: folders with equal fingerprints encode a row to the same ids."""
        text = json.dumps([[asdict(f) for f in self.features], self.id_mode, self.transform], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> Manifest:
        """Inverse of :meth:`to_dict`.

        Raises:
            DataError: another format or version, or missing keys.
            UnknownNameError: a key this version does not know.
        """
        if data.get("format") != FORMAT:
            raise DataError(f"{where}: expected format {FORMAT!r}; got {data.get('format')!r}")
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise DataError(
                f"{where}: expected version {VERSION}; got {data.get('version')!r}: "
                "convert the data again with this version of recsys-embed"
            )
        body = {k: v for k, v in data.items() if k not in ("format", "version")}
        refuse_unknown(cls, body, "key", where=where, error=DataError)
        body["features"] = tuple(_build(Feature, f, where) for f in body["features"])
        body["dense"] = tuple(body["dense"])
        splits = {}
        for name, split in body["splits"].items():
            refuse_unknown(Split, split, "key", where=where, error=DataError)
            splits[name] = Split(**{**split, "shards": tuple(_build(Shard, s, where) for s in split["shards"])})
        body["splits"] = splits
        return cls(**body)


def _build(cls: type[T], body: Any, where: str) -> T:
    refuse_unknown(cls, body, "key", where=where, error=DataError)
    return cls(**body)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a folder's ``schema.json``.

    Raises:
        DataError: there is none, or it cannot be read; says how such a folder is made.
    """
    path = Path(folder) / SCHEMA_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        unfinished = (Path(folder) / ".work").exists()
        hint = (
            "its conversion did not finish: run the same command again"
            if unfinished
            else ("make a data folder with `recsys-embed data criteo INPUT OUT` or `data synthetic OUT`")
        )
        raise DataError(f"{folder}: holds no {SCHEMA_FILE}; {hint}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise DataError(f"{path}: cannot be read as JSON ({e})") from e
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object; got {type(data).__name__}")
    return Manifest.from_dict(data, str(path))
