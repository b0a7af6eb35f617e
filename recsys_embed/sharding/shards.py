"""The parts of physical tables that lie in this process, as views of what TorchRec allocated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys_embed.core import hashing
from recsys_embed.core.program import Table
from recsys_embed.sharding.physical_tables import Slab, table_of


class Shard(NamedTuple):
    """``tensor`` holds rows and columns of a stored table from ``(row, column)`` on."""

    slab: Slab
    tensor: Tensor
    row: int
    column: int

    def take(self, stored: Tensor, first: int = 0) -> None:
        """Copy in what overlaps with rows ``stored [n, stored width]`` of the table from ``first`` on."""
        low, high = max(self.row, first), min(self.row + len(self.tensor), first + len(stored))
        if low < high:
            columns = slice(self.column, self.column + self.tensor.shape[1])
            self.tensor[low - self.row : high - self.row].copy_(stored[low - first : high - first, columns])


def parts_of(values: object) -> Iterator[tuple[Tensor, int, int]]:
    """Local tensors of an entry of a state dict, with their first row and column."""
    if isinstance(values, ShardedTensor):
        for shard in values.local_shards():
            row, column = (*shard.metadata.shard_offsets, 0)[:2]
            yield shard.tensor, row, column
    elif isinstance(values, Tensor):
        yield values, 0, 0
    else:
        raise TypeError(f"a table of a state dict is a tensor or a ShardedTensor; got {type(values).__name__}")


def shards_of(module: nn.Module, slabs: Mapping[str, Slab]) -> Iterator[Shard]:
    """Shards that one of TorchRec's collections, sharded or not, holds here."""
    for name, values in module.state_dict().items():
        slab = slabs[table_of(name.split(".")[-2])]
        for tensor, row, column in parts_of(values):
            yield Shard(slab, tensor.detach(), row, column)


@torch.no_grad()
def copy_in(shards: Iterable[Shard], stored: Mapping[str, Tensor]) -> None:
    """Copy into shards their parts of the stored tables ``[stored rows, stored width]`` by key."""
    for shard in shards:
        shard.take(stored[shard.slab.key])


@torch.no_grad()
def fill(shards: Iterable[Shard], tables: Mapping[str, Table], seed: int) -> None:
    """Draw initial weights into shards, piece by piece: no process ever holds a whole table."""
    by_key: dict[str, list[Shard]] = {}
    for shard in shards:
        if not shard.tensor.is_meta:
            by_key.setdefault(shard.slab.key, []).append(shard)
    for key, held in by_key.items():
        table, slab = tables[key], held[0].slab
        for shard in held:
            shard.tensor.zero_()
        last = max(shard.row + len(shard.tensor) for shard in held) * slab.per_row
        total, drawn, first = table.rows * table.width, 0, 0
        # Whole stored rows at a time; what does not fill one waits for the next piece.
        unit, rest = slab.per_row * slab.width, torch.empty(0)
        for draw in table.init.stream(total, hashing.salt(seed, "init", key)):
            drawn += len(draw)
            rest = torch.cat([rest, draw])
            whole = len(rest) if drawn == total else len(rest) - len(rest) % unit
            rows, rest = rest[:whole].view(-1, slab.width), rest[whole:]
            for shard in held:
                shard.take(slab.pack(rows), first // slab.per_row)
            first += len(rows)
            if first >= last:
                break
