"""Id counts for the tables of a model, from counts or a data set that name its features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys_embed.discover import find_tables
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.planning.statistics import CountsByFeature
from recsys_embed.typing import CountedData
from recsys_embed.utils.types import Counts


def table_counts(model: nn.Module, source: Mapping[str, Counts] | CountedData) -> dict[str, Tensor]:
    """Counts per table of ``model``, by table name: for ``counts`` of :func:`compress_`, ``stats`` of a planner.

    A table belongs to the feature that its name or the last part of a path of it equals, e.g.
    ``embedding_dict.C1`` and ``linear.C1`` to ``C1``. Tables of no feature are left out.

    Args:
        model: holds the tables.
        source: counts per id by feature, or an opened data set, see
            :func:`recsys_embed.data.open_dataset`.

    Raises:
        ConfigError: no table belongs to a feature, or one has fewer rows than its feature has ids.

    >>> model = nn.ModuleDict({"C1": nn.Embedding(4, 2), "other": nn.Embedding(9, 2)})
    >>> table_counts(model, {"C1": [5, 3, 1]})
    {'C1': tensor([5., 3., 1., 0.], dtype=torch.float64)}
    """
    known = source if isinstance(source, Mapping) else CountsByFeature(source)
    tables = [t for t in find_tables(model) if not t.obstacle]
    faults, out = [], {}
    for table in tables:
        parts = [table.name, *table.paths, *(p.rpartition(".")[2] for p in table.paths)]
        feature = next((p for p in parts if p in known), None)
        if feature is None:
            continue
        given = torch.as_tensor(known[feature], dtype=torch.float64)
        if given.dim() != 1 or len(given) > table.rows:
            faults.append(
                f"table {table.name!r} has {table.rows} rows; feature {feature!r} has {tuple(given.shape)} ids"
            )
            continue
        out[table.name] = torch.nn.functional.pad(given, (0, table.rows - len(given)))
    raise_faults(faults, "counts of tables")
    if not out:
        raise ConfigError(
            f"no table belongs to a feature: tables {', '.join(t.name for t in tables) or 'none'}; features "
            f"{', '.join(known) or 'none'}"
        )
    return out
