"""What a retrieval model learns of the items from the training rows before its first step."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_embed.data.batch import Batch
from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import ConfigError
from recsys_embed.models import CTRModel, RetrievalModel, TwoTower
from recsys_embed.utils.types import BagIds

CHUNK_ROWS = 1 << 16
_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)
MAX_PRINTS = 1 << 24
"""Fingerprints, of 8 bytes, of what items' rows hold that are kept together."""
_ENOUGH = 20
"""Expected disagreements of rows of one item that make it no chance that there is none."""


def positives_of(label: Tensor) -> Tensor:
    """Rows that count as chosen: those of label 1, and all where there are no labels (NaN)."""
    return label != 0


def learn_items(model: CTRModel, data: DataSource) -> None:
    """Take frequencies and features of items from the training rows, one pass over them, into a retrieval model.

    Raises:
        ConfigError: features of the user tell the item, or items have more ids of a feature than the model keeps.
    """
    if isinstance(model, RetrievalModel):
        _Items(model, data).learn()


class _Items:
    """What one pass over the training rows tells of items.

    Held are a number and two flags per item, what the model itself keeps of items, and ``MAX_PRINTS`` fingerprints.
    """

    def __init__(self, model: RetrievalModel, data: DataSource) -> None:
        self.model, self.data = model, data
        self.names = list(model.vectors.schema.names)
        total = len(model.item_counts)
        self.towers = model if isinstance(model, TwoTower) and (model.item_features or model.item_numeric) else None
        self.positives = torch.zeros(total, dtype=torch.int64)
        self.seen = torch.zeros(total, dtype=torch.bool)
        self.listed = torch.zeros(total, dtype=torch.bool)
        self.dense = torch.zeros(total, 0 if self.towers is None else len(self.towers.item_numeric))
        self.pieces: list[tuple[Tensor, BagIds]] = []
        unknown = getattr(data, "unknown_ids", None)
        padding = model.vectors.schema[model.item].padding_idx
        self.nobody = [*(unknown(model.item) if unknown is not None else ()), *([] if padding is None else [padding])]

    def learn(self) -> None:
        model = self.model
        check = _Leaks(self, self.columns(), min(len(self.seen), MAX_PRINTS // max(1, len(self.columns()))))
        for batch in self.data.batches("train", CHUNK_ROWS, shuffle=False):
            self._add(batch, check)
        self._refuse_leaks(check)
        listed = self.listed
        listed[self.nobody] = False
        model.item_counts.copy_(self.positives)
        model.in_catalogue.copy_(listed)
        if self.towers is not None:
            self._describe(self.towers)

    def columns(self) -> list[int]:
        """Features of the user, then its numeric columns behind all features; none where the settings name them."""
        model = self.model
        if getattr(model, "names_user", False):
            return []
        places = [i for i, name in enumerate(self.names) if name in model.user_features]
        return places + [len(self.names) + c for c in model.user_numeric]

    def _add(self, batch: Batch, check: _Leaks) -> None:
        inputs = batch.inputs if isinstance(batch, Batch) else batch.ids
        items, bags = self.model.candidates(inputs), self.model.bags(inputs)
        total, rows = len(self.seen), len(items)
        targets, owners = self.model.targets(inputs)
        outside = (targets < 0) | (targets >= total)
        if outside.any():
            worst = int(targets[outside][0])
            raise ConfigError(f"feature {self.model.item!r} has {total} items, and a training row has id {worst}")
        self.listed[targets] = True
        chosen = targets[positives_of(batch.label)[owners]]
        self.positives.index_add_(0, chosen, torch.ones_like(chosen))
        distinct, at = first_places(items)
        fresh = ~self.seen[distinct]
        new, at = distinct[fresh], at[fresh]
        self.seen[new] = True
        check.add(items, bags, batch.dense)
        if self.towers is not None:
            self.dense[new] = batch.dense[at][:, self.towers.item_numeric]
            if self.towers.item_features:
                places = [self.names.index(name) for name in self.towers.item_features]
                self.pieces.append((new, _rows_of(bags, at, places, rows)))

    def _refuse_leaks(self, check: _Leaks) -> None:
        """Refuse features of the user that are the item's: the same in all its rows, and not in those of others."""
        model = self.model
        columns = check.agreeing()
        if check.items < len(self.seen):
            # A few columns are left of many items, which are looked at whole, some at a time.
            size = max(1, MAX_PRINTS // len(self.seen))
            parts = [columns[i : i + size] for i in range(0, len(columns), size)]
            columns = [column for part in parts for column in self._again(part)]
        else:
            columns = check.telling()
        features = [self.names[c] for c in columns if c < len(self.names)]
        numbers = [str(c - len(self.names)) for c in columns if c >= len(self.names)]
        found = {"features": features, "numeric columns": numbers}
        if not columns:
            return
        told = " and ".join(f"{what} {', '.join(names)}" for what, names in found.items() if names)
        raise ConfigError(
            f"{told} are the same in all training rows of an item ({model.item!r}) and differ between items: as "
            f"properties of the user they would tell model {model.key!r} which item the row holds. Name them in "
            "`item_features` (lists with the most ids of an item in `item_lists`, numeric columns, counted from 0, in "
            "`item_numeric`), leave them out of the data, or say what the user's are by `user_features`"
        )

    def _again(self, columns: list[int]) -> list[int]:
        """Those of some columns that tell the item, by all items, which takes another pass over the training rows."""
        check = _Leaks(self, columns, len(self.seen))
        for batch in self.data.batches("train", CHUNK_ROWS, shuffle=False):
            inputs = batch.inputs if isinstance(batch, Batch) else batch.ids
            check.add(self.model.candidates(inputs), self.model.bags(inputs), batch.dense)
            if not check.agreeing():
                break
        return check.telling()

    def _describe(self, model: TwoTower) -> None:
        total, device = len(self.seen), model.item_counts.device
        ids = {}
        for place, name in enumerate(model.item_features):
            lengths = torch.zeros(total, dtype=torch.int64)
            owners, values = [], []
            for new, bags in self.pieces:
                count = len(new)
                offsets = bags.offsets[place * count : (place + 1) * count + 1]
                owners.append(torch.repeat_interleave(new, offsets.diff()))
                values.append(bags.values[int(offsets[0]) : int(offsets[-1])].long())
                lengths[new] = offsets.diff()
            order = torch.cat(owners).sort(stable=True).indices
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            ids[name] = (torch.cat(values)[order].to(device), offsets.to(device))
        model.describe_items(ids, self.dense.to(device), self.seen.to(device))


class _Leaks:
    """Whether columns are the same in all rows of an item, by a fingerprint of what its first row holds of each.

    Args:
        of: whose rows are added.
        columns: places of features in the schema, and numeric columns behind these.
        items: the items with ids below are looked at; ids go by falling frequency as a rule, so that these have most
            rows.
    """

    def __init__(self, of: _Items, columns: list[int], items: int) -> None:
        self.columns, self.items, self.features = columns, items, len(of.names)
        self.prints = torch.zeros(len(columns), items, dtype=torch.int64)
        self.seen = torch.zeros(items, dtype=torch.bool)
        self.agrees = torch.ones(len(columns), dtype=torch.bool)
        self.nobody = torch.tensor(of.nobody, dtype=torch.int64)
        self.rows = 0

    def add(self, items: Tensor, bags: BagIds, dense: Tensor) -> None:
        """Some more rows; those of no item in particular tell nothing."""
        if not self.columns:
            return
        rows = ((items < self.items) & ~torch.isin(items, self.nobody)).nonzero().flatten()
        prints, items = self._prints(bags, dense, len(items))[:, rows], items[rows]
        distinct, at = first_places(items)
        fresh = ~self.seen[distinct]
        self.prints[:, distinct[fresh]] = prints[:, at[fresh]]
        self.seen[distinct] = True
        self.agrees &= (prints == self.prints[:, items]).all(1)
        self.rows += len(items)

    def _prints(self, bags: BagIds, dense: Tensor, rows: int) -> Tensor:
        """A number for what each row holds of each column: int64 ``[columns, rows]``."""
        lengths = bags.offsets.diff().view(self.features, rows)
        starts = bags.offsets[:-1].view(self.features, rows)[:, 0].tolist()
        found = []
        for column in self.columns:
            if column >= self.features:
                found.append(dense[:, column - self.features].contiguous().view(torch.int32).long())
                continue
            own = lengths[column]
            values = bags.values[starts[column] : starts[column] + int(own.sum())].long()
            mixed = (values + 1) * _PRIME
            mixed = (mixed ^ (mixed >> 29)) * _PRIME
            owners = torch.repeat_interleave(torch.arange(rows), own)
            found.append(torch.zeros(rows, dtype=torch.int64).index_add_(0, owners, mixed))
        return torch.stack(found)

    def agreeing(self) -> list[int]:
        """Columns that no row has spoken against."""
        return [column for column, agrees in zip(self.columns, self.agrees.tolist(), strict=True) if agrees]

    def telling(self) -> list[int]:
        """Those of which that is no chance."""
        repeats, found = self.rows - int(self.seen.sum()), []
        for place in self.agrees.nonzero().flatten().tolist():
            _, counts = self.prints[place][self.seen].unique(return_counts=True)
            share = counts.double() / counts.sum()
            if repeats * (1 - float(share.square().sum())) >= _ENOUGH:
                found.append(self.columns[place])
        return found


def first_places(values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values ``[n]`` in order, and the place of the first of each.

    >>> [part.tolist() for part in first_places(torch.tensor([7, 5, 7, 5]))]
    [[5, 7], [1, 0]]
    """
    distinct, inverse = values.unique(return_inverse=True)
    places = torch.full_like(distinct, len(values))
    return distinct, places.scatter_reduce_(0, inverse, torch.arange(len(values)), "amin")


def _rows_of(bags: BagIds, rows: Tensor, places: list[int], batch: int) -> BagIds:
    """Bags of some features of some rows."""
    which = (torch.tensor(places).unsqueeze(1) * batch + rows).reshape(-1)
    starts, lengths = bags.offsets[which], bags.offsets.diff()[which]
    ends = lengths.cumsum(0)
    at = torch.repeat_interleave(starts - (ends - lengths), lengths)
    return BagIds(bags.values[at + torch.arange(len(at))], torch.cat([ends.new_zeros(1), ends]))
