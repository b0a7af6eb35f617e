"""What is given for features that read one table, as one value."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError
from recsys_embed.features import Schema


def by_first_reader(
    schema: Schema, counts: Mapping[str, Tensor | Mapping[str, Tensor]]
) -> dict[str, Tensor | Mapping[str, Tensor]]:
    """What is given for features of one table as one value: counts are summed, sets of ids have to be equal."""
    found: dict[str, Tensor | Mapping[str, Tensor]] = {}
    for name, value in counts.items():
        first = schema.by_table[schema[name].table_name][0].name
        known = found.get(first)
        if known is None:
            found[first] = value
        elif isinstance(known, Mapping) or isinstance(value, Mapping):
            raise ConfigError(
                f"assign_ takes the ids of an index once for all features of a table; got them for {name!r} as "
                f"well as for another feature of table {schema[name].table_name!r}"
            )
        else:
            found[first] = torch.as_tensor(known) + torch.as_tensor(value)
    return found
