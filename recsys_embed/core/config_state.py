"""The configuration inside a state dict, as JSON bytes: weights load only into a module of equal configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from recsys_embed.errors import CheckpointError


def pack(config: dict[str, Any]) -> Tensor:
    """JSON bytes of ``config`` as a uint8 tensor ``[length]``."""
    return torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key in value for k, v in _flatten(value[key], f"{prefix}.{key}" if prefix else str(key)).items()}


def check(
    saved: Any,
    config: dict[str, Any],
    where: str,
    ignore: tuple[str, ...] = (),
    views: Mapping[str, Callable[[Any], Any]] | None = None,
    upgrade: Callable[[Any], Any] | None = None,
) -> None:
    """Raise where a packed configuration differs from ``config``.

    Args:
        saved: what :func:`pack` made.
        config: of the module that is to take the state over.
        where: names that module.
        ignore: leaf keys that may differ.
        views: per leaf key, the view of it that must agree, where not all of it must.
        upgrade: makes of a saved configuration what this version would have saved.

    Raises:
        CheckpointError: names every key that differs, with both values.
    """
    try:
        parsed = json.loads(bytes(saved.cpu().numpy()))
        theirs = _flatten(parsed if upgrade is None else upgrade(parsed))
    except (AttributeError, TypeError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"the configuration stored with {where} is damaged: {e}") from e
    ours = _flatten(json.loads(json.dumps(config)))
    differ = [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
    views = views or {}
    for key in list(differ):
        leaf = key.rpartition(".")[2]
        if leaf in ignore or (leaf in views and views[leaf](theirs.get(key)) == views[leaf](ours.get(key))):
            differ.remove(key)
    if differ:
        text = "; ".join(f"{k}: saved {theirs.get(k)!r}, here {ours.get(k)!r}" for k in differ[:8])
        more = f"; and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise CheckpointError(f"the state of {where} is of another configuration: {text}{more}")
