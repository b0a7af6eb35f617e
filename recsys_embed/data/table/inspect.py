"""A schema guessed from a sample of a table, as TOML with remarks for the person who reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from recsys_embed.data.columns import PARTS, Label
from recsys_embed.data.sources import Source, open_source
from recsys_embed.data.sources.base import BadRow
from recsys_embed.data.sources.csv import CsvFiles
from recsys_embed.data.sources.json_lines import JsonLines
from recsys_embed.data.sources.values import NumberCount, count_numbers
from recsys_embed.data.table.guess import (
    MOST,
    Guess,
    choose_labels,
    guess_column,
    guess_numbers,
    label_entry,
    leaks,
    shared_vocabulary,
    without_null_words,
)
from recsys_embed.data.table.schema import TableSchema
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.utils.types import JSON

SAMPLE_ROWS = 100_000
_FILES = 16


@dataclass(frozen=True)
class Inspection:
    """A guessed schema and what is to be said of it.

    Args:
        schema: of the columns that are kept.
        guesses: of all columns, in the table's order.
        notes: of the whole table.
    """

    schema: TableSchema
    guesses: tuple[Guess, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> JSON:
        """JSON values: the schema, what is to be said of every column, and notes."""
        columns = [
            {"column": g.name, "left_out": g.left_out, "facts": g.facts, "warnings": list(g.remarks)}
            for g in self.guesses
        ]
        return {"schema": self.schema.to_dict(), "columns": columns, "notes": list(self.notes)}

    def to_toml(self) -> str:
        """The schema as TOML; facts, remarks and columns that are left out are comments."""
        lines = [f"# {note}" for note in self.notes] + [""]
        blocks = {block.split("\n", 1)[0]: block for block in self.schema.to_toml().split("\n\n")}
        heads = {c.source: _head(self.schema, c.name) for c in self.schema.columns}
        columns = [b for h, b in blocks.items() if not h.startswith(("[columns.", "[split]", "[source]"))]
        lines += [line for block in columns for line in (*block.split("\n"), "")]
        for guess in self.guesses:
            said = [guess.facts, *(f"warning: {r}" for r in guess.remarks)]
            if guess.name in heads:
                lines += [*(f"# {s}" for s in said), *blocks[heads[guess.name]].split("\n"), ""]
                continue
            lines += [f"# left out: column {guess.name!r}", *(f"# {s}" for s in said)]
            if guess.entry is not None:
                shown = TableSchema.from_dict({"columns": [_entry(guess)]}).to_toml().split("\n\n")[0]
                lines += [f"#   {line}" for line in shown.split("\n")]
            lines.append("")
        tail = [b for h, b in blocks.items() if h.startswith(("[split]", "[source]"))]
        return "\n\n".join(["\n".join(lines).rstrip(), *tail])


def inspect_table(source: object, *, rows: int = SAMPLE_ROWS, options: JSON | None = None) -> Inspection:
    """Guess the schema of a table from its first rows, and those of up to 16 files.

    Args:
        source: what :func:`recsys_embed.data.convert_table` takes.
        rows: most rows that are read.
        options: of the reader of files, as ``[source]`` of a schema has them.

    Raises:
        ConfigError: no such files, or options that are wrong.
        DataError: a file cannot be read, or there are no rows.

    >>> table = {"click": [0, 1] * 60, "user": ["ann", "bob", "eve"] * 40, "price": [1.5, None, 2.5, 9.25] * 30}
    >>> print(inspect_table(table).to_toml())
    # 120 rows of 1 file were looked at
    <BLANKLINE>
    # 2 distinct, 0.0 % missing; e.g. 0, 1; 50.00 % are 1
    [columns.click]
    kind = "label"
    <BLANKLINE>
    # 3 distinct, 0.0 % missing; e.g. 'ann', 'bob', 'eve'
    [columns.user]
    kind = "categorical"
    <BLANKLINE>
    # 3 distinct, 25.0 % missing; e.g. 1.5, 2.5, 9.25
    [columns.price]
    kind = "numeric"
    <BLANKLINE>
    [split]
    kind = "order"
    """
    table = open_source(source, options)
    sample, bad = _sample(table, rows)
    notes = [f"{len(sample):,} rows of {_count(table)} were looked at"]
    if bad:
        notes.append(
            f"warning: {len(bad):,} rows cannot be read, e.g. {table.place(bad[0].file, bad[0].row)}: {bad[0].reason}; "
            "`data table` sets them aside with --on-bad-row quarantine"
        )
    if not len(sample):
        why = f"; {table.place(bad[0].file, bad[0].row)}: {bad[0].reason}" if bad else ""
        raise DataError(f"no row could be read from {', '.join(table.files[:3])}{why}")
    counts = _mostly_numbers(table, sample)
    guesses = {}
    for name in sample.columns:
        if name in counts:
            decimal = table.options.decimal if isinstance(table, CsvFiles) else "."
            guesses[name], values = guess_numbers(sample[name], counts[name], decimal)
            sample = sample.with_columns(values.alias(name))
        else:
            guesses[name] = guess_column(sample[name])
    label = _labels(sample, guesses, notes)
    for name, vocab in shared_vocabulary(sample, guesses).items():
        entry = guesses[name].entry
        if entry is not None:
            entry["vocab"] = vocab
            guesses[name].remarks.append(f"holds values of {vocab}, whose vocabulary it shares")
    found = _options(table, guesses, dict(options or {}))
    _only_one(guesses)
    kept = _entries([g for g in guesses.values() if g.entry is not None and not g.left_out])
    if not kept:
        why = "; ".join(f"{g.name!r}: {', '.join(g.remarks)}" for g in list(guesses.values())[:5])
        raise DataError(f"no column of {table.files[0]} can be used ({why})")
    times = any(e["kind"] == "time" for e in kept)
    body: dict[str, Any] = {"columns": kept, "split": {"kind": "time" if times else "order"}, "source": found}
    schema = TableSchema.from_dict({**body, **({} if label is None else {"label": label})})
    _faults(schema, sample, guesses)
    return Inspection(schema, tuple(guesses.values()), tuple(notes))


def _count(table: Source) -> str:
    return "1 file" if len(table.files) == 1 else f"{min(len(table.files), _FILES)} of {len(table.files)} files"


def _sample(table: Source, rows: int) -> tuple[pl.DataFrame, list[BadRow]]:
    count = min(len(table.files), _FILES)
    files = sorted({i * len(table.files) // count for i in range(count)})
    frames = [pl.DataFrame(schema=dict(table.types))]
    bad: list[BadRow] = []
    for file in files:
        chunk = next(table.chunks(file, 0, max(1, rows // len(files))), None)
        if chunk is not None:
            frames.append(chunk.frame)
            bad += chunk.bad
    return pl.concat(frames), bad


def _mostly_numbers(table: Source, sample: pl.DataFrame) -> dict[str, NumberCount]:
    """Columns of text files that are numbers but for a few values."""
    if not isinstance(table, CsvFiles | JsonLines):
        return {}
    texts = [n for n, t in sample.schema.items() if t == pl.String and n not in table.declared]
    if isinstance(table, CsvFiles):
        counts = {n: count_numbers(without_null_words(sample[n]), table.options.decimal) for n in texts}
    else:
        # Of JSON, numbers that are written as texts are texts.
        counts = table.number_counts(texts)
    return {n: c for n, c in counts.items() if MOST <= c.share < 1}


def _labels(sample: pl.DataFrame, guesses: Mapping[str, Guess], notes: list[str]) -> str | None:
    """Mark labels and what gives them away; the name of the label that is used where there are several."""
    labels, guessed = choose_labels(sample)
    if not labels:
        notes.append('warning: no column looks like a label; give the one to predict kind = "label"')
        return None
    for name in labels:
        guesses[name].entry, guesses[name].left_out = label_entry(sample[name]), False
        # What is said of the values of text that is read as numbers holds of a label too.
        guesses[name].remarks = guesses[name].remarks[-1:] if guesses[name].type else []
    first = guesses[labels[0]]
    entry = first.entry or {}
    if "threshold" in entry:
        first.remarks.append(f"numbers from {entry['threshold']} on are clicks")
    if guessed:
        first.remarks.append("guessed: it is the one column of zeros and ones")
    column = Label.from_dict({"name": labels[0], **{k: v for k, v in entry.items() if k != "kind"}})
    values = column.numbers(sample[labels[0]])
    rate = values.mean()
    if sample[labels[0]].drop_nulls().n_unique() < 2:
        first.remarks.append("constant: nothing can be learned from it")
    elif isinstance(rate, float):
        first.facts += f"; {100 * rate:.2f} % are 1"
    for name, guess in guesses.items():
        if name not in labels and guess.entry is not None and leaks(sample[name], values):
            guess.remarks.append("leaks the label: it alone gives the label; keep it only if it is known beforehand")
            guess.left_out = True
    return labels[0] if len(labels) > 1 else None


def _only_one(guesses: Mapping[str, Guess]) -> None:
    """Of weights and groups a table has one; the others become numbers and categories."""
    for kind, other in (("weight", "numeric"), ("group", "categorical")):
        for guess in [g for g in guesses.values() if g.kind == kind][1:]:
            guess.entry = {"kind": other}


def _options(table: Source, guesses: Mapping[str, Guess], given: dict[str, Any]) -> dict[str, Any]:
    """Options of the reader: those given, the dialect that was recognised, and types that later rows may need."""
    found = dict(given)
    if isinstance(table, CsvFiles):
        if table.separator != ",":
            found["separator"] = table.separator
        if not table.head(0):
            found["names"] = table.names(0)
        nulls = sorted({n for g in guesses.values() for n in g.nulls} | set(given.get("nulls", ())))
        if nulls:
            found["nulls"] = nulls
            for guess in guesses.values():
                if guess.nulls:
                    guess.entry = {"kind": "numeric"}
    if isinstance(table, CsvFiles | JsonLines):
        floats = {g.name: "float" for g in guesses.values() if g.kind == "numeric" and not g.left_out}
        read = {g.name: g.type for g in guesses.values() if g.type is not None and not g.left_out}
        types = {**floats, **read, **given.get("types", {})}
        if types:
            found["types"] = types
    return found


def _entry(guess: Guess, suffix: str = "") -> dict[str, Any]:
    """An entry of the schema; names of features may not hold all that those of columns may."""
    entry = dict(guess.entry or {})
    kind = entry["kind"]
    name = kind if kind in ("weight", "group") else re.sub(r"[.#\[\]]", "_", guess.name) or "unnamed"
    name = f"{name}_" if name in PARTS and kind not in (name, "time") else name
    name += suffix
    return {"name": name, **entry} | ({"column": guess.name} if name != guess.name else {})


def _entries(guesses: Sequence[Guess]) -> list[dict[str, Any]]:
    """Entries of columns, with other names where theirs collide in a folder."""
    made = [_entry(g) for g in guesses]
    if not made or _valid(made):
        return made
    made = []
    for guess in guesses:
        names = (_entry(guess, suffix) for suffix in ("", "_", "_2", "_3"))
        entry = next((e for e in names if _valid([*made, e])), None)
        if entry is None:
            guess.remarks.append("its name collides with those of other columns; rename it")
            guess.left_out = True
        else:
            made.append(entry)
    return made


def _valid(entries: Sequence[Mapping[str, Any]]) -> bool:
    labels = [e["name"] for e in entries if e["kind"] == "label"]
    try:
        TableSchema.from_dict({"columns": list(entries), **({"label": labels[0]} if len(labels) > 1 else {})})
    except ConfigError:
        return False
    return True


def _head(schema: TableSchema, name: str) -> str:
    """How the TOML of a schema begins what it says of a column."""
    column = next(c for c in schema.columns if c.name == name)
    return TableSchema(columns=(column,)).to_toml().split("\n", 1)[0]


def _faults(schema: TableSchema, sample: pl.DataFrame, guesses: Mapping[str, Guess]) -> None:
    for column in schema.used:
        values = sample[column.source]
        if column.refuse(values.dtype) is None and column.checks(values.dtype):
            for fault in column.faults(values):
                guesses[column.source].remarks.append(
                    f"{int(fault.rows.sum()):,} bad rows: {fault.reason}; set them aside with --on-bad-row quarantine"
                )
