"""CSV files that are written in another way than those before them, which nobody said."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from recsys_embed.data.compressed_file import Reader
from recsys_embed.data.sources.base import Source
from recsys_embed.data.sources.csv import CsvFiles
from recsys_embed.data.sources.csv_dialect import SEPARATORS, first_lines, is_value
from recsys_embed.data.sources.text import SAMPLE_BYTES, beginning
from recsys_embed.errors import raise_faults

_QUOTES = "\"'"


def check_dialect(source: Source, wanted: Collection[str], named: Collection[str]) -> None:
    """Refuse CSV files whose separator, quote, header or encoding is not what the options have.

    Args:
        source: the table.
        wanted: columns that must be there.
        named: options that were given for these very files, rather than taken over from those of earlier rows.

    Raises:
        ConfigError: one sentence per file, with the option.
    """
    if isinstance(source, CsvFiles):
        found = ((path, _dialect_fault(source, file, wanted, named)) for file, path in enumerate(source.paths))
        raise_faults([f"{path}: {why}" for path, why in found if why], "the files are written in another way")


def _dialect_fault(source: CsvFiles, file: int, wanted: Collection[str], named: Collection[str]) -> str | None:
    """Why the separator, quote, header or encoding of a file is not what the options have, and the one that is.

    Args:
        source: the files.
        file: number of the file.
        wanted: columns that must be there.
        named: options that were given for these very files.
    """
    names, options = source.names(file), source.options
    missing = [name for name in wanted if name not in names]
    if missing or (len(names) == 1 and "separator" not in named):
        why = _separator(source, file, missing)
        if why is not None:
            return why
    quote = _quote(names, wanted) if missing else None
    if quote is not None:
        return f"column {missing[0]!r} is missing, as the header is written in {quote}: --source quote={quote!r}"
    if options.header and options.names and "header" not in named and any(map(is_value, source.first_fields(file))):
        return "the first line, which would be left out as a header, holds values: --source header=false (or true)"
    if not source.utf8 and "encoding" not in named and _is_utf8(source.paths[file]):
        return (
            f"it is UTF-8, and {options.encoding} is what was read before: --source encoding=utf-8 (or "
            f"{options.encoding})"
        )
    return None


def _separator(source: CsvFiles, file: int, missing: Collection[str]) -> str | None:
    """Why a file has another separator."""
    names = source.names(file)
    even = source.even_fields(first_lines(source.paths[file], source.options.encoding))
    for other in {**even, **dict.fromkeys(SEPARATORS)}:
        if other == source.separator:
            continue
        fields = [cell.strip() for cell in source.first_fields(file, other)]
        if (missing and set(missing) <= set(fields)) or (len(names) == 1 and other in even):
            return (
                f"its lines are {len(names)} field{'s' * (len(names) > 1)} by the separator {source.separator!r}, and "
                f"{len(fields)} by {other!r}: --source separator={other!r}"
            )
    return None


def _quote(names: Collection[str], wanted: Collection[str]) -> str | None:
    for quote in _QUOTES:
        bare = [n[1:-1] if len(n) > 1 and n[0] == n[-1] == quote else n for n in names]
        if bare != list(names) and set(wanted) <= set(bare):
            return quote
    return None


def _is_utf8(path: Path) -> bool:
    """Whether a file's first bytes hold characters beyond ASCII, as UTF-8 writes them."""
    with Reader(path) as reader:
        data = beginning(path, reader.read(SAMPLE_BYTES))
    if data.isascii():
        return False
    try:
        # The last character may be cut.
        data[: data.rfind(b"\n") + 1 or len(data)].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
