"""Loads states of earlier versions, where some tables were held by modules of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recsys_embed.core.program import Table
from recsys_embed.errors import CheckpointError
from recsys_embed.features import Schema
from recsys_embed.kernels.places import Place
from recsys_embed.plan import Plan, table_key


def take_in_tables_of_modules(
    state: dict[str, Any],
    prefix: str,
    schema: Schema,
    plan: Plan,
    places: Mapping[str, Place],
    tables: Mapping[str, Table],
) -> None:
    """Put the tables of features, where a state holds them apart, between the others of their width.

    Methods whose head was code of their own module kept ``bundle.own.feature_X.part0`` there; also the ``weight`` of
    features that they store as plain tables, and which have no head.

    Raises:
        CheckpointError: the state's storages do not hold the other tables of the plan.
    """
    apart: dict[str, Tensor] = {}
    for name, program in plan.gathered(schema).items():
        spec, own = schema[name], f"{prefix}bundle.own.feature_{name}."
        for table in program.tables:
            if not table.dense and own + table.name in state:
                apart[table_key(spec, table)] = state.pop(own + table.name)
                state.pop(own + "_extra_state", None)
    for storage in {places[key].storage for key in apart}:
        rows, at = [], 0
        old = state.get(prefix + storage)
        keys = sorted((k for k, p in places.items() if p.storage == storage), key=lambda k: places[k].offset)
        for key in keys:
            if key in apart:
                rows.append(apart[key])
                continue
            size = tables[key].rows
            rows.append(torch.empty(0) if old is None else old[at : at + size])
            at += size
        if at != (0 if old is None else len(old)):
            found = 0 if old is None else len(old)
            raise CheckpointError(f"{prefix + storage!r} must hold {at} rows beside the tables of modules; got {found}")
        state[prefix + storage] = torch.cat(rows)
