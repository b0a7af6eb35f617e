"""Features whose bags TorchRec pools on the ranks that hold the tables: transform, EmbeddingBagCollection, combine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor

from recsys_embed.collection.bags import Bags, pick
from recsys_embed.collection.lookup_bundle import LookupBundle
from recsys_embed.features import Schema
from recsys_embed.kernels.places import Place
from recsys_embed.kernels.vectorised import VectorisedLookup
from recsys_embed.plan import Plan, table_key
from recsys_embed.sharding.physical_tables import PhysicalTable


class PooledFeatures(nn.Module):
    """Features whose vectors are sums of rows; each of a feature's row lookups is a feature of TorchRec's ``ebc``.

    Args:
        schema: the features; their programs pass :func:`pools_in_tables`.
        plan: of at least these features.
        physical_tables: layout of their tables, one row of a table per stored row.
        weighted: ids bring weights.
        device: of the tables; ``"meta"`` allocates nothing until they are sharded.
        like: dtype and device of everything else.
    """

    def __init__(
        self,
        schema: Schema,
        plan: Plan,
        physical_tables: Mapping[str, PhysicalTable],
        weighted: bool,
        device: torch.device | str,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.schema, self.physical_tables = schema, dict(physical_tables)
        # Every table starts at row 0, so features with equal programs transform their ids in one operation.
        places = {key: Place(f"width{physical.width}", 0) for key, physical in physical_tables.items()}
        self.bundle = LookupBundle(schema, plan, places, {}, like, "torch")
        self._groups = cast("VectorisedLookup", self.bundle.kernel).groups
        self.keys: list[str] = []
        tables: dict[str, list[str]] = {key: [] for key in physical_tables}
        # Per table: the feature that each of TorchRec's features of it belongs to.
        self.features_of: dict[str, list[str]] = {key: [] for key in physical_tables}
        for group in self._groups:
            for number, kind in enumerate(group.sets):
                for j, slot in enumerate(kind.slots):
                    for f in group.features:
                        spec = schema.features[f]
                        program = self.bundle.programs[spec.name]
                        key = f"{spec.name}#{number}.{j}"
                        self.keys.append(key)
                        table = table_key(spec, program.table(program.row_lookups[slot].table))
                        tables[table].append(key)
                        self.features_of[table].append(spec.name)
        configs = [
            EmbeddingBagConfig(
                name=physical.name,
                num_embeddings=physical.shape[0],
                embedding_dim=physical.shape[1],
                feature_names=tables[key],
            )
            for key, physical in physical_tables.items()
        ]
        self.ebc = EmbeddingBagCollection(tables=configs, is_weighted=weighted, device=torch.device(device))

    def forward(self, bags: Bags) -> Tensor:
        """Vectors of bags of the features: ``[B, num_vectors, output_dim]``, or ``[B, sum of widths]``."""
        bundle, batch, count = self.bundle, bags.batch, len(self.schema)
        lengths = bags.lengths.view(count, batch)
        feature = torch.repeat_interleave(torch.arange(count, device=bags.values.device), lengths.sum(1))
        ids = bundle.unseen(bags.values, feature)
        values, sizes, weights = [], [], []
        for part, group in zip(bundle.parts, self._groups, strict=True):
            at, local = pick(part, feature, count)
            mine = lengths[list(part)].reshape(-1)
            given = bags.weights if bags.weights is None or at is None else bags.weights[at]
            for read, (_, rows) in zip(
                group.reads, group.rows(ids if at is None else ids[at], local, bundle.kernel.index.arrays), strict=True
            ):
                row_lookups = rows.shape[1]
                flat, per_bag = rows.t().reshape(-1), mine.repeat(row_lookups)
                weight = None if given is None else given.repeat(row_lookups)
                if read.may_be_absent:
                    flat, per_bag, weight = _without_absent(flat, per_bag, weight)
                values.append(flat)
                sizes.append(per_bag)
                weights += [] if weight is None else [weight]
        jagged = KeyedJaggedTensor(
            keys=self.keys,
            values=torch.cat(values),
            lengths=torch.cat(sizes),
            weights=torch.cat(weights) if weights else None,
            stride=batch,
        )
        return self._combine(self.ebc(jagged), lengths, batch)

    def _combine(self, found: KeyedTensor, lengths: Tensor, batch: int) -> Tensor:
        bundle, at, out = self.bundle, 0, []
        # By name, because a sharded collection orders its output by shard. One split for all, because the gradient of
        # a single slice would be a tensor of the full width.
        parts = dict(zip(found.keys(), found.values().split(found.length_per_key(), 1), strict=True))
        for g, (part, group) in enumerate(zip(bundle.parts, self._groups, strict=True)):
            pieces, rows = [], []
            for kind in group.sets:
                members, row_lookups = len(part), len(kind.slots)
                names = self.keys[at : at + members * row_lookups]
                at += members * row_lookups
                width = self._width(part[0], kind.slots[0])
                value = torch.cat([parts[name] for name in names], 1).unflatten(1, (row_lookups, members, -1))
                pieces.append(value[..., :width].transpose(1, 2))
                rows.append(lengths.new_zeros(batch, members, row_lookups))
            value = group.combine(lengths, None, rows, pieces)
            if self.schema.features[part[0]].pooling == "mean":
                value = value / lengths[list(part)].t().clamp_min(1).unsqueeze(-1)
            if bundle.heads.head(f"part{g}") is not None:
                value = bundle.heads.vectors(f"part{g}", value)
            out.append(value.flatten(1))
        return bundle._assemble(out, bundle.ordered, "order")

    def _width(self, feature: int, slot: int) -> int:
        program = self.bundle.programs[self.schema.names[feature]]
        return program.table(program.row_lookups[slot].table).width


def _without_absent(rows: Tensor, lengths: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Remove ids without a row from bags."""
    kept = rows >= 0
    before = F.pad(kept.long().cumsum(0), (1, 0))
    ends = F.pad(lengths.cumsum(0), (1, 0))
    return rows[kept], before[ends].diff(), None if weights is None else weights[kept]
