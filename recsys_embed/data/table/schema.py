"""The schema of a table: its columns in order, and how its rows are split."""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import polars as pl

from recsys_embed.data.columns import PARTS, Column, make_column
from recsys_embed.data.columns.categorical import VocabularyColumn
from recsys_embed.data.columns.label import Label
from recsys_embed.data.columns.numeric import Numeric
from recsys_embed.data.columns.time import Time
from recsys_embed.data.table.split import TableSplit
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.utils.files import write_text
from recsys_embed.utils.settings import Settings, fault, key_faults, param
from recsys_embed.utils.types import JSON, JSONMapping, Option

Names = str | Sequence[str]


@dataclass(frozen=True)
class TableSchema(Settings):
    """What the columns of a table are.

    Args:
        columns: in the order that features, numeric columns and batches have.
        split: which rows train, validate and test.
        label: of several label columns, the one to use.
        source: options of the reader of files, e.g. the separator of CSV files.

    Raises:
        ConfigError: names all faults.

    >>> schema = TableSchema.of(label="click", categorical=["user", "item"], numeric=["price"], time="ts")
    >>> [f"{c.name}: {c.kind}" for c in schema.columns]
    ['click: label', 'user: categorical', 'item: categorical', 'price: numeric', 'ts: time']
    >>> schema.split.kind
    'time'
    """

    title = "TableSchema"
    columns: tuple[Column, ...] = param((), empty=False)
    split: TableSplit = field(default_factory=TableSplit)
    label: str | None = param(None)
    source: JSONMapping = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The first time column is the event time unless the schema says otherwise.
        if isinstance(self.columns, tuple) and not any(isinstance(c, Time) and c.event for c in self.columns):
            first = next((c for c in self.columns if isinstance(c, Time) and c.event is None), None)
            if first is not None:
                marked = tuple(c.replace(event=True) if c is first else c for c in self.columns)
                object.__setattr__(self, "columns", marked)
        super().__post_init__()

    def conflicts(self) -> list[str]:
        if not self.columns:
            return ["a schema needs columns: none is given"]
        faults = [f"column {n!r} is given {k} times" for n, k in Counter(c.name for c in self.columns).items() if k > 1]
        for column in self.columns:
            feature = isinstance(column, VocabularyColumn) or getattr(column, "buckets", None) is not None
            if column.name in PARTS and column.part is None and column.kind != "time":
                faults.append(
                    f"column {column.name!r}: that name is the folder's own; give the {column.kind} column another "
                    f'`name` and `column = "{column.source}"`'
                )
            if not column.name or (feature and ("." in column.name or "#" in column.name)):
                what = "a feature's name must not contain '.' or '#'" if column.name else "a name must not be empty"
                faults.append(f'column {column.name!r}: {what}; give another `name` and `column = "{column.source}"`')
        labels = [c.name for c in self.columns if isinstance(c, Label)]
        if self.label is not None and self.label not in labels:
            faults.append(f"`label` names {self.label!r}, which is no label column; those are {labels or 'none'}")
        elif self.label is None and len(labels) > 1:
            faults.append(f"several columns are labels ({', '.join(labels)}): choose one with `label`")
        for kind, what in (("weight", "weight"), ("group", "group")):
            same = [c.name for c in self.columns if c.kind == kind]
            if len(same) > 1:
                faults.append(f"a table has one {what} column; got {', '.join(same)}")
        events = [c.name for c in self.columns if isinstance(c, Time) and c.event]
        if len(events) > 1:
            faults.append(f"a table has one event time; got {', '.join(events)}")
        if self.split.needs_time and not events:
            faults.append("split 'time' needs a column of kind time")
        return faults + self._output_faults() + self._vocabulary_faults()

    def _output_faults(self) -> list[str]:
        """Columns whose columns in the folder would have the names of others'."""
        of: dict[str, list[str]] = {}
        for column in self.columns:
            for name in _outputs(column):
                of.setdefault(name, []).append(column.name)
        faults = [
            f"columns {', '.join(names)} would both become {name!r} in the folder; give one another `name`"
            for name, names in of.items()
            if len(set(names)) > 1
        ]
        return faults + [
            f"column {c.name!r}: a name that ends in a number in brackets is that of a vector's component; give "
            f'another `name` and `column = "{c.source}"`'
            for c in self.columns
            if c.kind in ("numeric", "vector", "time") and re.search(r"\[\d+\]$", c.name)
        ]

    def _vocabulary_faults(self) -> list[str]:
        faults = []
        with_ids = [c for c in self.columns if isinstance(c, VocabularyColumn)]
        for name in dict.fromkeys(c.vocab or c.name for c in with_ids):
            sharing = [c for c in with_ids if (c.vocab or c.name) == name]
            for setting in ("ids", "min_count", "max_size"):
                values = {getattr(c, setting) for c in sharing}
                if len(values) > 1:
                    who = ", ".join(f"{c.name} {getattr(c, setting)}" for c in sharing)
                    faults.append(f"columns of vocabulary {name!r} must have one `{setting}`; got {who}")
            # Buckets are a vocabulary of their column's name.
            faults += [
                f"column {c.name!r}: a vocabulary of other columns has the name of its buckets; rename one of them"
                for c in self.columns
                if getattr(c, "buckets", None) is not None and c.name == name
            ]
        return faults

    @property
    def vocabularies(self) -> list[str]:
        """Names of the vocabularies, in order."""
        names = [c.vocab or c.name for c in self.columns if isinstance(c, VocabularyColumn) and c.ids == "vocab"]
        return list(dict.fromkeys(names))

    @property
    def used(self) -> tuple[Column, ...]:
        """The columns that are converted: all but labels that were not chosen."""
        labels = [c for c in self.columns if isinstance(c, Label)]
        chosen = self.label or (labels[0].name if labels else None)
        return tuple(c for c in self.columns if not isinstance(c, Label) or c.name == chosen)

    @property
    def event_time(self) -> Time | None:
        """The column of the event time."""
        return next((c for c in self.columns if isinstance(c, Time) and c.event), None)

    @classmethod
    def of(
        cls,
        *,
        label: Names = (),
        categorical: Names = (),
        list: Names = (),
        sequence: Names = (),
        numeric: Names = (),
        vector: Names = (),
        time: Names = (),
        weight: Names = (),
        group: Names = (),
        split: TableSplit | JSONMapping | None = None,
        source: JSONMapping | None = None,
        **settings: Option,
    ) -> Self:
        """A schema of columns with the settings of their kinds as they stand.

        Args:
            label, categorical, list, sequence, numeric, vector, time, weight, group: names of the table's columns.
            split: by default ``"time"`` where there is a time column, else ``"order"``.
            source: options of the reader.
            settings: ``min_count``, ``max_size`` and ``ids`` of all columns that have them.
        """
        given = {
            "label": label, "categorical": categorical, "list": list, "sequence": sequence, "numeric": numeric,
            "vector": vector, "time": time, "weight": weight, "group": group,
        }  # fmt: skip
        unknown = settings.keys() - {"min_count", "max_size", "ids"}
        if unknown:
            raise ConfigError(f"no kind of column is called {', '.join(sorted(unknown))}; known: {', '.join(given)}")
        entries = []
        for kind, names in given.items():
            if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
                raise ConfigError(fault(kind, "the name of a column, or a list of names", names))
            for column in [names] if isinstance(names, str) else names:
                name = kind if kind in ("weight", "group") else column.replace(".", "_").replace("#", "_")
                entry = {"name": name, "kind": kind} | ({"column": column} if column != name else {})
                has_ids = kind in ("categorical", "list", "sequence")
                entries.append({**entry, **(settings if has_ids else {})})
        rule = split or {"kind": "time" if given["time"] else "order"}
        plain = rule.to_dict() if isinstance(rule, TableSplit) else dict(rule)
        return cls.from_dict({"columns": entries, "split": plain, "source": dict(source or {})})

    @classmethod
    def from_dict(cls, data: JSONMapping) -> Self:
        """Build from plain values: ``columns`` is a list of entries, or a mapping of them by name.

        Raises:
            ConfigError: all that is wrong with any column and with the split.
        """
        body, faults = dict(data), []
        entries = body.get("columns", ())
        if isinstance(entries, Mapping):
            entries = [{"name": n, **e} if isinstance(e, Mapping) else {"name": n} for n, e in entries.items()]
        elif not isinstance(entries, Sequence) or isinstance(entries, str):
            faults.append(fault("columns", "tables of settings by the columns' names", entries))
            entries = ()
        columns = []
        for entry in entries:
            try:
                columns.append(make_column(entry))
            except ConfigError as e:
                faults.append(str(e))
        try:
            body["split"] = TableSplit.from_dict(body.get("split", {}))
        except ConfigError as e:
            faults.append(str(e))
            body["split"] = TableSplit()
        if faults:
            raise_faults(faults + key_faults(cls, data, cls.noun)[0], "TableSchema")
        return super().from_dict({**body, "columns": tuple(columns)})

    def to_dict(self) -> JSON:
        body: JSON = {"columns": [c.entry() for c in self.columns], "split": self.split.to_dict()}
        if self.label is not None:
            body["label"] = self.label
        return {**body, "source": dict(self.source)} if self.source else body

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a TOML file.

        Raises:
            ConfigError: it cannot be read, or what it says is wrong; all faults at once.
        """
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise ConfigError(f"{path}: cannot be read as TOML ({e})") from e
        return cls.from_dict(data)

    def to_toml(self) -> str:
        """The schema as TOML, which :meth:`read` takes.

        >>> print(TableSchema.of(label="click", categorical="user").to_toml())
        [columns.click]
        kind = "label"
        <BLANKLINE>
        [columns.user]
        kind = "categorical"
        <BLANKLINE>
        [split]
        kind = "order"
        """
        lines = [f"label = {_toml(self.label)}", ""] if self.label is not None else []
        for column in self.columns:
            entry = column.entry()
            lines.append(f"[columns.{_key(entry.pop('name'))}]")
            lines += [*(f"{_key(k)} = {_toml(v)}" for k, v in entry.items()), ""]
        for title, table in (("split", self.split.to_dict()), ("source", dict(self.source))):
            if table:
                lines += [f"[{title}]", *(f"{_key(k)} = {_toml(v)}" for k, v in table.items()), ""]
        return "\n".join(lines).rstrip()

    def write(self, path: str | Path) -> None:
        """Write as TOML."""
        write_text(path, self.to_toml() + "\n")

    def check_types(self, types: Mapping[str, pl.DataType], *, kinds: bool = True) -> None:
        """Refuse a table whose columns are absent or of a type that cannot be encoded.

        Args:
            types: of the table's columns.
            kinds: whether the types are checked; where another folder learned the columns, its encoders do.

        Raises:
            ConfigError: names all of them.
        """
        faults = []
        for column in self.used:
            if column.source not in types:
                faults.append(f"column {column.source!r} is not in the table, which has {', '.join(types)}")
                continue
            why = column.refuse(types[column.source]) if kinds else None
            if why is not None:
                faults.append(f"column {column.source!r} as {column.kind}: {why}")
        for name in self.split.columns:
            if name not in types:
                faults.append(f"column {name!r} of the split is not in the table, which has {', '.join(types)}")
            elif types[name].is_nested() or types[name] in (pl.Binary, pl.Object):
                faults.append(f"column {name!r} of the split holds {types[name]}; its rows must be texts or numbers")
        raise_faults(list(dict.fromkeys(faults)), "the schema and the table")


def _outputs(column: Column) -> list[str]:
    """Columns of the folder that a column gives, but for its own names (``PARTS``)."""
    if isinstance(column, Time):
        return [f"{column.name}_{part}" for part in column.parts]
    if isinstance(column, Numeric) and column.indicator:
        return [column.name, f"{column.name}_missing"]
    return [] if column.part is not None else [column.name]


def _key(name: str) -> str:
    plain = bool(name) and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    return name if plain else _toml(name)


def _toml(value: Any) -> str:
    """A value as TOML; what a schema holds is text, numbers, booleans, lists and tables of these."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
