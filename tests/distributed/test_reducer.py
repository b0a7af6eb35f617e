"""DistributedDataParallel's reducer is built anew where tables need it, and knows what the first one was told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import BuiltinCommHookType
from torch.nn.parallel import DistributedDataParallel

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Schema
from recsys_embed.optim.replicas import _leave_buckets

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)
IDS = torch.tensor([[3], [7]])


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    yield
    distributed.destroy_process_group()


class Net(nn.Module):
    def __init__(self, sparse: bool, rule: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        schema = Schema([FeatureSpec("C1", 50, 4)])
        self.tables = EmbeddingCollection(schema, seed=0, sparse=sparse)
        self.fused = EmbeddingCollection(schema, None, rule) if rule is not None else None
        self.head = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.tables(ids)
        return self.head(out if self.fused is None else out + self.fused(ids))  # type: ignore[no-any-return]


def train(replica: DistributedDataParallel) -> list[int]:
    """Calls of a hook that halves gradients, after each of three steps."""
    called, counts = [0], []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations
        called[0] += 1
        done: Any = torch.futures.Future()
        done.set_result(bucket.buffer() * 0.5)
        return done

    replica.register_comm_hook(None, hook)
    for _ in range(3):
        replica.zero_grad()
        replica(IDS).sum().backward()
        counts.append(called[0])
    return counts


def test_communication_hooks_stay_with_sparse_gradients() -> None:
    dense, sparse = (Net(s) for s in (False, True))
    counts = [train(DistributedDataParallel(net)) for net in (dense, sparse)]
    assert all(all(a < b for a, b in zip([0, *found], found, strict=False)) for found in counts)
    assert sparse.tables.width4.grad.is_sparse
    torch.testing.assert_close(sparse.tables.width4.grad.to_dense(), dense.tables.width4.grad)
    plain = Net(False)
    plain(IDS).sum().backward()
    torch.testing.assert_close(sparse.head.bias.grad, plain.head.bias.grad * 0.5)


def test_compiled_hooks_of_torch_stay_with_sparse_gradients() -> None:
    replica = DistributedDataParallel(Net(True))
    replica._register_builtin_comm_hook(BuiltinCommHookType.ALLREDUCE)
    replica(IDS).sum().backward()
    assert replica._get_ddp_logging_data()["comm_hook"] == "BuiltinCommHookType.ALLREDUCE"


def test_sparse_gradients_stay_expected_where_fused_tables_leave_the_buckets() -> None:
    net = Net(True, rse.SGD(lr=0.1))
    replica = DistributedDataParallel(net)
    optimizer = rse.optim.fused_optimizer(net, torch.optim.SGD(net.parameters(), 0.1))
    _leave_buckets(replica, [net.fused])  # type: ignore[list-item]
    assert train(replica)[-1] >= 3
    assert net.tables.width4.grad.is_sparse
    optimizer.step()
