"""Configuration inside a state dict, as JSON bytes, so that weights refuse to load where they do not belong."""

from __future__ import annotations

import json
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


def check(saved: Any, config: dict[str, Any], where: str, ignore: tuple[str, ...] = ()) -> None:
    """Raise where a packed configuration differs from ``config``; ``ignore`` names leaf keys that may differ.

    Raises:
        CheckpointError: names every key that differs, with both values.
    """
    try:
        theirs = _flatten(json.loads(bytes(saved.cpu().numpy())))
    except (AttributeError, TypeError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"the configuration stored with {where} is damaged: {e}") from e
    ours = _flatten(json.loads(json.dumps(config)))
    differ = [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
    differ = [k for k in differ if k.rpartition(".")[2] not in ignore]
    if differ:
        text = "; ".join(f"{k}: saved {theirs.get(k)!r}, here {ours.get(k)!r}" for k in differ[:8])
        more = f"; and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise CheckpointError(f"the state of {where} is of another configuration: {text}{more}")
