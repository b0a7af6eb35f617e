"""Run by two processes: modules under torch's data parallel wrappers against one process. Not collected as tests."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import recsys_embed as rse
from recsys_embed.registry import list_methods
from recsys_embed.testing import example

warnings.simplefilter("ignore")
IDS = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids)
        return (out.view(len(ids), -1, 8).mean(1) * WEIGHT.to(out.dtype)).sum()


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        for ids in batches:
            (net(ids) / len(batches)).backward()
        optimizer.step()


def compare(one: nn.Module, wrapped: nn.Module, what: str) -> None:
    for (name, p), q in zip(one.named_parameters(), wrapped.parameters(), strict=True):
        full: Any = q.full_tensor() if hasattr(q, "full_tensor") else q
        torch.testing.assert_close(full, p, msg=f"{what}: {name}")


def ddp(method: Any, rank: int, sparse: bool) -> None:
    table = example(method, sparse=sparse)
    net = Net(table)
    one = copy.deepcopy(net)
    dense = any(t.dense for t in table.program.tables)
    made: Any = torch.optim.SparseAdam if sparse and not dense else torch.optim.Adagrad
    steps(DistributedDataParallel(net), made(net.parameters(), lr=0.1), [IDS[rank]])
    steps(one, made(one.parameters(), lr=0.1), list(IDS))
    compare(one, net, f"DDP, {method.name}, sparse={sparse}")


def drawn_in_shards(method: Any, rank: int, **options: Any) -> None:
    """Built without memory, sharded, then drawn: the weights of one process."""
    torch.manual_seed(7)
    one = example(method, padding_idx=402, **options)
    with torch.device("meta"):
        net = Net(example(method, padding_idx=402, **options))
    fully_shard(net.table)
    net.to_empty(device="cpu")
    torch.manual_seed(7)
    net.table.reset_parameters()  # type: ignore[operator]
    for (name, p), q in zip(one.named_parameters(), net.table.parameters(), strict=True):
        assert torch.equal(q.full_tensor(), p), f"drawn in shards, {method.name}, {options}: {name}"  # type: ignore[operator]


def main(rank: int) -> None:
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for i, method in enumerate(list_methods()):
        ddp(method, rank, sparse=True)
        if i % 3 == 0:
            ddp(method, rank, sparse=False)
        net = Net(example(method))
        one = copy.deepcopy(net)
        fully_shard(net.table)
        fully_shard(net)
        steps(net, torch.optim.Adagrad(net.parameters(), lr=0.1, foreach=False), [IDS[rank]])
        steps(one, torch.optim.Adagrad(one.parameters(), lr=0.1), list(IDS))
        compare(one, net, f"FSDP2, {method.name}")
        for seed in (None, 3):
            drawn_in_shards(method, rank, seed=seed)
    # Index arrays that the first process alone has loaded reach the others, as buffers do.
    schema = rse.Schema([rse.FeatureSpec("a", 400, 8)])
    counts = torch.rand(400, generator=torch.Generator().manual_seed(2))
    for table in (
        example(rse.get_method("adaptive"), order="counts"),
        rse.EmbeddingCollection(schema, rse.Plan.uniform(schema, "adaptive", budget="6KiB", order="counts")),
    ):
        known = copy.deepcopy(table)
        given: Any = {"a": counts} if isinstance(table, rse.EmbeddingCollection) else torch.rand(403)
        distributed_given = [given]
        distributed.broadcast_object_list(distributed_given)
        known.assign_(distributed_given[0])
        if rank == 0:
            table.assign_(distributed_given[0])
        ids = IDS[0].unsqueeze(1)
        assert torch.equal(DistributedDataParallel(table)(ids), known(ids))
    distributed.destroy_process_group()
    print("done", flush=True)


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    main(int(sys.argv[1]))
