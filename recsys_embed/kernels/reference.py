"""The readable definition of a lookup: one feature, one probe at a time. Every other backend is compared with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recsys_embed import hashing
from recsys_embed.program import LookupProgram, Probe


def _probe(probe: Probe, tables: Mapping[str, Tensor], ids: Tensor, empty: float) -> Tensor:
    rows = probe.transform.rows(ids)
    absent = rows < 0
    value = tables[probe.table][rows.clamp_min(0)] * probe.scale
    if probe.sign is not None:
        value = value * hashing.hash_signs(ids, probe.sign).to(value.dtype).unsqueeze(-1)
    if probe.weight is not None:
        value = value * tables[probe.weight.table][probe.weight.transform.rows(ids)]
    return torch.where(absent.unsqueeze(-1), torch.full_like(value, empty), value)


def lookup(program: LookupProgram, tables: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Vectors of ``ids``.

    Args:
        program: the description to run.
        tables: each of the program's tables by name, ``[rows, width]``.
        ids: int64 ``[n]``.

    Returns:
        ``[n, program.width]`` in the tables' dtype, differentiable in the tables.
    """
    columns = []
    for span in sorted(set(program.spans)):
        values = [
            _probe(p, tables, ids, empty=0.0 if program.combine == "sum" else 1.0)
            for p, s in zip(program.probes, program.spans, strict=True)
            if s == span
        ]
        combined = values[0]
        for value in values[1:]:
            combined = combined + value if program.combine == "sum" else combined * value
        columns.append(combined)
    out = torch.cat(columns, dim=-1)
    return out @ tables[program.projection] if program.projection else out
