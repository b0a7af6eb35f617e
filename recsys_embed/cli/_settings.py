"""Training settings of commands: from a file, overridden by options, then by ``--set key=value``."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import ConfigError
from recsys_embed.train.config import PLANNED, TrainConfig, read_settings


def split_settings(path: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a file: those of training, and those of its table ``[compare]``."""
    settings = {} if path is None else read_settings(path)
    compare = settings.pop("compare", {})
    if not isinstance(compare, dict):
        raise ConfigError(f"`compare` in {path} must be a table; got {compare!r}")
    return settings, compare


def train_config(
    settings: Mapping[str, Any], options: Mapping[str, Any], assignments: Sequence[str], *, planned: bool = False
) -> TrainConfig:
    """Merge settings, options that were given (not None) and ``key=value`` texts, later ones winning.

    With ``planned``, bytes without a method are planned for, as full tables do not fit in them.

    >>> train_config({"epochs": 1}, {"seed": 3}, ["epochs=2", "model_args.hidden=[8]"]).model_args
    {'hidden': [8]}
    """
    merged = dict(settings)
    merged |= {k: v for k, v in options.items() if v is not None}
    for text in assignments:
        _merge(merged, parse_assignment(text))
    if planned and "method" not in merged and not {"ratio", "budget"}.isdisjoint(merged):
        merged["method"] = PLANNED
    return TrainConfig.from_dict(merged)


def search_settings(path: Path | None, assignments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """A file's settings of training, those of a search (``[search]`` and ``search.key=value`` texts), other texts."""
    settings, _ = split_settings(path)
    own, rest = settings.pop("search", {}), []
    if not isinstance(own, dict):
        raise ConfigError(f"`search` in {path} must be a table; got {own!r}")
    for text in assignments:
        found = parse_assignment(text)
        if "search" not in found:
            rest.append(text)
        elif isinstance(found["search"], dict):
            own = dict(own)
            _merge(own, found["search"])
        else:
            raise ConfigError(f"--set search.KEY=value sets one of a search; got {text!r}")
    return settings, own, rest


def parse_assignment(text: str) -> dict[str, Any]:
    """``key=value`` with a TOML value; a bare word is a text.

    >>> parse_assignment("model_args.hidden=[64, 32]"), parse_assignment("schedule=cosine")
    ({'model_args': {'hidden': [64, 32]}}, {'schedule': 'cosine'})
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set takes key=value, e.g. --set epochs=2; got {text!r}")
    try:
        return tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        quoted = value.strip().replace("\\", "\\\\").replace('"', '\\"')
    try:
        return tomllib.loads(f'{key} = "{quoted}"')
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"--set takes key=value, e.g. --set epochs=2; got {text!r}: {e}") from e


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            into[key] = dict(old)
            _merge(into[key], value)
        else:
            into[key] = value


def names(text: str) -> tuple[str, ...]:
    """Comma-separated names.

    >>> names("deepfm, dcnv2")
    ('deepfm', 'dcnv2')
    """
    return tuple(p.strip() for p in text.split(",") if p.strip())


def numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers; an ``x`` behind one is allowed.

    >>> numbers("4,20x")
    (4.0, 20.0)
    """
    try:
        return tuple(float(p.removesuffix("x")) for p in names(text))
    except ValueError:
        raise ConfigError(f"expected numbers separated by commas, e.g. 4,20; got {text!r}") from None


FEW_STEPS = 200


def say_few_steps(data: DataSource, config: TrainConfig) -> None:
    """Warn if a run has too few steps to learn much, e.g. with settings for large data on a small sample."""
    steps = -(-data.splits["train"] // config.batch_size) * config.epochs
    steps = steps if config.steps is None else min(steps, config.steps)
    if steps < FEW_STEPS:
        noun = "step" if steps == 1 else "steps"
        print(
            f"recsys-embed: only {steps} training {noun}; on small data a smaller --batch-size and more --epochs "
            "(or --config examples/criteo_sample.toml) learn far more",
            file=sys.stderr,
        )
