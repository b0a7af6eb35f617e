"""The configuration in a state dict, as JSON bytes, so that weights only load into a module of equal configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from recsys_embed.errors import CheckpointError
from recsys_embed.utils.strict_json import own_json


def pack(config: dict[str, Any]) -> Tensor:
    """JSON bytes of ``config`` as a uint8 tensor ``[length]``.

    Spaces make the length a multiple of 256: readers that compare shapes first then take the states of modules whose
    configurations may differ, in the policy for unseen ids for one.
    """
    text = json.dumps(config).encode()
    return torch.frombuffer(bytearray(text.ljust(-(-len(text) // 256) * 256)), dtype=torch.uint8)


def unpack(saved: Any, where: str, upgrade: Callable[[Any], Any] | None = None) -> Any:
    """Inverse of :func:`pack`; see :func:`check` for the arguments.

    Raises:
        CheckpointError: it is no packed configuration.
    """
    try:
        # A mean of states is their text if they agree.
        whole = saved.cpu().round().to(torch.uint8) if saved.is_floating_point() else saved.cpu()
        parsed = own_json(bytes(whole.numpy()))
        return parsed if upgrade is None else upgrade(parsed)
    except (AttributeError, TypeError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"the configuration stored with {where} is damaged: {e}") from e


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
    """Raise if a packed configuration differs from ``config``.

    Args:
        saved: result of :func:`pack`.
        config: of the module that loads the state.
        where: name of that module, for the message.
        ignore: leaf keys that may differ.
        views: per leaf key, a function of the value; only its result has to agree.
        upgrade: converts a configuration saved by an earlier version to the present form.

    Raises:
        CheckpointError: names every key that differs, with both values.
    """
    theirs = _flatten(unpack(saved, where, upgrade))
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
