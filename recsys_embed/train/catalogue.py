"""What a model that finds items learns of them from the training rows before its first step."""

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
_ENOUGH = 20
"""Expected disagreements of rows of one item that make it no chance that there is none."""


def positives_of(label: Tensor) -> Tensor:
    """Rows that count as chosen: those of label 1, and all where there are no labels (NaN)."""
    return label != 0


def learn_items(model: CTRModel, data: DataSource) -> None:
    """Take frequencies and features of items from the training rows, one pass over them, into a model that finds items.

    Raises:
        ConfigError: features of the user tell the item, or items have more ids of a feature than the model keeps.
    """
    if isinstance(model, RetrievalModel):
        _Items(model, data).learn()


class _Items:
    def __init__(self, model: RetrievalModel, data: DataSource) -> None:
        self.model, self.data = model, data
        self.names = list(model.vectors.schema.names)
        total, columns = len(model.item_counts), len(self.names) + model.num_dense
        self.positives = torch.zeros(total, dtype=torch.int64)
        self.seen = torch.zeros(total, dtype=torch.bool)
        self.listed = torch.zeros(total, dtype=torch.bool)
        self.prints = torch.zeros(columns, total, dtype=torch.int64)
        self.agrees = torch.ones(columns, dtype=torch.bool)
        self.dense = torch.zeros(total, model.num_dense)
        self.rows = 0
        self.pieces: list[tuple[Tensor, BagIds]] = []

    def learn(self) -> None:
        model = self.model
        for batch in self.data.batches("train", CHUNK_ROWS, shuffle=False):
            self._add(batch)
        self._refuse_leaks()
        unknown = getattr(self.data, "unknown_ids", None)
        listed = self.listed
        listed[list(unknown(model.item)) if unknown is not None else []] = False
        padding = model.vectors.schema[model.item].padding_idx
        if padding is not None:
            listed[padding] = False
        model.item_counts.copy_(self.positives)
        model.in_catalogue.copy_(listed)
        if isinstance(model, TwoTower) and (model.item_features or model.item_numeric):
            self._describe(model)

    def _add(self, batch: Batch) -> None:
        inputs = batch.inputs if isinstance(batch, Batch) else batch.ids
        items, bags = self.model.candidates(inputs), self.model.bags(inputs)
        total, rows = len(self.seen), len(items)
        targets, owners = self.model.targets(inputs)
        outside = (targets < 0) | (targets >= total)
        if outside.any():
            worst = int(targets[outside][0])
            raise ConfigError(f"feature {self.model.item!r} has {total} items, and a training row has id {worst}")
        self.listed[targets] = True
        self.positives += torch.bincount(targets[positives_of(batch.label)[owners]], minlength=total)
        first = torch.full((total,), rows).scatter_reduce_(0, items, torch.arange(rows), "amin")
        new = ((first < rows) & ~self.seen).nonzero().flatten()
        at = first[new]
        prints = self._prints(bags, batch.dense, rows)
        self.prints[:, new] = prints[:, at]
        self.seen[new] = True
        self.dense[new] = batch.dense[at]
        self.agrees &= (prints == self.prints[:, items]).all(1)
        self.rows += rows
        if isinstance(self.model, TwoTower) and self.model.item_features:
            self.pieces.append((new, _rows_of(bags, at, len(self.names), rows)))

    def _prints(self, bags: BagIds, dense: Tensor, rows: int) -> Tensor:
        """A number for what each row holds of each feature and numeric column: int64 ``[F + num_dense, rows]``."""
        values = bags.values.long()
        mixed = (values + 1) * _PRIME
        mixed = (mixed ^ (mixed >> 29)) * _PRIME
        owners = torch.repeat_interleave(torch.arange(len(self.names) * rows), bags.offsets.diff())
        found = torch.zeros(len(self.names) * rows, dtype=torch.int64).index_add_(0, owners, mixed)
        numbers = dense.T.contiguous().view(torch.int32).long()
        return torch.cat([found.view(-1, rows), numbers])

    def _refuse_leaks(self) -> None:
        """Refuse features of the user that are the item's: the same in all its rows, and not in those of others."""
        model, seen = self.model, self.seen
        if getattr(model, "names_user", False):
            return
        repeats = self.rows - int(seen.sum())
        found: dict[str, list[str]] = {"features": [], "numeric columns": []}
        for column in self.agrees.nonzero().flatten().tolist():
            _, counts = self.prints[column][seen].unique(return_counts=True)
            share = counts.double() / counts.sum()
            if repeats * (1 - float(share.square().sum())) < _ENOUGH:
                continue
            if column < len(self.names):
                if self.names[column] in model.user_features:
                    found["features"].append(self.names[column])
            elif column - len(self.names) in model.user_numeric:
                found["numeric columns"].append(str(column - len(self.names)))
        if not any(found.values()):
            return
        told = " and ".join(f"{what} {', '.join(names)}" for what, names in found.items() if names)
        raise ConfigError(
            f"{told} are the same in all training rows of an item ({model.item!r}) and differ between items: as "
            f"properties of the user they would tell model {model.key!r} which item the row holds. Name them in "
            "`item_features` (lists with the most ids of an item in `item_lists`, numeric columns, counted from 0, in "
            "`item_numeric`), leave them out of the data, or say what the user's are by `user_features`"
        )

    def _describe(self, model: TwoTower) -> None:
        total, device = len(self.seen), model.item_counts.device
        ids = {}
        for name in model.item_features:
            place = self.names.index(name)
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


def _rows_of(bags: BagIds, rows: Tensor, features: int, batch: int) -> BagIds:
    """Bags of some rows."""
    which = (torch.arange(features).unsqueeze(1) * batch + rows).reshape(-1)
    starts, lengths = bags.offsets[which], bags.offsets.diff()[which]
    ends = lengths.cumsum(0)
    at = torch.repeat_interleave(starts - (ends - lengths), lengths)
    return BagIds(bags.values[at + torch.arange(len(at))], torch.cat([ends.new_zeros(1), ends]))
