"""Features of one table are planned once: their statistics, factors and limits as those of the table's first reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recsys_embed.errors import raise_faults
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.planning.limits import Limits
from recsys_embed.planning.network_context import NetworkContext
from recsys_embed.planning.statistics import FeatureStatistics, read_statistics
from recsys_embed.typing import Statistics


def statistics_of_tables(schema: Schema, stats: Statistics | None) -> Statistics | None:
    """Statistics by the first reader of each table; those of features that read one table are summed.

    Curves do not say which ids are frequent: of several, the one of most lookups stands for all.

    >>> schema = Schema([FeatureSpec("item", 3, 4), FeatureSpec("history", 3, 4, table="item")])
    >>> statistics_of_tables(schema, {"item": [5, 0, 1], "history": [1, 2, 3]})["item"].tolist()
    [6.0, 2.0, 4.0]
    """
    if stats is None or schema.first_readers is schema:
        return stats
    found: dict[str, Any] = {}
    given = dict(read_statistics(stats))
    for table, readers in schema.by_table.items():
        known = [given.pop(s.name) for s in readers if s.name in given]
        if known:
            found[readers[0].name] = _sum(readers[0], known, table)
    # Of no feature of the schema: whoever reads the statistics says so.
    return {**found, **{name: value.given or value.coarse for name, value in given.items()}}


def _sum(spec: FeatureSpec, known: list[FeatureStatistics], table: str) -> Any:
    if len(known) == 1:
        return known[0].given if known[0].given is not None else known[0].coarse
    values = [k.given for k in known]
    if any(v is None or isinstance(getattr(v, "curve", v), FrequencyCurve) for v in values):
        curves = [k.curve() for k in known]
        return replace(max(curves, key=lambda c: c.total), total=sum(c.total for c in curves))
    if all(isinstance(v, tuple) and len(v) == 2 and v[0] is not None for v in values):
        parts = [[torch.as_tensor(part).detach().cpu() for part in v] for v in values]  # type: ignore[union-attr]
        ids, place = torch.cat([i.long() for i, _ in parts]).unique(return_inverse=True)
        counts = torch.cat([c.double() for _, c in parts])
        return ids, torch.zeros(len(ids), dtype=torch.float64).index_add_(0, place, counts)
    counted = [_counts(v) for v in values]
    raise_faults(
        [f"counts must be a list of one number per id; got shape {tuple(c.shape)}" for c in counted if c.dim() != 1],
        f"statistics of table {table!r}",
    )
    total = torch.zeros(max(len(c) for c in counted), dtype=torch.float64)
    for counts in counted:
        total[: len(counts)] += counts
    return total


def _counts(value: Any) -> Tensor:
    """Counts per id, from a list of these or from ``(ids, counts)``."""
    if isinstance(value, tuple) and len(value) == 2:
        if value[0] is None:
            return torch.as_tensor(value[1]).detach().cpu().double()
        ids, counts = (torch.as_tensor(part).detach().cpu() for part in value)
        size = int(ids.max()) + 1 if len(ids) else 1
        return torch.zeros(size, dtype=torch.float64).index_add_(0, ids.long(), counts.double())
    return torch.as_tensor(value).detach().cpu().double()


def importance_of_tables(schema: Schema, importance: Mapping[str, float]) -> dict[str, float]:
    """Factors of the losses by first reader: each feature of a table loses by its ids' vectors."""
    return {readers[0].name: sum(importance[s.name] for s in readers) for readers in schema.by_table.values()}


def limits_of_tables(schema: Schema, limits: Limits) -> Limits:
    """Limits by first reader: a pin of one feature of a table pins all, and what one forbids is forbidden to all.

    Raises:
        ConfigError: features of one table are pinned to different methods.
    """
    if schema.first_readers is schema:
        return limits
    pin, forbid, faults = dict(limits.pin), dict(limits.forbid), []
    for table, readers in schema.by_table.items():
        first = readers[0].name
        pins = {s.name: pin.pop(s.name) for s in readers if s.name in pin}
        if any(p != next(iter(pins.values())) for p in pins.values()):
            listed = ", ".join(f"{p!r} of {name!r}" for name, p in pins.items())
            faults.append(f"`pin` must be one for all features of table {table!r}; got {listed}")
        if pins:
            pin[first] = next(iter(pins.values()))
        refused = tuple(dict.fromkeys(m for s in readers for m in forbid.pop(s.name, ())))
        if refused:
            forbid[first] = refused
    raise_faults(faults, "plan_for_budget")
    return replace(limits, pin=pin, forbid=forbid)


def context_of_tables(schema: Schema, context: NetworkContext) -> NetworkContext:
    """What follows the lookups, by first reader: a table is read alone where one of its features is."""
    first = {s.name: readers[0].name for readers in schema.by_table.values() for s in readers}
    # A model's tables that are no features stand for themselves.
    return NetworkContext(*(frozenset(first.get(name, name) for name in names) for names in context))
