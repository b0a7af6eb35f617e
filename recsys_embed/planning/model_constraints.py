"""Constraints that the tables of a model put on a plan, beyond their feature specifications."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from recsys_embed.core.footprint import format_bytes
from recsys_embed.discover import FoundTable, bare_tables, find_tables
from recsys_embed.features import Schema


class ModelConstraints(NamedTuple):
    """What a plan must respect, so that :func:`recsys_embed.compress_` can apply it.

    Args:
        options: by table, the torch option that its method must support.
        kinds: by table, what tables that share storage must agree on: device, dtype, whether they are trained.
        left_out: tables that cannot be replaced, with their bytes and why, in words.
        itemsizes: bytes per element of each table that can be replaced.
    """

    options: Mapping[str, str]
    kinds: Mapping[str, Any]
    left_out: tuple[str, ...]
    itemsizes: Mapping[str, int]


def constraints_of(model: nn.Module | Schema) -> ModelConstraints:
    """Constraints of all tables of ``model``, by name; none of a schema.

    >>> model = nn.ModuleDict({"user": nn.Embedding(50, 8, max_norm=1.0), "item": nn.Embedding(20, 8)})
    >>> constraints_of(model).options
    {'user': 'max_norm'}
    """
    if isinstance(model, Schema):
        return ModelConstraints({}, {}, (), {})
    found = find_tables(model)
    options = {t.name: option for t in found if (option := _option(t))}
    kinds = {t.name: _kind(t) for t in found}
    left_out = tuple(f"{t.name} ({_size(t)}): {t.obstacle}" for t in found if t.obstacle)
    left_out += tuple(map(str, bare_tables(model)))
    return ModelConstraints(options, kinds, left_out, {t.name: t.dtype.itemsize for t in found if not t.obstacle})


def _option(table: FoundTable) -> str | None:
    names = ("max_norm", "scale_grad_by_freq")
    return next((n for m in table.modules for n in names if getattr(m, n, None) not in (None, False)), None)


def _kind(table: FoundTable) -> Any:
    return (table.device, table.dtype, table.requires_grad)


def _size(table: FoundTable) -> str:
    return format_bytes(table.rows * table.width * table.dtype.itemsize)
