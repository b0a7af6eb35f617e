"""JSON and TOML as people and strangers write them: what would be read in two ways is an error."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

from recsys_embed.errors import ConfigError

MAX_DEPTH = 64


def strict_json(text: str | bytes) -> Any:
    """JSON without repeated keys, NaN, infinities or numbers that overflow to these, nested at most ``MAX_DEPTH`` deep.

    Raises:
        ValueError: anything else; says why.

    >>> strict_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' occurs more than once
    """
    return _shallow(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def own_json(text: str | bytes) -> Any:
    """JSON as the library has written it: measures may be NaN.

    Raises:
        ValueError: no JSON, or nested deeper than ``MAX_DEPTH``.
    """
    return _shallow(text)


def _shallow(text: str | bytes, **options: Any) -> Any:
    """Parsed JSON. What is nested deeply would end the recursion of whatever reads it next."""
    try:
        value = json.loads(text, **options)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (i for v in level for i in (v.values() if isinstance(v, dict) else v))
        level = [i for i in inner if isinstance(i, dict | list)]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return value


def read_object(path: Path, *, toml: bool = False) -> dict[str, Any]:
    """The object in a JSON file, or the table in a TOML file.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is not of that form, with line and column, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text, parse_float=_finite) if toml else strict_json(text)
    except ValueError as e:
        raise ConfigError(f"{path} is not valid {'TOML' if toml else 'JSON'}: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold an object; got {type(data).__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {name!r:.80} occurs more than once")
        found[name] = value
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value) and "inf" not in text:  # which TOML has
        raise ValueError(f"number {text:.80} is too large")
    return value
