"""One training run on the processes that torchrun started, with the configuration file of a run on one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from recsys_embed.core.footprint import Footprint, format_bytes
from recsys_embed.data.data_source import DataSource
from recsys_embed.data.folder import lock
from recsys_embed.data.stream import moments_of
from recsys_embed.features import Schema
from recsys_embed.models import CTRModel, build_model
from recsys_embed.plan import Plan
from recsys_embed.sharding.checkpoint import save
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.process_group import job, local_device, share
from recsys_embed.sharding.shard import shard
from recsys_embed.sharding.sharders import Kind, collections_of
from recsys_embed.sharding.single_machine import to_single
from recsys_embed.sharding.trainer import ShardedTrainer
from recsys_embed.train.checkpoint import save_checkpoint
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.run import (
    RunOutcome,
    check_device,
    environment,
    fingerprint,
    footprint_dict,
    goes_on,
    make_optimizer,
    model_from_config,
    plain,
    plans_for,
    resolve,
    schema_of,
)
from recsys_embed.utils.files import write_json

MODEL = "model"
SINGLE_LIMIT = 16 << 30
"""Bytes of weights up to which the first process also writes ``model.pt``, for which it holds all of them."""


def run_sharded(
    config: TrainConfig,
    data: DataSource,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    kinds: Kind | str | None = None,
    tensorboard: bool = False,
    show_progress: bool | None = None,
    save_model: bool = True,
    label: str = "train",
) -> RunOutcome:
    """Train by ``config`` on all processes that torchrun started; see :func:`recsys_embed.train.run_training`.

    Tables are sharded by TorchRec's planner, or as ``kinds`` says. The folder gets what a run of one process writes,
    but checkpoints are folders: ``checkpoints`` and ``best``, read by any number of processes, and ``model``; and
    ``model.pt`` where the weights fit one machine (:data:`SINGLE_LIMIT`).

    Raises:
        ConfigError: the folder already holds a run and ``resume`` is False; too few rows or samples per batch.
        LostProcessError: a process is gone.
    """
    device = local_device(device)
    check_device(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with job(device):
        home = None if folder is None else Path(folder)
        first = dist.get_rank() == 0
        with lock(home) if first and home is not None else nullcontext():
            dist.barrier()
            return _run(config, data, home, resume, device, kinds, tensorboard, show_progress, save_model, label)


def _run(
    config: TrainConfig,
    data: DataSource,
    home: Path | None,
    resume: bool,
    device: torch.device,
    kinds: Kind | str | None,
    tensorboard: bool,
    show_progress: bool | None,
    save_model: bool,
    label: str,
) -> RunOutcome:
    first, world = dist.get_rank() == 0, dist.get_world_size()
    portion = data.portion(dist.get_rank(), world)
    schema = schema_of(data, config)
    # The first process plans for all, as a planner that runs against a clock may come to other plans elsewhere.
    config = TrainConfig.from_dict(share(resolve(schema, config, data).to_dict() if first else None, device))
    going_on = share(goes_on(home, resume, torchrun=True) if first else None, device)
    model = shardable_model(config, schema, data.num_dense)
    footprint = bytes_of(model)
    if config.standardise and data.num_dense:
        sums = portion.numeric_sums().to(device)
        dist.all_reduce(sums)
        model.standardise(*moments_of(sums.cpu()))
    sharded = shard(model, cast(Any, kinds), device=device)
    identity = {"data": fingerprint(schema, data)}
    if first and home is not None:
        write_json(home / "config.json", config.to_dict())
        made = {"seed": config.seed, "world_size": world, **environment(), "footprint": footprint_dict(footprint)}
        write_json(home / "run.json", {**made, "sharding": placement(sharded)})
    trainer = ShardedTrainer(
        sharded,
        portion,
        config,
        home=home,
        resume=going_on,
        tensorboard=tensorboard,
        device=device,
        show_progress=show_progress,
        label=label,
        identity=identity,
    )
    result = trainer.run()
    if home is not None:
        if save_model:
            save(home / MODEL, sharded, extra={"config": config.to_dict(), **identity})
        if first:
            if save_model and footprint.weights <= SINGLE_LIMIT:
                single = model_from_config(config, schema, data.num_dense)
                to_single(home / MODEL, single, states=False)
                save_checkpoint(home / "model.pt", {**config.to_dict(), **identity}, model=single.state_dict())
            elif save_model:
                print(
                    f"recsys-embed: {format_bytes(footprint.weights)} of weights stay in {home / MODEL}; "
                    "recsys_embed.sharding.to_single reads them where they fit",
                    flush=True,
                )
            write_json(home / "result.json", plain(result.to_dict()))
    dist.barrier()
    return RunOutcome(result, footprint, plans_for(schema, config).full_bytes, model)


def shardable_model(config: TrainConfig, schema: Schema, num_dense: int) -> CTRModel:
    """The model of :func:`recsys_embed.train.run.model_from_config`, its tables without bytes until they are sharded.

    >>> import recsys_embed as rse
    >>> model = shardable_model(TrainConfig("dcnv2"), rse.Schema([rse.FeatureSpec("C1", 10, 16)]), num_dense=3)
    >>> type(model.embedding).__name__, [p.device.type for n, p in model.named_parameters() if ".ec." in n]
    ('ShardableCollection', ['meta'])
    """

    def collection(part: Schema, plan: Plan, *, optimizer: Any, seed: int, **_: Any) -> ShardableCollection:
        # Every feature has one id per sample, of which the frequent ones travel once when looked up by id.
        return ShardableCollection(part, plan, optimizer, pool="ids", seed=seed, device="meta")

    plans = plans_for(schema, config)
    return build_model(
        config.model,
        schema,
        plans.vectors,
        plans.linear,
        num_dense=num_dense,
        optimizer=make_optimizer(config),
        seed=config.seed,
        collection=collection,
        **config.model_args,
    )


def bytes_of(model: CTRModel) -> Footprint:
    """Bytes of the embedding part, one copy of each table: Adam keeps two moments of what has ordinary gradients."""
    total = model.footprint()
    for coll in collections_of(model):
        whole = coll.optimizer is None
        ordinary = sum(p.nbytes for n, p in coll.named_parameters() if not n.startswith(("readers.", "by_bag.ebc.")))
        tables = sum(4 * t.rows * t.width for t in coll.tables.values() if not t.dense) if whole else 0
        total += Footprint(optimizer=2 * (ordinary + tables), gradient=tables)
    return total


def placement(sharded: Any) -> dict[str, dict[str, Any]]:
    """How TorchRec placed every table: kind of sharding and ranks, by module path and table."""
    return {
        path: {
            table: {"kind": str(p.sharding_type), "kernel": str(p.compute_kernel), "ranks": list(p.ranks or [])}
            for table, p in tables.items()
        }
        for path, tables in sharded.plan.plan.items()
    }
