"""DIN: a history weighed by what it has to do with the candidate, then a deep network over all vectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.features import Schema
from recsys_embed.models.base import CTRModel, MLPParams, ModelSpec, register
from recsys_embed.utils.settings import param
from recsys_embed.utils.types import JSON, BagIds, Ids


@dataclass(frozen=True)
class DINParams(MLPParams):
    """Sizes of the network and of the attention; see :class:`MLPParams`.

    Args:
        histories: by name of a history, the feature of its candidate; by default every list or sequence of the data
            that reads the table of a feature before it.
        attention: widths of the hidden layers that give a position its weight.
    """

    histories: JSON = field(default_factory=dict)
    attention: tuple[int, ...] = param((36,), low=1)


class TargetAttention(nn.Module):
    """Weighted sums of histories, with weights by a network over ``[h, t, h - t, h * t]``; they need not sum to one.

    >>> attention = TargetAttention(4, (8,))
    >>> history, owners = torch.zeros(5, 4), torch.tensor([0, 0, 0, 2, 2])
    >>> attention(history, owners, torch.zeros(3, 4)).shape
    torch.Size([3, 4])
    """

    def __init__(self, width: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = 4 * width
        for out in hidden:
            layers += [nn.Linear(size, out), nn.PReLU()]
            size = out
        self.weigh = nn.Sequential(*layers, nn.Linear(size, 1))

    def forward(self, history: Tensor, owners: Tensor, targets: Tensor) -> Tensor:
        """``[B, width]`` of vectors ``history [n, width]`` of rows ``owners [n]``, and of ``targets [B, width]``."""
        target = targets.index_select(0, owners)
        weights = self.weigh(torch.cat([history, target, history - target, history * target], 1))
        return torch.zeros_like(targets).index_add(0, owners, weights * history)


@register
class DIN(CTRModel):
    """Deep interest network (Zhou et al., KDD 2018): target attention over histories of any length, without padding.

    A history reads the table of its candidate: ``FeatureSpec(..., table="item")``, or ``vocab`` in a table's schema.
    """

    key = "din"
    params_cls = DINParams
    needs_history = True

    def __init__(self, spec: ModelSpec, params: DINParams) -> None:
        super().__init__(spec)
        self.pairs = history_pairs(spec.schema, params.histories)
        widths = self.vectors.bundle.widths
        names = spec.schema.names
        self.first = [sum(widths[: names.index(name)]) for name in names]
        self.attention = nn.ModuleDict(
            {history: TargetAttention(widths[names.index(history)], params.attention) for history in self.pairs}
        )
        self.mlp = self.field_mlp(params)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        if not isinstance(ids, BagIds):
            raise ConfigError(
                f"model 'din' takes ids with histories, BagIds(values, offsets) such as Batch.inputs; got "
                f"{type(ids).__name__}"
            )
        names = self.vectors.schema.names
        batch = (ids.offsets.numel() - 1) // len(names)
        ends = ids.offsets[:: max(batch, 1)].tolist() if batch else [0] * (len(names) + 1)
        lengths = ids.offsets.diff().view(len(names), batch)
        places = {name: names.index(name) for name in self.pairs}
        # Histories are left out of what is pooled, so that no row of theirs is read twice.
        kept = [ids.values[ends[f] : ends[f + 1]] for f in range(len(names)) if f not in places.values()]
        rest = lengths.clone()
        rest[list(places.values())] = 0
        starts = torch.cat([rest.new_zeros(1), rest.view(-1).cumsum(0)])
        flat = self.vectors(BagIds(torch.cat(kept), starts)).flatten(1)
        pieces = {}
        for history, place in places.items():
            owners = torch.repeat_interleave(torch.arange(batch, device=flat.device), lengths[place])
            vectors = self.vectors.lookup(history, ids.values[ends[place] : ends[place + 1]])
            at, width = self.first[names.index(self.pairs[history])], vectors.shape[1]
            pieces[place] = self.attention[history](vectors, owners, flat[:, at : at + width])
        columns = [
            pieces.get(f, flat[:, at : at + width])
            for f, (at, width) in enumerate(zip(self.first, self.vectors.bundle.widths, strict=True))
        ]
        return self.mlp(torch.cat(columns, 1), dense, self.numeric).squeeze(1)


def history_pairs(schema: Schema, given: JSON) -> dict[str, str]:
    """By history the feature of its candidate, as given or by the tables that features share.

    Raises:
        ConfigError: names that are no features, pairs of different tables, or no history at all.
    """
    if not given:
        first: dict[str, str] = {}
        found = {}
        for spec in schema:
            if spec.table is not None and spec.table_name in first:
                found[spec.name] = first[spec.table_name]
            first.setdefault(spec.table_name, spec.name)
        if not found:
            raise ConfigError(
                "model 'din' needs a history that reads the table of its candidate, and no two features share one; "
                "give both one `vocab` in the table's schema (FeatureSpec(..., table=...)), or choose another model"
            )
        return found
    faults = []
    for history, candidate in given.items():
        unknown = [name for name in (history, candidate) if name not in schema.names]
        faults += [str(unknown_name("feature", str(name), schema.names)) for name in unknown]
        if not unknown and schema[history].table_name != schema[candidate].table_name:
            faults.append(f"history {history!r} and its candidate {candidate!r} must read one table")
    raise_faults(faults, "hyperparameter `histories` of model 'din'")
    return {str(history): str(candidate) for history, candidate in given.items()}
