"""The shards of physical tables that this process holds, as views of TorchRec's memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys_embed.core import hashing
from recsys_embed.core.program import Table
from recsys_embed.sharding.physical_tables import PhysicalTable, table_of


class LocalShard(NamedTuple):
    """A shard on this process: ``tensor`` is the block of a physical table that starts at ``(row, column)``."""

    physical: PhysicalTable
    tensor: Tensor
    row: int
    column: int

    def take(self, stored: Tensor, first: int = 0) -> None:
        """Copy the overlap with ``stored [n, stored width]``, rows of the physical table that start at ``first``."""
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


def shards_of(module: nn.Module, physical_tables: Mapping[str, PhysicalTable]) -> Iterator[LocalShard]:
    """Shards that one of TorchRec's collections, sharded or not, holds here."""
    for name, values in module.state_dict().items():
        physical = physical_tables[table_of(name.split(".")[-2])]
        for tensor, row, column in parts_of(values):
            yield LocalShard(physical, tensor.detach(), row, column)


@torch.no_grad()
def copy_in(shards: Iterable[LocalShard], stored: Mapping[str, Tensor]) -> None:
    """Copy into shards their parts of the stored tables ``[stored rows, stored width]`` by key."""
    for shard in shards:
        shard.take(stored[shard.physical.key])


@torch.no_grad()
def fill(shards: Iterable[LocalShard], tables: Mapping[str, Table], seed: int) -> None:
    """Draw initial weights into shards in chunks, so that no process ever holds a full table."""
    by_key: dict[str, list[LocalShard]] = {}
    for shard in shards:
        if not shard.tensor.is_meta:
            by_key.setdefault(shard.physical.key, []).append(shard)
    for key, held in by_key.items():
        table, physical = tables[key], held[0].physical
        for shard in held:
            shard.tensor.zero_()
        last = max(shard.row + len(shard.tensor) for shard in held) * physical.per_row
        total, drawn, first = table.rows * table.width, 0, 0
        # Only full physical rows are copied; the remainder waits for the next chunk.
        unit, rest = physical.per_row * physical.width, torch.empty(0)
        for draw in table.init.stream(total, hashing.salt(seed, "init", key)):
            drawn += len(draw)
            rest = torch.cat([rest, draw])
            whole = len(rest) if drawn == total else len(rest) - len(rest) % unit
            rows, rest = rest[:whole].view(-1, physical.width), rest[whole:]
            for shard in held:
                shard.take(physical.pack(rows), first // physical.per_row)
            first += len(rows)
            if first >= last:
                break
