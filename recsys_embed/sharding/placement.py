"""Placement of a plan's tables on a cluster by TorchRec's planner; it runs on a CPU and needs no such cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)

from recsys_embed.core.footprint import format_bytes, parse_bytes
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.optim import FusedOptimizer, RowwiseAdagrad
from recsys_embed.plan import Plan
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.fused_updates import fuse, fuses
from recsys_embed.sharding.physical_tables import table_of
from recsys_embed.sharding.pooling_split import Pooling
from recsys_embed.sharding.shard import RESERVED
from recsys_embed.sharding.sharders import Kind, constraints_for, sharders
from recsys_embed.sharding.torchrec_warnings import only_errors_of_torchrec

ID_BYTES, NUMBER_BYTES = 8, 4


@dataclass(frozen=True)
class Cluster:
    """The machines to place tables on.

    Args:
        world_size: devices in all.
        hosts: machines that hold equally many of them.
        hbm: bytes of memory per device, or text such as ``"80GiB"``.
        batch_size: samples per device and step.
        reserved: fraction of the memory that is reserved for layers, activations and the allocator.
        device: ``"cuda"`` or ``"cpu"``.
        intra, inter: bytes per second between devices of a host and of two hosts; TorchRec's figures if None.
        memory: bytes per second that a device reads of its memory; TorchRec's figure if None.

    Raises:
        ConfigError: names every argument out of range.

    >>> Cluster(8, hosts=2, hbm="80GiB").usable == int(80 * 2**30 * 0.85)
    True
    """

    world_size: int
    hosts: int = 1
    hbm: int | str = "80GiB"
    batch_size: int = 4096
    reserved: float = RESERVED
    device: str = "cuda"
    intra: float | None = None
    inter: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        faults = [
            f"`{name}` must be an integer of at least 1; got {getattr(self, name)!r}"
            for name in ("world_size", "hosts", "batch_size")
            if type(getattr(self, name)) is not int or getattr(self, name) < 1
        ]
        if not faults and self.world_size % self.hosts:
            faults.append(f"`hosts` must divide `world_size`; got {self.hosts} and {self.world_size}")
        if not 0 <= self.reserved < 1:
            faults.append(f"`reserved` must be in [0, 1); got {self.reserved!r}")
        if self.device not in ("cuda", "cpu"):
            faults.append(f"`device` must be 'cuda' or 'cpu'; got {self.device!r}")
        try:
            object.__setattr__(self, "hbm", parse_bytes(self.hbm))
        except ConfigError as e:
            faults.append(f"`hbm`: {e}")
        raise_faults(faults, "Cluster")

    @property
    def usable(self) -> int:
        """Bytes per device for tables, their optimizer state and TorchRec's buffers."""
        return int(int(self.hbm) * (1 - self.reserved))

    def topology(self) -> Topology:
        """The cluster as TorchRec's planner takes it."""
        local = self.world_size // self.hosts
        given = {
            "intra_host_bw": self.intra,
            "inter_host_bw": self.inter,
            "hbm_mem_bw" if self.device == "cuda" else "ddr_mem_bw": self.memory,
        }
        # TorchRec's unit is bytes per millisecond.
        hardware = HardwareConfig(**{k: v / 1000 for k, v in given.items() if v is not None})
        memory = "hbm_cap_bytes" if self.device == "cuda" else "ddr_cap_bytes"
        trainer = TrainerConfig(world_size=self.world_size, local_world_size=local, **{memory: int(self.hbm)})
        return TopologyFactory.create_topology(trainer, hardware, KernelConfig(compute_device=self.device))


@dataclass(frozen=True)
class TablePlace:
    """Placement of one table: its ``kind`` of sharding and the ranks that hold shards of it."""

    table: str
    kind: str
    bytes: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """The placement of a plan's tables, and the cost of a step by TorchRec's estimates.

    Attributes:
        fits: whether TorchRec found a place for everything.
        why: if not, the reason and the ways out.
        tables: the placement of every table, largest first.
        weights: bytes of tables and optimizer state of each rank.
        memory: bytes of each rank with what TorchRec adds for inputs, outputs and gradients.
        sent: expected bytes that a rank sends per step: ids, vectors forward, gradients backward.
        step_ms: estimated time of the embedding part of a step, on the slowest rank.
        total: bytes of one copy of all tables and their state.
    """

    fits: bool
    why: str
    tables: tuple[TablePlace, ...]
    weights: tuple[int, ...]
    memory: tuple[int, ...]
    sent: dict[str, float]
    step_ms: float
    total: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        tables = [{"table": t.table, "kind": t.kind, "bytes": t.bytes, "ranks": list(t.ranks)} for t in self.tables]
        return {
            "fits": self.fits,
            "why": self.why,
            "bytes": self.total,
            "weights_per_rank": list(self.weights),
            "memory_per_rank": list(self.memory),
            "sent_per_step": self.sent,
            # NaN is not valid JSON.
            "step_ms": self.step_ms if self.fits else None,
            "tables": tables,
        }


def place(
    schema: Schema,
    plan: Plan | None,
    cluster: Cluster,
    *,
    optimizer: FusedOptimizer | None = None,
    kinds: Mapping[str, Kind] | Kind | None = None,
    lengths: Mapping[str, float] | None = None,
    pool: Pooling = "tables",
) -> Placement:
    """Place the tables of ``plan`` by TorchRec's planner; this allocates no table and starts no process.

    Args:
        schema: the features; where ``plan`` is None, one with raw ids gets a full table of its estimated size.
        plan: a method configuration per feature; full tables if None.
        cluster: the machines.
        optimizer: the tables' optimizer, whose state counts; RowwiseAdagrad if None.
        kinds: see :func:`recsys_embed.sharding.shard`.
        lengths: mean number of ids per sample by feature; 1 by default.
        pool: see :class:`ShardableCollection`.

    >>> from recsys_embed import FeatureSpec
    >>> schema = Schema([FeatureSpec("C1", 40_000_000, 128), FeatureSpec("C2", 1000, 128)])
    >>> found = place(schema, None, Cluster(2, hbm="8GiB"))
    >>> found.fits, found.why[:52]
    (False, 'all tables and their state take 19.22 GiB; 2 devices')
    """
    rule = RowwiseAdagrad() if optimizer is None else optimizer
    coll = ShardableCollection(schema, plan, rule, pool=pool, device="meta")
    constraints = constraints_for([coll], kinds, cluster.world_size, cluster.device, lengths)
    if fuses(rule, cluster.device):
        # TorchRec finds the optimizer, whose state it counts, on the parameters.
        fuse(coll.stored(), rule)
    topology = cluster.topology()
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=cluster.batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(cluster.reserved if cluster.device == "cuda" else 0.0),
        proposer=[GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()],
        debug=False,
    )
    state = {key: rule.state_bytes(physical.rows, physical.width) for key, physical in coll.physical_tables.items()}
    stored = {
        key: NUMBER_BYTES * physical.shape[0] * physical.shape[1] for key, physical in coll.physical_tables.items()
    }
    total = sum(stored.values()) + sum(state.values())
    try:
        with only_errors_of_torchrec():
            planner.plan(torch.nn.ModuleDict({"embedding": coll}), sharders())
    except PlannerError as e:
        return Placement(False, _explain_misfit(cluster, stored, state, e), (), (), (), {}, float("nan"), total)
    options: list[ShardingOption] = planner._best_plan or []
    return _read(options, cluster, stored, state, total)


def _read(
    options: list[ShardingOption], cluster: Cluster, stored: dict[str, int], state: dict[str, int], total: int
) -> Placement:
    world = cluster.world_size
    weights, memory, times = [0.0] * world, [0.0] * world, [0.0] * world
    tables = []
    sent = {"ids": 0.0, "vectors": 0.0, "gradients": 0.0}
    for option in options:
        key = table_of(option.name)
        numbers = sum(shard.size[0] * shard.size[1] for shard in option.shards)
        for shard in option.shards:
            rank = int(shard.rank or 0)
            # A replica holds the full state, a shard its fraction.
            share = shard.size[0] * shard.size[1] / numbers
            copies = world if option.sharding_type == "data_parallel" else 1
            weights[rank] += (stored[key] + state[key]) * share * copies
            memory[rank] += shard.storage.hbm if cluster.device == "cuda" else shard.storage.ddr
            times[rank] += shard.perf.total if shard.perf is not None else 0.0
        for part, amount in _bytes_sent(option, world, cluster.batch_size).items():
            sent[part] += amount
        ranks = tuple(sorted({int(s.rank or 0) for s in option.shards}))
        tables.append(TablePlace(key, option.sharding_type, stored[key] + state[key], ranks))
    tables.sort(key=lambda t: (-t.bytes, t.table))
    rounded = [tuple(round(n) for n in one) for one in (weights, memory)]
    return Placement(True, "", tuple(tables), rounded[0], rounded[1], sent, max(times, default=0.0), total)


def _bytes_sent(option: ShardingOption, world: int, batch: int) -> dict[str, float]:
    """Expected bytes that a rank sends per step for a table; ``1 / world`` of the traffic stays on the rank."""
    away = (world - 1) / world
    ids = sum(option.input_lengths) * batch
    width = option.tensor.shape[1]
    if option.sharding_type == "data_parallel":
        # A ring all-reduce sends every gradient twice.
        return {"ids": 0.0, "vectors": 0.0, "gradients": 2 * away * NUMBER_BYTES * option.tensor.numel()}
    bags = len(option.input_lengths) * batch
    rows = bags if option.is_pooled else ids
    # Partial sums of row-wise bags come from every rank.
    sources = world if option.sharding_type == "row_wise" and option.is_pooled else 1
    columns = len(option.shards) if option.sharding_type == "column_wise" else 1
    vectors = rows * width * NUMBER_BYTES * away * sources
    return {"ids": ids * ID_BYTES * away * columns, "vectors": vectors, "gradients": vectors}


def _explain_misfit(cluster: Cluster, stored: dict[str, int], state: dict[str, int], error: PlannerError) -> str:
    """Why the tables do not fit, and what would fit."""
    total = sum(stored.values()) + sum(state.values())
    room = cluster.world_size * cluster.usable
    largest = max(stored, key=lambda key: stored[key] + state[key])
    say = (
        f"all tables and their state take {format_bytes(total)}; {cluster.world_size} devices of "
        f"{format_bytes(int(cluster.hbm))} have room for {format_bytes(room)} "
        f"({cluster.reserved:.0%} of each is reserved). The largest table is {largest!r}, "
        f"{format_bytes(stored[largest] + state[largest])}"
    )
    if total > room:
        devices = -(-total // cluster.usable)
        each = -(-total // cluster.world_size) / (1 - cluster.reserved)
        weights = int(room * sum(stored.values()) / total)
        return (
            f"{say}. Ways out: 1. tables of {format_bytes(weights)} or less (--budget), "
            f"{total / room:.1f}x smaller; 2. {devices} devices of this size; 3. {format_bytes(int(each))} per device"
        )
    reason = " ".join(str(error).split())[:300]
    return (
        f"{say}, which is not too much in all, but TorchRec found no way to shard it: {reason}. Ways out: 1. leave "
        "the kinds of sharding to the planner; 2. a smaller batch; 3. more devices"
    )


def largest_budget(cluster: Cluster, margin: float = 0.8) -> int:
    """Bytes of tables and their state to plan for on a cluster: its memory, less a margin for shards of uneven size.

    >>> largest_budget(Cluster(2, hbm="10GiB"), margin=0.5) == Cluster(2, hbm="10GiB").usable
    True
    """
    return int(cluster.world_size * cluster.usable * margin)
