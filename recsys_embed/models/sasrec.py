"""SASRec: the next item from what came before it, by self-attention over the history."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.features import Schema
from recsys_embed.models.base import ModelSpec, register
from recsys_embed.models.retrieval import Queries, RetrievalModel, warn_of_unread
from recsys_embed.utils.settings import Settings, param
from recsys_embed.utils.types import Ids

POSITION_INIT_STD = 0.02


@dataclass(frozen=True)
class SASRecParams(Settings):
    """Sizes of the self-attention; its width is that of an item's vector.

    Args:
        item: the feature of the candidate; by default the one whose table the history reads.
        history: the sequence of items before it, oldest first; by default the other feature of the same table.
        max_length: how many items of a history are read, the newest.
        blocks: layers of self-attention, each followed by a network per position.
        heads: of each layer; must divide the width.
        inner: width of the network's hidden layer; None: that of the vectors.
        dropout: share of the activations that training sets to 0.
        every_position: train every position of a history to tell the item after it, as the paper does with one history
            per user; otherwise only the last one to tell the candidate, which suits a table with a row for every event.
    """

    item: str | None = None
    history: str | None = None
    max_length: int = param(50, low=1)
    blocks: int = param(2, low=1)
    heads: int = param(1, low=1)
    inner: int | None = param(None, low=1)
    dropout: float = param(0.2, low=0, below=1)
    every_position: bool = False


class AttentionBlock(nn.Module):
    """Causal self-attention, then a network per position, each ``x + dropout(layer(norm(x)))``.

    >>> AttentionBlock(8, 2, 16, 0.0)(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.Linear(width, inner), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(inner, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width] -> [B, T, width]``; what comes after a position does not change it."""
        rows, length, width = x.shape
        parts = self.queries_keys_values(self.attention_norm(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        read = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.out(read.transpose(1, 2).reshape(rows, length, width)))
        network: Tensor = self.network(self.network_norm(x))
        return x + self.dropout(network)


@register
class SASRec(RetrievalModel):
    """Self-attentive sequential recommendation (Kang & McAuley, ICDM 2018).

    The vector of a user is the state at the last item of the history; items are scored by the rows of the table that
    the history reads, which may be compressed by any method. Positions count from the oldest item that is read. Padding
    stands behind a history, where causal attention does not look. The state of an empty history is the bias of the last
    norm. Numeric columns and other features are not read.

    >>> from recsys_embed import FeatureSpec, Plan, Schema
    >>> from recsys_embed.models import build_model
    >>> from recsys_embed.typing import BagIds
    >>> schema = Schema([FeatureSpec("item", 9, 4, table="item"), FeatureSpec("seen", 9, 4, table="item")])
    >>> model = build_model("sasrec", schema, Plan.full(schema), num_dense=0)
    >>> ids = BagIds(torch.tensor([5, 7, 1, 2, 3]), torch.tensor([0, 1, 2, 5, 5]))  # after 1, 2, 3 item 5; after none 7
    >>> model.users(torch.zeros(2, 0), ids).shape, model.items(torch.arange(9)).shape
    (torch.Size([2, 4]), torch.Size([9, 4]))
    """

    key = "sasrec"
    params_cls = SASRecParams
    uses_numeric_vectors = False
    needs_history = True

    def __init__(self, spec: ModelSpec, params: SASRecParams) -> None:
        item, self.history = sequence_of(spec.schema, params.item, params.history)
        super().__init__(spec, item)
        names = spec.schema.names
        self.history_place = names.index(self.history)
        width = self.vectors.bundle.widths[self.place]
        if width % params.heads:
            raise ConfigError(f"`heads` of model 'sasrec' must divide the width {width}; got {params.heads}")
        warn_of_unread(self.key, names, (self.item, self.history))
        self.every_position, self.max_length = params.every_position, params.max_length
        self.positions = nn.Parameter(torch.randn(params.max_length, width) * POSITION_INIT_STD)
        self.dropout = nn.Dropout(params.dropout)
        self.blocks = nn.ModuleList(
            AttentionBlock(width, params.heads, params.inner or width, params.dropout) for _ in range(params.blocks)
        )
        self.last_norm = nn.LayerNorm(width)

    @property
    def user_features(self) -> list[str]:
        return [self.history]

    @property
    def user_numeric(self) -> tuple[int, ...]:
        return ()

    def items(self, item_ids: Tensor) -> Tensor:
        return self.vectors.lookup(self.item, item_ids)

    def user_vectors(self, dense: Tensor, ids: Ids) -> Tensor:
        if torch.compiler.is_compiling() and not self.training:
            return self._users_of_graph(ids)
        read = self._read(ids)
        states = self._states(*read)
        last = read[2] - 1
        rows = torch.arange(len(last), device=last.device)
        # An empty history has no state, and only the norm's bias is left of it.
        kept = states[rows, last.clamp(min=0)] * (last >= 0).unsqueeze(1)
        return self._normed(kept)

    def queries(self, dense: Tensor, ids: Ids) -> Queries:
        if not self.every_position:
            return super().queries(dense, ids)
        _, rows, _, places = read = self._read(ids)
        states, (targets, owners) = self._states(*read), self._following(ids, *read)
        # Those of empty histories come last.
        empty = states.new_zeros(len(targets) - len(rows), states.shape[2])
        return Queries(self._normed(torch.cat([states[rows, places], empty])), targets, owners)

    def targets(self, ids: Ids) -> tuple[Tensor, Tensor]:
        return self._following(ids, *self._read(ids)) if self.every_position else super().targets(ids)

    def _following(
        self, ids: Ids, values: Tensor, rows: Tensor, lengths: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What comes after each item that is read, then after each empty history, and the rows of both."""
        candidates, ends = self.candidates(ids), places == lengths[rows] - 1
        # It is the next item of the history, or the candidate after the last.
        following = torch.where(ends, candidates[rows], values.roll(-1))
        empty = (lengths == 0).nonzero().squeeze(1)
        return torch.cat([following, candidates[empty]]), torch.cat([rows, empty])

    def _normed(self, states: Tensor) -> Tensor:
        normed: Tensor = self.last_norm(states)
        return normed

    def _read(self, ids: Ids) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is read of all histories: ids ``[n]``, their rows ``[n]``, lengths ``[B]``, and places ``[n]``."""
        bags = self.bags(ids)
        batch = (bags.offsets.numel() - 1) // len(self.vectors.schema)
        offsets = bags.offsets[self.history_place * batch : (self.history_place + 1) * batch + 1]
        values = bags.values[int(offsets[0]) : int(offsets[-1])].long()
        lengths = offsets.diff()
        numbers = torch.arange(batch, device=values.device)
        rows = torch.repeat_interleave(numbers, lengths)
        padding = self.vectors.schema[self.history].padding_idx
        if padding is not None:
            real = values != padding
            values, rows = values[real], rows[real]
            lengths = torch.bincount(rows, minlength=batch)
        starts = lengths.cumsum(0) - lengths
        places = torch.arange(len(values), device=values.device) - starts[rows]
        skipped = (lengths - self.max_length).clamp(min=0)
        newest = places >= skipped[rows]
        places = places - skipped[rows]
        return values[newest], rows[newest], lengths - skipped, places[newest]

    def _users_of_graph(self, ids: Ids) -> Tensor:
        """Vectors of users by operations whose shapes depend on the batch alone, as graphs need them: every history
        takes ``max_length`` places."""
        bags = self.bags(ids)
        batch = (bags.offsets.shape[0] - 1) // len(self.vectors.schema)
        offsets = bags.offsets[self.history_place * batch : (self.history_place + 1) * batch + 1]
        values = bags.values.long()
        padding = self.vectors.schema[self.history].padding_idx
        if padding is not None:
            # Where what is kept before each id ends; the kept ids then stand one after another.
            real = values != padding
            ends = torch.cat([offsets.new_zeros(1), real.long().cumsum(0)])
            order = torch.where(real, ends[1:] - 1, values.shape[0])
            values = values.new_zeros(values.shape[0] + 1).scatter(0, order, values)
            offsets = ends[offsets]
        values = torch.cat([values, values.new_zeros(1)])
        lengths = offsets.diff().clamp(max=self.max_length).unsqueeze(1)
        places = torch.arange(self.max_length, device=values.device)
        there = places < lengths
        at = torch.where(there, offsets[1:].unsqueeze(1) - lengths + places, values.shape[0] - 1)
        vectors = self.vectors.lookup(self.history, values[at]) + self.positions
        x = torch.where(there.unsqueeze(2), vectors, 0.0)
        for block in self.blocks:
            x = block(x)
        last = (places == lengths - 1).unsqueeze(2)
        return self._normed(torch.where(last, x, 0.0).sum(1))

    def _states(self, values: Tensor, rows: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
        """States before the last norm, ``[B, longest, width]``; those of padding mean nothing."""
        longest = max(1, int(lengths.max())) if lengths.numel() else 1
        vectors = self.vectors.lookup(self.history, values) + self.positions[places]
        x = vectors.new_zeros(len(lengths), longest, vectors.shape[1]).index_put((rows, places), vectors)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return x


def sequence_of(schema: Schema, item: str | None, history: str | None) -> tuple[str, str]:
    """The feature of the candidate and that of its history, as given or by the table they share.

    Raises:
        ConfigError: names that are no features, features of different tables, or none or several that it could be.
    """
    faults = [str(unknown_name("feature", n, schema.names)) for n in (item, history) if n and n not in schema.names]
    raise_faults(faults, "hyperparameters of model 'sasrec'")
    readers: dict[str, list[str]] = {}
    for feature in schema:
        readers.setdefault(feature.table_name, []).append(feature.name)
    given = [name for name in (item, history) if name]
    pairs = [names for names in readers.values() if all(n in names for n in given) and len(names) > 1]
    if len(pairs) == 1:
        first = item or next(n for n in pairs[0] if n != history)
        rest = [history] if history else [n for n in pairs[0] if n != first]
        if len(rest) == 1 and rest[0] != first:
            return first, rest[0]
    raise ConfigError(
        "model 'sasrec' needs one history that reads the table of its candidate: give both one `vocab` in the table's "
        "schema (FeatureSpec(..., table=...)), and name them by the hyperparameters `item` and `history` where more "
        "than two features share a table; the tables of these features are read by "
        f"{'; '.join(', '.join(names) for names in readers.values())}"
    )
