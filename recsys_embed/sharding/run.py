"""A training run on the processes that torchrun started; it takes the configuration of a single-process run."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from recsys_embed.core.footprint import Footprint, format_bytes
from recsys_embed.data.data_source import DataSource
from recsys_embed.data.folder import lock
from recsys_embed.data.stream import moments_of
from recsys_embed.errors import ConfigError
from recsys_embed.features import Schema
from recsys_embed.models import CTRModel, RetrievalModel, build_model, get_model
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan
from recsys_embed.sharding.checkpoint import save
from recsys_embed.sharding.collection import ShardableCollection
from recsys_embed.sharding.process_group import broadcast_json, job, local_device
from recsys_embed.sharding.shard import shard
from recsys_embed.sharding.sharders import Kind, collections_of
from recsys_embed.sharding.single_machine import to_single
from recsys_embed.sharding.trainer import ShardedTrainer
from recsys_embed.train.build import make_optimizer, model_from_config
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.driver import Run, RunOutcome, should_resume
from recsys_embed.train.environment import check_device
from recsys_embed.train.inputs import check_data
from recsys_embed.train.plans import plans_for
from recsys_embed.train.result import TrainResult

MODEL = "model"
SINGLE_LIMIT = 16 << 30
"""Most bytes of weights for which rank 0 also writes ``model.pt``, because it must hold all of them in memory."""


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
    check_data(data, config, "training on several processes", "rows", "portion")
    if issubclass(get_model(config.model), RetrievalModel):
        raise ConfigError(
            f"model {config.model!r} scores all items of a batch against each other, which one process must hold; "
            "train it without torchrun, with `method` and `ratio` where its tables are too large for one device"
        )
    if get_model(config.model).needs_history and make_optimizer(config) is not None:
        raise ConfigError(
            f"model {config.model!r} reads its tables twice per step, pooled and id by id, and TorchRec would move "
            f"them twice with the {config.embedding_optimizer!r} that steps in backward; set `embedding_optimizer` to "
            "'dense_adam', or train without torchrun"
        )
    device = local_device(device)
    check_device(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with job(device):
        home = None if folder is None else Path(folder)
        with lock(home) if dist.get_rank() == 0 and home is not None else nullcontext():
            dist.barrier()
            run = ShardedRun(
                config,
                data,
                home,
                resume=resume,
                device=device,
                save_model=save_model,
                tensorboard=tensorboard,
                show_progress=show_progress,
                label=label,
            )
            run.kinds = kinds
            outcome = run.run()
            dist.barrier()
            return outcome


class ShardedRun(Run):
    """A run whose tables are sharded over processes, and whose batches are split between them."""

    device: torch.device
    kinds: Kind | str | None = None

    @property
    def writes(self) -> bool:  # type: ignore[override]  # of this process
        """The first process does."""
        return dist.get_rank() == 0

    @property
    def rows(self) -> DataSource:
        """This process's rows."""
        return self.portion

    @cached_property
    def portion(self) -> DataSource:
        """This process's rows."""
        return self.data.portion(dist.get_rank(), dist.get_world_size())

    def resolved_config(self) -> TrainConfig:
        """Rank 0 plans for all: the planner has a time limit, so other processes might find another plan."""
        found = broadcast_json(super().resolved_config().to_dict() if self.writes else None, self.device)
        return TrainConfig.from_dict(found)

    def should_resume(self) -> bool:
        """Whether to resume, as rank 0 finds the folder."""
        found: bool = broadcast_json(
            should_resume(self.folder, self.resume, torchrun=True) if self.writes else None, self.device
        )
        return found

    def build(self) -> CTRModel:
        """The model, its tables on the meta device."""
        return shardable_model(self.config, self.schema, self.data.num_dense)

    def footprint(self, model: CTRModel) -> Footprint:
        """Bytes of the embedding part, one copy of each table."""
        return bytes_of(model)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Moments over the rows of all processes; each reads its own."""
        sums = self.portion.numeric_sums().to(self.device)
        dist.all_reduce(sums)
        return moments_of(sums.cpu())

    def placed(self, model: CTRModel) -> Any:
        """The model, its tables sharded over the processes."""
        return shard(model, cast(Any, self.kinds), device=self.device)

    def facts(self, trained: Any) -> dict[str, Any]:
        """The number of processes and the placement of the tables."""
        return {"world_size": dist.get_world_size(), "sharding": placement(trained)}

    def train(self, trained: Any, going_on: bool) -> TrainResult:
        """Train on this process's rows."""
        return ShardedTrainer(
            trained,
            self.portion,
            self.config,
            home=self.folder,
            resume=going_on,
            device=self.device,
            identity=self.identity,
            **self.options,
        ).run()

    def save(self, folder: Path, trained: Any, footprint: Footprint) -> None:
        """Write a sharded checkpoint of the model, and one file of it where that fits into memory."""
        save(folder / MODEL, trained, extra={"config": self.config.to_dict(), **self.identity})
        if self.writes and footprint.weights <= SINGLE_LIMIT:
            single = model_from_config(self.config, self.schema, self.data.num_dense)
            to_single(folder / MODEL, single, states=False)
            super().save(folder, single, footprint)
        elif self.writes:
            print(
                f"recsys-embed: {format_bytes(footprint.weights)} of weights stay in {folder / MODEL}; "
                "recsys_embed.sharding.to_single reads them where they fit",
                flush=True,
            )


def shardable_model(config: TrainConfig, schema: Schema, num_dense: int) -> CTRModel:
    """The model of :func:`recsys_embed.train.run.model_from_config`, its tables on the meta device until sharding.

    >>> import recsys_embed as rse
    >>> model = shardable_model(TrainConfig("dcnv2"), rse.Schema([rse.FeatureSpec("C1", 10, 16)]), num_dense=3)
    >>> type(model.embedding).__name__, [p.device.type for n, p in model.named_parameters() if ".ec." in n]
    ('ShardableCollection', ['meta'])
    """

    def collection(
        part: Schema, plan: Plan, *, optimizer: FusedOptimizer | None, seed: int, **_: object
    ) -> ShardableCollection:
        # Every feature has one id per sample; looked up by id, a row that a batch reads repeatedly is sent once.
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
    """Bytes of the embedding part, one copy of each table; parameters with ordinary gradients have Adam's moments."""
    total = model.footprint()
    for coll in collections_of(model):
        whole = coll.optimizer is None
        ordinary = sum(p.nbytes for n, p in coll.named_parameters() if not n.startswith(("readers.", "by_bag.ebc.")))
        tables = sum(4 * t.rows * t.width for t in coll.tables.values() if not t.dense) if whole else 0
        total += Footprint(optimizer=2 * (ordinary + tables), gradient=tables)
    return total


def placement(sharded: Any) -> dict[str, dict[str, Any]]:
    """TorchRec's placement of every table, by module path and table: sharding type, compute kernel and ranks."""
    return {
        path: {
            table: {"kind": str(p.sharding_type), "kernel": str(p.compute_kernel), "ranks": list(p.ranks or [])}
            for table, p in tables.items()
        }
        for path, tables in sharded.plan.plan.items()
    }
