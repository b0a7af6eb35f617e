"""Cores of tensor trains that other libraries have saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError, raise_faults

Cores = Sequence[Any] | Mapping[str, Any]
_FBTT, _NUMBERED = re.compile(r"(?:^|\.)tt_cores\.(\d+)$"), re.compile(r"_(\d+)$")


def fbtt_cores(state: Mapping[str, Any], table: int = 0) -> list[Tensor]:
    """Cores ``[rows, r * columns * r']`` of one table, from a state dict of FBTT-Embedding.

    Raises:
        ConfigError: it has no cores, not this table, or a cache whose rows the cores do not hold.
    """
    named = {k: m for k in state if (m := _FBTT.search(k))}
    modules = sorted({k[: m.start()] for k, m in named.items()})
    if len(modules) > 1:
        raise ConfigError(
            f"`state` has the cores of {len(modules)} modules, {', '.join(map(repr, modules[:8]))}; give the state "
            "dict of one of them (cores of FBTT-Embedding)"
        )
    found = {int(m[1]): _core(state[k], k) for k, m in named.items()}
    faults = []
    if sorted(found) != list(range(len(found))) or not found:
        faults.append(f"`state` must have the cores `tt_cores.0`, `tt_cores.1`, ...; got keys {sorted(state)[:8]}")
    if any(k.endswith("cache_weight") and v is not None and len(v) for k, v in state.items()):
        faults.append(
            "`state` has a cache (`cache_weight`), whose rows are trained apart from the cores; train with "
            "use_cache=False, or take `cache_weight` out of `state` to read what the cores alone hold"
        )
    faults += [
        f"core {k} must be [tables, rows, columns] with more than {table} tables; got shape {tuple(core.shape)}"
        for k, core in found.items()
        if core.dim() != 3 or not 0 <= table < len(core)
    ]
    raise_faults(faults, "cores of FBTT-Embedding")
    return [found[k][table] for k in range(len(found))]


def hetu_cores(cores: Cores) -> list[Tensor]:
    """Cores ``[rows, r * columns * r']`` from Hetu's arrays, in order or by their names.

    Raises:
        ConfigError: names are not numbered from 0.
    """
    if isinstance(cores, Mapping):
        numbers = {int(m[1]): v for k, v in cores.items() if (m := _NUMBERED.search(k))}
        if len(numbers) != len(cores) or sorted(numbers) != list(range(len(numbers))):
            raise ConfigError(f"names of cores must end in _0, _1, ...; got {sorted(cores)[:8]}")
        cores = [numbers[k] for k in range(len(numbers))]
    if not isinstance(cores, Iterable):
        raise ConfigError(f"cores must be arrays in order or by name; got {type(cores).__name__}")
    return [_core(core, str(k)) for k, core in enumerate(cores)]


def _core(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ConfigError(f"core {name!r} must be an array; got {type(value).__name__}") from e


def shapes_of_cores(cores: Sequence[Tensor], ranks: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Slices and columns of each core.

    >>> shapes_of_cores([torch.ones(10, 2 * 3), torch.ones(20, 3 * 4)], [3])
    ((10, 20), (2, 4))

    Raises:
        ConfigError: columns are no multiples of the ranks.
    """
    faults = []
    if not 2 <= len(cores) <= 4 or len(ranks) != len(cores) - 1 or min(ranks, default=0) < 1:
        raise ConfigError(
            f"a tensor train has 2 to 4 cores, and one rank >= 1 fewer; got {len(cores)} cores and {list(ranks)}"
        )
    shapes = []
    for k, (core, before, after) in enumerate(zip(cores, (1, *ranks), (*ranks, 1), strict=True)):
        if core.dim() != 2 or not core.is_floating_point() or core.shape[1] % (before * after):
            faults.append(
                f"core {k} must be floating point [rows, columns], of a multiple of {before * after} columns for ranks "
                f"{before} and {after}; got {core.dtype} {tuple(core.shape)}"
            )
        else:
            shapes.append((core.shape[0], core.shape[1] // (before * after)))
    raise_faults(faults, "cores of a tensor train")
    return tuple(rows for rows, _ in shapes), tuple(columns for _, columns in shapes)
