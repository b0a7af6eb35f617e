"""JSON and TOML as people and strangers write them: what would be read in two ways is an error."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from recsys_embed.errors import ConfigError


def strict_json(text: str | bytes) -> Any:
    """JSON without repeated keys, NaN or infinities.

    Raises:
        ValueError: anything else, nesting that Python cannot follow included; says why.

    >>> strict_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' occurs more than once
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def read_object(path: Path, *, toml: bool = False) -> dict[str, Any]:
    """The object in a JSON file, or the table in a TOML file.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is not of that form, with line and column, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if toml else strict_json(text)
    except ValueError as e:
        raise ConfigError(f"{path} is not valid {'TOML' if toml else 'JSON'}: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold an object; got {type(data).__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} occurs more than once")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
