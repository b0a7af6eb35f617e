"""What two processes run under DistributedDataParallel or FSDP, beside one process with torch's dense optimizer."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import recsys_embed as rse
from recsys_embed.errors import ConfigError
from recsys_embed.methods.hash import HashConfig
from recsys_embed.optim import fused_optimizer, unfused_parameters

SCHEMA = rse.Schema([rse.FeatureSpec("u", 60, 4, init="uniform:0.5"), rse.FeatureSpec("i", 40, 4, init="uniform:0.5")])
OTHER = rse.Schema([rse.FeatureSpec("c", 30, 4, init="uniform:0.5")])
# Rules of this library, and torch's optimizers that do the same.
RULES: dict[str, Any] = {
    "sgd": (lambda: rse.SGD(lr=0.2), lambda p: torch.optim.SGD(p, 0.2)),
    "adagrad": (lambda: rse.Adagrad(lr=0.1, eps=1e-10), lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-10)),
    "adam": (lambda: rse.Adam(lr=0.05, rows="all"), lambda p: torch.optim.Adam(p, 0.05)),
}


class Net(nn.Module):
    """Fused tables of two collections, a collection without an optimizer, a compressed drop-in, and a head."""

    def __init__(self, rule: Any, plan: rse.Plan | None = None, branch: str = "") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tables = rse.EmbeddingCollection(SCHEMA, plan, rule, seed=0)
        self.more = rse.EmbeddingCollection(OTHER, None, rule, seed=1)
        self.plain = rse.EmbeddingCollection(OTHER, None, None, seed=2)
        self.item = nn.Embedding(40, 4)
        rse.compress_(self, {"item": HashConfig(num_buckets=17)})
        self.head = nn.Linear(20, 1)
        self.branch = branch

    def forward(self, x: Tensor, more: bool = True) -> Tensor:
        other = self.more(x[:, 2:]).flatten(1) if more else x.new_zeros(len(x), 4, dtype=torch.float32)
        parts = [self.tables(x[:, :2]).flatten(1), other, self.plain(x[:, 2:]).flatten(1), self.item(x[:, 1])]
        if self.branch == "twice":
            parts[0] = parts[0] + self.tables((x[:, :2] + 1) % 40).flatten(1)
        return self.head(torch.cat(parts, 1)).squeeze(1)


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randint(0, n, (size,), generator=g) for n in (60, 40, 30)], 1)
    return x, torch.rand(size, generator=g) * 3


def apart(model: nn.Module, group: Any) -> float:
    """How much the replicas differ; 0.0 is bit for bit."""
    worst = 0.0
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value = value.detach().clone()
            low, high = value.clone(), value
            dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
            dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
            worst = max(worst, float((high - low).abs().max()))
    return worst


def difference(model: nn.Module, other: nn.Module) -> float:
    theirs = dict(other.named_parameters())
    return max(float((p - theirs[n]).detach().abs().max()) for n, p in model.named_parameters())


def replicas(
    group: Any,
    rank: int,
    world: int,
    rule: str = "adagrad",
    when: str = "before",
    habit: str = "",
    plan: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Train replicas for some steps, and one model with torch's dense optimizer on the joined batches.

    Args:
        when: the optimizer is made ``"before"`` or ``"after"`` DistributedDataParallel.
        habit: of a training loop.
        options: of DistributedDataParallel.
    """
    made, torchs = RULES[rule]
    plan_ = None if plan is None else rse.Plan.uniform(SCHEMA, **plan)
    model = Net(made(), plan_, habit)
    one = Net(None, plan_, habit)
    dense = torch.optim.SGD(one.head.parameters(), 0.1)
    others = torchs([p for n, p in one.named_parameters() if not n.startswith("head")])
    if rank and habit == "other start":
        with torch.no_grad():
            model.tables.width4.add_(1.0)

    def optimizer() -> torch.optim.Optimizer:
        ours = torch.optim.SGD(model.head.parameters(), 0.1)
        head = {id(p) for p in model.head.parameters()}
        return fused_optimizer(model, _Both(ours, torchs([p for p in unfused_parameters(model) if id(p) not in head])))

    if when == "before":
        step = optimizer()
        replica = DistributedDataParallel(model, process_group=group, **options)
    else:
        replica = DistributedDataParallel(model, process_group=group, **options)
        step = optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=habit == "scaler")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    unused = False
    for s in range(4):
        micro = 2 if habit == "accumulate" else 1
        for m in range(micro):
            x, y = batch(10 * s + m)
            half = slice(rank * 8, rank * 8 + 8)
            if habit == "empty":
                half = slice(0, 16) if rank == 0 else slice(0, 0)
            if habit == "unused":
                # One rank reads no row of some tables, which torch allows where it looks for unused parameters.
                unused = s != 1 and rank == 1
            with replica.no_sync() if m + 1 < micro else nullcontext():
                args = {"more": not unused} if habit == "unused" else {}
                loss = F.mse_loss(replica(x[half], **args), y[half], reduction="sum") / (8 * micro)
                if habit == "inf" and s == 1 and rank == 1:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
            if habit == "unused":
                for r in range(world):
                    part = slice(r * 8, r * 8 + 8)
                    out = one(x[part], more=not (s != 1 and r == 1))
                    (F.mse_loss(out, y[part], reduction="sum") / 16).backward()
            else:
                (F.mse_loss(one(x), y, reduction="sum") / (16 * micro)).backward()
        if habit == "clip":
            scaler.unscale_(step)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            nn.utils.clip_grad_norm_(one.parameters(), 0.3)
        scaler.step(step)
        scaler.update()
        step.zero_grad()
        dense.step()
        others.step()
        one.zero_grad()
    model.tables.catch_up_()
    model.more.catch_up_()
    moved = max(float((p - start[n]).detach().abs().max()) for n, p in model.named_parameters())
    return {"apart": apart(model, group), "one": difference(model, one), "moved": moved}


class _Both(torch.optim.Optimizer):
    """Two of torch's optimizers as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.parts = parts

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def two_replicas(group: Any, rank: int, world: int, compiled: str) -> dict[str, float]:
    """Compiled models: their lookups run as operators."""
    torch.manual_seed(0)
    model, one = Net(rse.Adagrad(lr=0.1)), Net(rse.Adagrad(lr=0.1))
    step, alone = fused_optimizer(model), fused_optimizer(one)
    if compiled == "inside":
        replica: nn.Module = DistributedDataParallel(torch.compile(model, backend="aot_eager"), process_group=group)
    else:
        replica = torch.compile(DistributedDataParallel(model, process_group=group), backend="aot_eager")
    start = model.tables.width4.detach().clone()
    for s in range(3):
        x, y = batch(s)
        half = slice(rank * 8, rank * 8 + 8)
        F.mse_loss(replica(x[half]), y[half]).backward()
        step.step()
        step.zero_grad()
        F.mse_loss(one(x), y).backward()
        alone.step()
        alone.zero_grad()
    moved = float((model.tables.width4 - start).detach().abs().max())
    return {"apart": apart(model, group), "one": difference(model, one), "moved": moved}


def refused(group: Any, rank: int, world: int, kind: str) -> str:
    """The error of tables whose rows nobody would exchange."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.manual_seed(0)
    coll = rse.EmbeddingCollection(OTHER, None, rse.SGD(lr=0.1), seed=0)
    model: nn.Module = nn.Sequential(coll, nn.Flatten(), nn.Linear(4, 1))
    mesh = DeviceMesh.from_group(group, "cpu") if "fsdp2" in kind else None
    if "alone" in kind:
        model = nn.Sequential(coll)
    if "step" in kind:
        fused_optimizer(model)
    ignored = set(coll.parameters()) if "ignored" in kind else set()
    if "fsdp1" in kind:
        model = FullyShardedDataParallel(
            model, process_group=group, ignored_states=ignored or None, device_id=torch.device("cpu")
        )
    elif "fsdp2" in kind:
        fully_shard(model, mesh=mesh, ignored_params=ignored)
    else:
        model = DistributedDataParallel(model, process_group=group)
        if "late" in kind:
            fused_optimizer(model)
    if "compiled" in kind:
        model = torch.compile(model, backend="aot_eager")
    try:
        model(torch.tensor([[3], [rank]])).sum().backward()
    except ConfigError as error:
        return str(error)
    return ""


def sharded(group: Any, rank: int, world: int, kind: str, rule: str = "adagrad") -> dict[str, float]:
    """FSDP around the rest of a model, whose fused tables are replicas."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    made, torchs = RULES[rule]
    coll = rse.EmbeddingCollection(SCHEMA, None, made(), seed=rank)  # FSDP does not synchronise what it ignores
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(coll, nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    torch.manual_seed(0)
    plain = rse.EmbeddingCollection(SCHEMA, None, None, seed=0)
    one = nn.Sequential(plain, nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    if kind == "fsdp2":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"), ignored_params=set(coll.parameters()))
    else:
        model = FullyShardedDataParallel(
            model, process_group=group, ignored_states=[coll], use_orig_params=True, device_id=torch.device("cpu")
        )
    others = [p for n, p in model.named_parameters() if "width" not in n]
    step = fused_optimizer(model, torch.optim.SGD(others, 0.1), process_group=group)
    dense = torch.optim.SGD([p for n, p in one.named_parameters() if "width" not in n], 0.1)
    tables = torchs(list(plain.parameters()))
    start = plain.width4.detach().clone()
    for s in range(3):
        x, y = batch(s)
        half = slice(rank * 8, rank * 8 + 8)
        F.mse_loss(model(x[half, :2]).squeeze(1), y[half]).backward()
        F.mse_loss(one(x[:, :2]).squeeze(1), y).backward()
        for optimizer in (step, dense, tables):
            optimizer.step()
            optimizer.zero_grad()
    coll.catch_up_()
    moved = float((plain.width4 - start).detach().abs().max())
    return {"apart": apart(coll, group), "one": difference(coll, plain), "moved": moved}


def copies(group: Any, rank: int, world: int) -> dict[str, float]:
    """Averages and pickles of a model with replicas know nothing of them, and are trained alone."""
    model = Net(rse.SGD(lr=0.1))
    step = fused_optimizer(model)
    replica = DistributedDataParallel(model, process_group=group)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    x, y = batch(rank)
    F.mse_loss(replica(x), y).backward()
    step.step()
    averaged.update_parameters(model)
    again = pickle.loads(pickle.dumps(model))
    same = difference(averaged.module, model) + difference(again, model)
    if rank == 0:  # would wait for ever if it were a replica
        F.mse_loss(again(x), y).backward()
    grad = again.tables.width4.grad
    return {"same": same, "apart": apart(model, group), "left": 0.0 if grad is None else float(grad.abs().sum())}


def few_bits(group: Any, rank: int, world: int, quantization: str, kind: str) -> dict[str, float]:
    """Tables that train in few bits, whose random bits have to be those of the first process everywhere."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    schema = rse.Schema([rse.FeatureSpec(n, 50, 16, init="normal:0.05") for n in "ui"])
    options: dict[str, Any] = {"precision": "int8", "quantization": quantization}
    torch.manual_seed(0)
    if kind == "drop-in":
        tables: nn.Module = rse.make_embedding("hash", 50, 16, num_buckets=20, init="normal:0.05", **options)
    else:
        plan = rse.Plan.uniform(schema, "full", **options)
        tables = rse.EmbeddingCollection(schema, plan, rse.RowwiseAdagrad(lr=0.1), seed=rank)
    head = nn.Linear(32, 1)
    model: nn.Module = nn.Sequential(tables, nn.Flatten(), head)
    if kind == "fsdp2":
        fully_shard(head, mesh=DeviceMesh.from_group(group, "cpu"))
        model = nn.Sequential(tables, nn.Flatten(), head)
    made = torch.optim.SGD(model.parameters() if kind == "drop-in" else head.parameters(), 0.1)
    step = made if kind == "drop-in" else fused_optimizer(model, made, process_group=group if kind == "fsdp2" else None)
    flat = {"init_sync": False} if kind == "drop-in" else {}
    replica = model if kind == "fsdp2" else DistributedDataParallel(model, process_group=group, **flat)
    start = [p.stored.clone() for p in tables.parameters() if hasattr(p, "stored")]
    for s in range(3):
        x, y = batch(10 * s + rank)
        F.mse_loss(replica(x[:, :2] % 40).squeeze(1), y).backward()
        step.step()
        step.zero_grad()
    found = [p.stored for p in tables.parameters() if hasattr(p, "stored")]
    worst = 0.0
    for stored in found:
        low, high = stored.double(), stored.double()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
        worst = max(worst, float((high - low).abs().max()))
    moved = [int((a != b).sum()) for a, b in zip(start, found, strict=True)]
    return {"apart": worst, "moved": float(sum(moved))}
