"""Shard a model: from shardable collections to TorchRec's DistributedModelParallel, with deterministic weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.optim import FusedOptimizer
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.cpu_rows import read_dense_rows
from recsys_embed.sharding.fused_updates import fuse, fuses
from recsys_embed.sharding.managed_collision import MOST_RANKS, ManagedEBC, ManagedSharder
from recsys_embed.sharding.sharders import Kind, collections_of, constraints_for, sharders
from recsys_embed.sharding.shards import copy_in, shards_of
from recsys_embed.sharding.torchrec_warnings import only_errors_of_torchrec

RESERVED = 0.15
"""Fraction of a device's memory reserved for layers, activations and the allocator; TorchRec's own default."""


def shard(
    model: nn.Module,
    kinds: Mapping[str, Kind] | Kind | None = None,
    *,
    device: torch.device | str = "cpu",
    plan: ShardingPlan | None = None,
    topology: Topology | None = None,
    group: ProcessGroup | None = None,
) -> DistributedModelParallel:
    """Shard a model's :class:`ShardableCollection` tables over the processes of ``group``.

    Tables keep their weights; tables on the meta device get their initial weights. Optimizers run inside backward
    where fbgemm implements them.

    Args:
        model: holds shardable collections, among any other modules; the same on every rank.
        kinds: ``"table_wise"``, ``"row_wise"``, ``"column_wise"`` or ``"data_parallel"`` for all tables, or by table
            or feature; TorchRec's planner decides for all others.
        device: of this rank.
        plan: of TorchRec, instead of planning here.
        topology: the machines as the planner sees them; by default those of ``group`` with TorchRec's bandwidths.
        group: process group; the default one if None.

    Raises:
        ConfigError: no shardable collection, no process group, or kinds that do not go with the optimizer.
    """
    device = torch.device(device)
    colls = collections_of(model)
    managed = [m for m in model.modules() if isinstance(m, ManagedEBC)]
    if not colls and not managed:
        raise ConfigError(
            "the model holds no ShardableCollection, CompressedEBC or ManagedEBC; replace its embedding tables first"
        )
    rules = [*(coll.optimizer for coll in colls), *(one.optimizer for one in managed)]
    few = {rule for rule in rules if isinstance(rule, FusedOptimizer) and rule.state_precision != "fp32"}
    raise_faults(
        [f"TorchRec keeps the state of optimizers in float32; set state_precision='fp32' in {rule!r}" for rule in few],
        "shard",
    )
    if not dist.is_initialized():
        raise ConfigError("no process group; start with torchrun and call torch.distributed.init_process_group")
    group = dist.GroupMember.WORLD if group is None else group
    world = dist.get_world_size(group)
    constraints = constraints_for(colls, kinds, world, device.type)
    for coll in colls:
        if coll.optimizer is not None and fuses(coll.optimizer, device.type):
            fuse(coll.stored(), coll.optimizer)
        elif coll.optimizer is not None:
            logging.getLogger(__name__).warning(
                "TorchRec does not update inside backward by %r on %s: every rank holds the tables of this rule whole, "
                "and Optimizers.step() updates them",
                coll.optimizer,
                device.type,
            )
    for one in managed:
        constraints |= managed_constraints(one, device.type, world)
    held = [weights_of(coll) for coll in colls]
    laid = [[(physical, parameter.detach()) for physical, parameter in one.stored()] for one in managed]
    able = [*sharders(), ManagedSharder()]
    with only_errors_of_torchrec():
        if plan is None:
            planner = EmbeddingShardingPlanner(
                topology=topology or topology_of(world, device.type),
                storage_reservation=FixedPercentageStorageReservation(RESERVED),
                constraints=constraints,
                debug=False,
            )
            plan = planner.collective_plan(model, able, group)
        sharded = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(group),
            device=device,
            plan=plan,
            sharders=able,
        )
    read_dense_rows(sharded)
    for coll, weights in zip(colls, held, strict=True):
        if weights is None:
            coll.reset_parameters()
        else:
            # TorchRec initialises tables anew when it shards them from CPU to CPU.
            copy_in(coll.shards(), weights)
    for one, tables in zip(managed, laid, strict=True):
        physical_tables = {physical.key: physical for physical, _ in tables}
        found = shards_of(one.managed._embedding_module, physical_tables)
        copy_in(found, {physical.key: values for physical, values in tables})
    return sharded


def managed_constraints(module: ManagedEBC, device_type: str, world_size: int) -> dict[str, ParameterConstraints]:
    """Tables with managed collision are sharded row-wise; each rank owns a range of hashed ids.

    Raises:
        ConfigError: no optimizer that runs inside backward on such a device, or rows that do not divide.
    """
    uneven = [s for s in module.schema if gcd(s.num_embeddings, MOST_RANKS) % world_size]
    raise_faults(
        [
            f"`num_embeddings` must be a multiple of the number of processes, a power of 2; got {s.num_embeddings} for "
            f"{world_size} (feature {s.name!r})"
            for s in uneven
        ],
        "ManagedEBC",
    )
    if module.optimizer is None or not fuses(module.optimizer, device_type):
        raise ConfigError(
            f"ManagedEBC needs an `optimizer` that runs inside backward on {device_type} to be sharded, e.g. "
            f"RowwiseAdagrad; got {module.optimizer}"
        )
    fuse(module.stored(), module.optimizer)
    only = {"sharding_types": ["row_wise"], "compute_kernels": ["fused"]}
    return {physical.name: ParameterConstraints(**only) for physical, _ in module.stored()}


def weights_of(coll: ShardableCollection) -> dict[str, Tensor] | None:
    """Stored tables by key as they are before sharding; None on the meta device."""
    found = {physical.key: parameter.detach() for physical, parameter in coll.stored()}
    return None if any(values.is_meta for values in found.values()) else found


def topology_of(world_size: int, device_type: str) -> Topology:
    """TorchRec's topology of the running job, with the memory that its devices report."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    memory = (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if device_type == "cuda" else None
    )
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=min(local, world_size), hbm_cap_bytes=memory),
        kernel_config=KernelConfig(compute_device=device_type),
    )
