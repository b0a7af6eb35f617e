"""The manifest of a data folder (``schema.json``): versioned; unknown keys and damage are reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar

from recsys_embed.data.folder import SCHEMA_FILE
from recsys_embed.errors import ConfigError, DataError, UnknownNameError, raise_faults
from recsys_embed.features import MAX_ROWS
from recsys_embed.utils.settings import fault, refuse_unknown, wrong_settings
from recsys_embed.utils.strict_json import strict_json

T = TypeVar("T")

FORMAT = "recsys_embed.data"
VERSIONS = (1, 2)
"""Version 1 is Criteo's; version 2 has ``columns``, and features that are lists or share a table."""
_COUNT = {"low": 0, "below": 1 << 60}


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a split."""

    file: str
    rows: int = field(metadata=_COUNT)
    bytes: int = field(metadata=_COUNT)
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split: its rows, its clicks (None without labels), its files in row order, and a hash over theirs."""

    rows: int = field(metadata=_COUNT)
    positives: int | None = field(metadata=_COUNT)
    sha256: str
    shards: tuple[Shard, ...] = field(metadata={"empty": True})

    @classmethod
    def of(cls, shards: list[Shard], positives: int | None) -> Split:
        digest = hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest()
        return cls(sum(s.rows for s in shards), positives, digest, tuple(shards))


@dataclass(frozen=True)
class Feature:
    """One categorical feature.

    ``num_embeddings`` rows a table needs (vocab) or the distinct training values, estimated if ``estimated`` (raw);
    ``vocab`` is the file with its values, None in raw mode; ``missing_id`` the id of the empty field. ``form`` says
    whether a row has one id, a list of them, or a sequence, which has at most ``max_length``; features of one ``table``
    share their ids.
    """

    name: str
    num_embeddings: int = field(metadata={"low": 1, "high": MAX_ROWS})
    missing_id: int = field(metadata={"low": -(2**63), "below": 2**63})
    estimated: bool
    vocab: str | None
    vocab_sha256: str | None
    form: Literal["single", "list", "sequence"] = "single"
    table: str | None = None
    max_length: int | None = field(default=None, metadata={"low": 1})

    def to_dict(self) -> dict[str, Any]:
        """JSON; what version 1 lacks is left out where it is the default."""
        return {k: v for k, v in asdict(self).items() if k not in _ADDED or v != _ADDED[k]}


_ADDED = {"form": "single", "table": None, "max_length": None}


@dataclass(frozen=True)
class Manifest:
    """The content of ``schema.json``.

    ``settings`` are the conversion's options that decide content, ``made_from`` adds the inputs, to recognise a
    repeated conversion; ``dense`` names the float columns, ``transform`` says how they were made. ``columns`` are those
    of a table with what each learned, as :mod:`recsys_embed.data.columns` reads them; Criteo's folders have none.
    """

    labels: bool
    id_mode: str
    features: tuple[Feature, ...] = field(metadata={"empty": True})
    dense: tuple[str, ...] = field(metadata={"empty": True})
    transform: Mapping[str, Any]
    splits: Mapping[str, Split]
    rows_read: int = field(metadata=_COUNT)
    quarantined: int = field(metadata=_COUNT)
    settings: Mapping[str, Any]
    made_from: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[Mapping[str, Any], ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of the encoding: folders with equal fingerprints encode a row to the same ids."""
        columns = [list(self.columns)] if self.columns else []
        text = json.dumps(
            [[f.to_dict() for f in self.features], self.id_mode, self.transform, *columns], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        body = {**asdict(self), "features": [f.to_dict() for f in self.features]}
        if not self.columns:
            del body["columns"]
        return {"format": FORMAT, "version": 2 if self.columns else 1, **body}

    @property
    def parts(self) -> tuple[str, ...]:
        """Columns of the shards that are further parts of a batch: ``weight``, ``group`` and ``time``."""
        known = {column.get("kind"): column for column in self.columns}
        events = any(c.get("kind") == "time" and c.get("event") for c in self.columns)
        return tuple(p for p in ("weight", "group") if p in known) + (("time",) if events else ())

    @property
    def vectors(self) -> dict[str, tuple[int, int]]:
        """Of each vector by name, its first column among ``dense`` and its width."""
        return vector_places(self.columns, self.dense)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> Manifest:
        """Inverse of :meth:`to_dict`.

        Raises:
            DataError: another format or version, or missing keys.
            UnknownNameError: a key this version does not know.
        """
        if data.get("format") != FORMAT:
            raise DataError(f"{where}: expected format {FORMAT!r}; got {data.get('format')!r}")
        if type(data.get("version")) is not int or data["version"] not in VERSIONS:
            raise DataError(
                f"{where}: expected version {' or '.join(map(str, VERSIONS))}; got {data.get('version')!r}: "
                "convert the data again with this version of recsys-embed"
            )
        body = {k: v for k, v in data.items() if k not in ("format", "version")}
        refuse_unknown(cls, body, "key", where=where, error=DataError)
        try:
            body["features"] = _parts(Feature, body["features"], "features", where)
            splits = body["splits"] if isinstance(body["splits"], Mapping) else {"": body["splits"]}
            body["splits"] = {name: _split(split, f"{where}, split {name!r:.80}") for name, split in splits.items()}
            if isinstance(body.get("columns"), list):
                body["columns"] = tuple(body["columns"])
            return _build(cls, body, where)
        except UnknownNameError:
            raise
        except ConfigError as e:
            raise DataError(str(e)) from e


def vector_places(columns: Iterable[Mapping[str, Any]], dense: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Of each vector by name, its first column among the numeric columns, where its components follow, and its width.

    >>> vector_places([{"name": "v", "kind": "vector", "learned": {"width": 2}}], ["price", "v[0]", "v[1]"])
    {'v': (1, 2)}
    """
    widths = {column["name"]: column["learned"]["width"] for column in columns if column.get("kind") == "vector"}
    return {name: (dense.index(f"{name}[0]"), width) for name, width in widths.items()}


def _split(split: Any, where: str) -> Split:
    # Without shards that can be read, what is wrong with them is told; else all that is wrong with the split.
    shards = _parts(Shard, split.get("shards", ()), "shards", where) if isinstance(split, Mapping) else ()
    return _build(Split, {**split, "shards": shards} if isinstance(split, Mapping) else split, where)


def _parts(cls: type[T], items: Any, name: str, where: str) -> tuple[T, ...]:
    if not isinstance(items, list | tuple):
        raise DataError(f"{fault(name, 'a list', items)} ({where})")
    return tuple(_build(cls, item, f"{where}, {name} {i}") for i, item in enumerate(items))


def _build(cls: type[T], body: Any, where: str) -> T:
    """An object of values that are each of its type.

    Raises:
        DataError: names those that are not, and files outside the folder.
        UnknownNameError: a key this version does not know.
    """
    try:
        refuse_unknown(cls, body, "key", where=where, error=DataError)
    except UnknownNameError:
        raise
    except ConfigError as e:
        raise DataError(str(e)) from e
    made = cls(**body)
    faults = [*wrong_settings(made).values()]
    for name in ("file", "vocab"):
        file = getattr(made, name, None)
        if isinstance(file, str) and (PurePath(file).is_absolute() or ".." in PurePath(file).parts or "\0" in file):
            faults.append(fault(name, "a file inside the data folder", file))
    raise_faults(faults, where, DataError)
    return made


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a folder's ``schema.json``.

    Raises:
        DataError: there is none, or it cannot be read; says how such a folder is made.
    """
    path = Path(folder) / SCHEMA_FILE
    try:
        data = strict_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        unfinished = (Path(folder) / ".work").exists()
        hint = (
            "its conversion did not finish: run the same command again"
            if unfinished
            else ("make a data folder with `recsys-embed data table FILES OUT`, `data criteo` or `data synthetic`")
        )
        raise DataError(f"{folder}: holds no {SCHEMA_FILE}; {hint}") from None
    except NotADirectoryError:
        raise DataError(f"{folder}: is a file; make a data folder of it with `recsys-embed data table`") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read as JSON ({e})") from e
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object; got {type(data).__name__}")
    return Manifest.from_dict(data, str(path))
