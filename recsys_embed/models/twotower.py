"""Two towers: a network over what is known of the user, and one over what is known of the item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_embed.errors import ConfigError
from recsys_embed.models.base import ModelSpec, register
from recsys_embed.models.layers import FieldMLP, InputLinear
from recsys_embed.models.retrieval import RetrievalModel, check_names, longest_lists, warn_of_unread
from recsys_embed.utils.settings import Settings, param
from recsys_embed.utils.types import JSON, BagIds, Ids


@dataclass(frozen=True)
class TwoTowerParams(Settings):
    """Sizes of the towers, and what goes into them.

    Args:
        hidden: widths of the hidden layers of the user's tower; none: a linear map.
        item_hidden: those of the item's tower; None: as the user's.
        output_dim: width of the vectors that are multiplied.
        dropout: share of the activations of every hidden layer that training sets to 0.
        normalise: bring vectors to length 1, so that scores are cosines; losses then need a ``temperature`` well below
            1 (Yi et al., RecSys 2019).
        item: feature of the candidate, see :class:`recsys_embed.models.retrieval.RetrievalModel`.
        item_features: further features of the item. A row has those of its candidate; the model takes them from the
            first training row of each item, and keeps them, so that a served file needs item ids alone.
        item_lists: of those that have any number of ids, how many an item has at most, e.g. ``{"genres": 6}``.
        item_numeric: numeric columns of the item, counted from 0.
        user_features: features of the user; by default all others. Where they are named, nobody looks whether they
            tell the item.
    """

    hidden: tuple[int, ...] = param((128,), low=1, empty=True)
    item_hidden: tuple[int, ...] | None = param(None, low=1, empty=True)
    output_dim: int = param(64, low=1)
    dropout: float = param(0.0, low=0, below=1)
    normalise: bool = False
    item: str | None = None
    item_features: tuple[str, ...] = param((), empty=True)
    item_lists: JSON = field(default_factory=dict)
    item_numeric: tuple[int, ...] = param((), low=0, empty=True)
    user_features: tuple[str, ...] = param((), empty=True)


class Tower(nn.Module):
    """A network over vectors and numeric values.

    >>> Tower(6, 2, 3, TwoTowerParams(hidden=(8,)), (8,))(torch.zeros(5, 6), torch.zeros(5, 2), torch.zeros(2, 3)).shape
    torch.Size([5, 64])
    """

    def __init__(self, width: int, num_dense: int, numeric_dim: int, params: TwoTowerParams, hidden: Sequence[int]):
        super().__init__()
        out = params.output_dim
        self.normalise = params.normalise
        self.net: nn.Module = (
            FieldMLP(width, num_dense, numeric_dim, hidden, out, dropout=params.dropout)
            if hidden
            else InputLinear(width, num_dense, numeric_dim, out)
        )

    def forward(self, vectors: Tensor, dense: Tensor, numeric: Tensor) -> Tensor:
        """``vectors [B, width], dense [B, num_dense], numeric [num_dense, numeric_dim] -> [B, output_dim]``."""
        out: Tensor = self.net(vectors, dense, numeric)
        return F.normalize(out, dim=1) if self.normalise else out


@register
class TwoTower(RetrievalModel):
    """Two-tower model (Covington et al., RecSys 2016; Yi et al., RecSys 2019): users and items apart, scored by dot
    product.

    >>> from recsys_embed import FeatureSpec, Plan, Schema
    >>> from recsys_embed.models import build_model
    >>> schema = Schema([FeatureSpec("user", 9, 4), FeatureSpec("item", 5, 4)])
    >>> model = build_model("twotower", schema, Plan.full(schema), num_dense=1)
    >>> dense, ids = torch.zeros(2, 1), torch.tensor([[3, 4], [8, 0]])
    >>> model.users(dense, ids).shape, model.items(torch.arange(5)).shape, model.recommend(dense, ids, k=3)[0].shape
    (torch.Size([2, 64]), torch.Size([5, 64]), torch.Size([2, 3]))
    """

    key = "twotower"
    params_cls = TwoTowerParams

    item_dense: Tensor
    item_ids: Tensor
    item_lengths: Tensor

    def __init__(self, spec: ModelSpec, params: TwoTowerParams) -> None:
        super().__init__(spec, params.item)
        schema = spec.schema
        named = {"item_features": params.item_features, "user_features": params.user_features}
        check_names(self.key, schema, named, {self.item})
        lists = longest_lists(params.item_lists)
        check_names(self.key, schema, {"item_lists": lists})
        others = [name for name in lists if name not in params.item_features]
        if others:
            raise ConfigError(
                f"`item_lists` of model 'twotower' has {', '.join(others)}, not in `item_features`: name them in both"
            )
        self.item_features = [name for name in schema.names if name in params.item_features]
        apart = {self.item, *self.item_features}
        self._user_features = [n for n in schema.names if n in (params.user_features or {*schema.names} - apart)]
        self.names_user = bool(params.user_features)
        warn_of_unread(self.key, schema.names, [self.item, *self.item_features, *self._user_features])
        self._numbers(spec.num_dense, params)
        if not self._user_features and not self._user_numeric:
            raise ConfigError("model 'twotower' needs features or numeric columns of the user; all are the item's")
        self.user_places = [schema.names.index(name) for name in self._user_features]
        self.item_places = sorted([self.place, *(schema.names.index(name) for name in self.item_features)])
        widths = self.vectors.bundle.widths
        starts = [sum(widths[:f]) for f in range(len(widths))]
        columns = {
            side: [starts[f] + i for f in places for i in range(widths[f])]
            for side, places in (("user", self.user_places), ("item", self.item_places))
        }
        for side, found in columns.items():
            self.register_buffer(f"{side}_columns", torch.tensor(found, dtype=torch.int64), persistent=False)
        item_hidden = params.hidden if params.item_hidden is None else params.item_hidden
        sizes = (len(columns["user"]), len(self._user_numeric)), (len(columns["item"]), len(self.item_numeric))
        self.user_tower = Tower(*sizes[0], self.numeric_dim, params, params.hidden)
        self.item_tower = Tower(*sizes[1], self.numeric_dim, params, item_hidden)
        # One item more than there are: what ids outside the table know of themselves, which is nothing.
        rows, self.longest = len(self.item_counts) + 1, [lists.get(name, 1) for name in self.item_features]
        self.register_buffer("item_ids", torch.zeros(rows, sum(self.longest), dtype=torch.int64))
        self.register_buffer("item_lengths", torch.zeros(rows, len(self.longest), dtype=torch.int64))
        self.register_buffer("item_dense", torch.zeros(rows, len(self.item_numeric)))

    def _numbers(self, num_dense: int, params: TwoTowerParams) -> None:
        self.item_numeric = sorted(set(params.item_numeric))
        if any(column >= num_dense for column in self.item_numeric):
            raise ConfigError(f"`item_numeric` must be columns below {num_dense}; got {self.item_numeric}")
        self._user_numeric = [c for c in range(num_dense) if c not in self.item_numeric]

    @property
    def user_features(self) -> Sequence[str]:
        return self._user_features

    @property
    def user_numeric(self) -> Sequence[int]:
        return self._user_numeric

    def user_vectors(self, dense: Tensor, ids: Ids) -> Tensor:
        if torch.compiler.is_compiling() and isinstance(ids, Tensor) and ids.dim() == 2:
            # Graphs are the same for every batch, however small, where no bags are made.
            pieces = [self.vectors.lookup(self.vectors.schema.names[f], ids[:, f]) for f in self.user_places]
            vectors = torch.cat(pieces, 1)
        else:
            vectors = self.vectors(self.only(ids, self.user_places)).flatten(1)
            vectors = vectors.index_select(1, self.get_buffer("user_columns"))
        if not self.item_numeric:
            return self.user_tower(vectors, dense, self.numeric)
        return self.user_tower(vectors, dense[:, self._user_numeric], self.numeric[self._user_numeric])

    def items(self, item_ids: Tensor) -> Tensor:
        if not self.item_features:
            vectors = self.vectors.lookup(self.item, item_ids)
        elif torch.compiler.is_compiling() and max(self.longest) == 1:
            vectors = torch.cat(self._item_vectors(item_ids), 1)
        else:
            vectors = self.vectors(self._item_bags(item_ids)).flatten(1)
            vectors = vectors.index_select(1, self.get_buffer("item_columns"))
        dense = self.item_dense.index_select(0, self._rows(item_ids))
        if self.item_numeric:
            columns = self.item_numeric
            mean, std = self.get_buffer("numeric_mean")[columns], self.get_buffer("numeric_std")[columns]
            dense = (dense - mean) / std
        return self.item_tower(vectors, dense, self.numeric[self.item_numeric])

    def _rows(self, item_ids: Tensor) -> Tensor:
        """Rows of what is kept of items; ids outside the table have the last."""
        last = len(self.item_ids) - 1
        return torch.where((item_ids >= 0) & (item_ids < last), item_ids, last)

    def _item_vectors(self, item_ids: Tensor) -> list[Tensor]:
        """Vectors of the item and of its features, where it has one id of each at most."""
        rows, names = self._rows(item_ids), self.vectors.schema.names
        known = self.item_lengths.index_select(0, rows)
        found = []
        for place in self.item_places:
            if place == self.place:
                found.append(self.vectors.lookup(self.item, item_ids))
                continue
            number = self.item_features.index(names[place])
            ids = self.item_ids.index_select(0, rows)[:, number]
            found.append(self.vectors.lookup(names[place], ids) * known[:, number : number + 1])
        return found

    def _item_bags(self, item_ids: Tensor) -> BagIds:
        """The item and its features, as bags of all features."""
        rows, names = self._rows(item_ids), self.vectors.schema.names
        known, lengths = self.item_ids.index_select(0, rows), self.item_lengths.index_select(0, rows)
        ends = torch.arange(max(self.longest, default=1), device=rows.device)
        # Neither rows written in place nor len(): graphs have none of the former, and of the latter a constant.
        none = torch.zeros_like(rows)
        values, counts = [], {self.place: torch.ones_like(none)}
        pieces = dict(zip(self.item_features, known.split(self.longest, 1), strict=True))
        for place in self.item_places:
            if place == self.place:
                values.append(item_ids.long())
                continue
            number = self.item_features.index(names[place])
            counts[place] = lengths[:, number]
            ids = pieces[names[place]]
            values.append(ids[ends[: ids.shape[1]] < lengths[:, number : number + 1]])
        flat = torch.cat([counts.get(place, none) for place in range(len(names))])
        return BagIds(torch.cat(values), torch.cat([flat.new_zeros(1), flat.cumsum(0)]))

    def describe_items(self, ids: Mapping[str, tuple[Tensor, Tensor]], dense: Tensor, known: Tensor) -> None:
        """Take over what training rows say of items.

        Args:
            ids: by name of an item feature, ids ``[n]`` and offsets ``[items + 1]`` of all items, in their order.
            dense: the items' numeric columns, raw: float32 ``[items, len(item_numeric)]``.
            known: items of which there was a row, bool ``[items]``.

        Raises:
            ConfigError: items with more ids than ``item_lists`` says.
        """
        starts = [sum(self.longest[:f]) for f in range(len(self.longest))]
        found = {name: int(ids[name][1].diff().max()) if len(known) else 0 for name in self.item_features}
        short = {name: found[name] for name, n in zip(self.item_features, self.longest, strict=True) if found[name] > n}
        if short:
            raise ConfigError(
                f"items have up to {', '.join(f'{n} ids of {name}' for name, n in short.items())}; set the "
                f"hyperparameter `item_lists` to {short!r} or more (model 'twotower')"
            )
        for number, name in enumerate(self.item_features):
            values, offsets = ids[name]
            lengths = offsets.diff()
            owners = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
            columns = torch.arange(len(values), device=values.device) - offsets[:-1][owners] + starts[number]
            self.item_ids[owners, columns] = values.long()
            # Of items of which there is no row stays what was known.
            self.item_lengths[:-1, number] = torch.where(known, lengths, self.item_lengths[:-1, number])
        self.item_dense[:-1] = torch.where(known.unsqueeze(1), dense, self.item_dense[:-1])
