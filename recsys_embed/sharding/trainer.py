"""The training loop on several processes: the same settings, the same steps, every sample once."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel

from recsys_embed.core import hashing
from recsys_embed.data.batch import Batch
from recsys_embed.data.data_source import BatchStream, DataSource
from recsys_embed.errors import CheckpointError, ConfigError, DataError
from recsys_embed.registry import with_current_names
from recsys_embed.sharding.checkpoint import find, load, save
from recsys_embed.sharding.checkpoint_tensors import CheckpointTensor, weight_tensors
from recsys_embed.sharding.optimizers import Optimizers, collection_paths, table_named
from recsys_embed.sharding.process_group import global_metrics
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.driver import CHECKPOINTS
from recsys_embed.train.evaluation import update
from recsys_embed.train.loop import Trainer
from recsys_embed.train.loss import explain, loss_of, wrong_labels
from recsys_embed.train.losses import LOSSES
from recsys_embed.train.metrics import Metrics
from recsys_embed.train.run_state import RunState
from recsys_embed.train.stop_request import StopRequest
from recsys_embed.utils.evaluation_mode import evaluation_mode

BEST = "best"
AGREE_EVERY = 32
"""Evaluation batches between two checks whether any process was asked to stop."""


class PaddedBatches:
    """Batches of this rank's portion, padded with empty ones to the largest portion: all ranks run the same steps."""

    def __init__(self, batches: BatchStream, steps: int, empty: Batch) -> None:
        self.batches, self.steps, self.empty = batches, steps, empty

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        made = 0
        for batch in self.batches:
            made += 1
            yield batch
        for _ in range(self.steps - made):
            yield self.empty


def batch_sizes(batch_size: int, world: int) -> list[int]:
    """Batch size of each process.

    >>> batch_sizes(10, 4)
    [2, 3, 2, 3]
    """
    return [batch_size * (r + 1) // world - batch_size * r // world for r in range(world)]


class ShardedTrainer(Trainer):
    """Trains a sharded model with what :class:`recsys_embed.train.Trainer` takes; every process makes one.

    ``batch_size`` is that of all processes together; the loss of a step is the mean over all its samples.

    Args:
        model: of :func:`recsys_embed.sharding.shard`.
        data: this process's rows.
        config: settings.
        home: run folder, the same in all processes; None keeps nothing.
        resume, device, identity, tensorboard, show_progress, label: as there.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        data: DataSource,
        config: TrainConfig,
        *,
        home: Path | None = None,
        device: torch.device,
        show_progress: bool | None = None,
        **options: Any,
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.home = home
        self.rows_by_rank = {split: _gather_numbers(data.rows(split), device) for split in sorted(data.splits)}
        lists = getattr(data, "num_lists", 0)
        self.empty = Batch.empty(data.num_dense, len(data.schema(1)) - lists, lists).to(device)
        self.stop: StopRequest | None = None
        self.best_tensors: list[tuple[CheckpointTensor, list[Tensor]]] = []
        if config.batch_size < self.world:
            raise ConfigError(f"`batch_size` must be at least {self.world}, the number of processes")
        first = self.rank == 0
        super().__init__(
            model,
            data,
            config,
            folder=home if first else None,
            device=device,
            show_progress=show_progress if first else False,
            **options,
        )

    # -- optimizers -----------------------------------------------------------------------------------------------

    def _dense_optimizer(self) -> tuple[torch.optim.Adam, list[nn.Parameter]]:
        sharded: Any = self.model
        c, tables = self.config, set()
        owners = collection_paths(sharded)
        for name, parameter in sharded.named_parameters():
            with contextlib.suppress(KeyError):
                table_named(name, owners)
                tables.add(id(parameter))

        def adam(params: list[nn.Parameter]) -> torch.optim.Adam:
            groups: list[dict[str, Any]] = [
                {"params": [p for p in params if id(p) not in tables], "peak": c.learning_rate,
                 "weight_decay": c.weight_decay},
                {"params": [p for p in params if id(p) in tables], "peak": self.table_lr,
                 "weight_decay": c.embedding_weight_decay},
            ]  # fmt: skip
            return torch.optim.Adam([g for g in groups if g["params"]], lr=c.learning_rate)

        self.optimizers = Optimizers(sharded, adam)
        made = self.optimizers.dense
        if not isinstance(made, torch.optim.Adam):
            raise ConfigError("a model without dense parameters needs no training loop of this kind")
        return made, [p for p in self.optimizers.dense_parameters if id(p) not in tables]

    def _apply_gradients(self) -> None:
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.dense, self.config.clip_norm)
        self.optimizers.step()
        self.optimizers.zero_grad()

    def _set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if self.fused:
            self.optimizers.table_lr = self.table_lr * factor

    # -- data -----------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int, start: int) -> PaddedBatches:
        c = self.config
        sizes = batch_sizes(c.batch_size, self.world)
        steps = max(-(-n // size) for n, size in zip(self.rows_by_rank["train"], sizes, strict=True))
        batches = self.data.batches(
            "train",
            sizes[self.rank],
            shuffle=c.shuffle,
            seed=c.seed,
            epoch=epoch,
            device=self.device,
            start_batch=start,
        )
        return PaddedBatches(batches, max(0, steps - start), self.empty)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _train(self, stop: StopRequest) -> None:
        self.stop = stop
        if self._resumed_rng is None:
            # Processes see different samples, so each needs its own random numbers for dropout.
            torch.manual_seed(hashing.salt(self.config.seed, "process", str(self.rank)) >> 1)
        super()._train(stop)

    def _everywhere(self, holds: bool) -> bool:
        flag = torch.tensor(float(holds), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def _step(self, batch: Any) -> float:
        state = self.state
        self._set_rates(self.schedule.factor(state.step))
        loss = loss_of(self.model, batch, "sum", self.config.loss)
        votes = float(self.stop is not None and self.stop.requested)
        wrong = 0.0 if self._labels_known or LOSSES[self.config.loss].real_labels else float(wrong_labels(batch.label))
        totals = torch.tensor([float(loss.detach()), batch.label.numel(), votes, wrong], dtype=torch.float64)
        totals = totals.to(self.device)
        dist.all_reduce(totals)
        total, count, stopping, wrong = totals.tolist()
        value = total / count
        if wrong or not math.isfinite(value):
            raise self._explained(value, batch)
        # DistributedModelParallel averages gradients over processes; `world` turns that into a sum.
        (loss * (self.world / count)).backward()
        self._apply_gradients()
        if stopping and self.stop is not None:
            self.stop.requested = True
        state.step, state.batch = state.step + 1, state.batch + 1
        state.loss_sum, state.loss_count = state.loss_sum + value, state.loss_count + 1
        state.samples += int(count)
        state.seconds += time.perf_counter() - self._clock
        return value

    def _explained(self, value: float, batch: Any) -> Exception:
        """The error for a loss that is not finite; the same kind in all processes, whoever's rows are the cause."""
        mine = explain(value, batch, self.model, self.config, self.state.step, self.state.epoch)
        found: list[str | None] = [None] * self.world
        dist.all_gather_object(found, str(mine) if isinstance(mine, DataError) else None)
        causes = [f"process {rank}: {text}" for rank, text in enumerate(found) if text is not None]
        return DataError(causes[0]) if causes else mine

    def _leaves_one_row(self) -> bool:
        """Refuse batch normalisation where a process would meet a batch of fewer than two rows."""
        sizes = batch_sizes(self.config.batch_size, self.world)
        rows = self.rows_by_rank["train"]
        steps = max(-(-n // size) for n, size in zip(rows, sizes, strict=True))
        last = [n - (steps - 1) * size for n, size in zip(rows, sizes, strict=True)]
        if min(*sizes, *last) < 2:
            raise ConfigError(
                "batch normalisation needs two rows or more in every training batch of every process; with "
                f"`batch_size` {self.config.batch_size} the processes' last batches have "
                f"{', '.join(str(max(0, n)) for n in last)} rows; choose another `batch_size`, or build the model "
                "without `batch_norm`"
            )
        return False

    @torch.no_grad()
    def evaluate(self, split: str, stop: StopRequest | None = None) -> Metrics | None:
        """Metrics over the whole split, the same in all processes; None when one of them was asked to stop."""
        size = -(-self.config.eval_batch_size // self.world)
        steps = max(-(-n // size) for n in self.rows_by_rank[split])
        batches = self.data.batches(split, size, shuffle=False, device=self.device)
        sums = LOSSES[self.config.loss].metrics()
        with evaluation_mode(self.model):
            for number, batch in enumerate(PaddedBatches(batches, steps, self.empty)):
                if number % AGREE_EVERY == 0 and self._agree(stop):
                    return None
                update(sums, self.model, batch, split)
        return None if self._agree(stop) else global_metrics(sums, self.device)

    def _agree(self, stop: StopRequest | None) -> bool:
        """Whether any process was asked to stop; then all are."""
        votes = torch.tensor([float(stop is not None and stop.requested)], device=self.device)
        dist.all_reduce(votes)
        if stop is not None and bool(votes > 0):
            stop.requested = True
        return bool(votes > 0)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _keep_best(self) -> None:
        if self.home is not None:
            save(self.home / BEST, self.model, extra={"identity": self.identity})
            return
        self.best_tensors = [(item, _copies(item.value)) for item in weight_tensors(self.model)]

    def _load_best(self) -> None:
        if self.home is not None:
            load(self.home / BEST, self.model)
            return
        for item, copies in self.best_tensors:
            for held, copy in zip(_local_tensors(item.value), copies, strict=True):
                held.copy_(copy)

    def _checkpoint_due(self) -> bool:
        # By steps, not by time: clocks differ between processes.
        return self._due(self.config.checkpoint_every)

    def _checkpoint(self) -> None:
        if self.home is None:
            return
        self.state.log_bytes = self.log.flush()
        # As text: the best AUC so far may be minus infinity, which is not valid JSON.
        run = json.dumps({"state": self.state.to_dict(), "schedule": self.schedule.state_dict()})
        extra = {"identity": self.identity, "run": run}
        save(self.home / CHECKPOINTS, self.model, self.optimizers, extra=extra, beside=self._random())

    def _restore(self) -> None:
        if self.home is None:
            raise ConfigError("resuming needs a run folder")
        at, meta = find(self.home / CHECKPOINTS)
        saved = with_current_names(meta["extra"]["identity"])
        mine = with_current_names(json.loads(json.dumps(self.identity)))
        differing = [k for k in sorted({*saved, *mine}) if saved.get(k) != mine.get(k)]
        if differing:
            raise CheckpointError(
                f"checkpoint {at} was made with other settings; use those, or start in another folder: "
                + ", ".join(f"{k}: checkpoint {saved.get(k)!r}, this run {mine.get(k)!r}" for k in differing)
            )
        random = self._random()
        extra = load(self.home / CHECKPOINTS, self.model, self.optimizers, beside=random)
        run = json.loads(extra["run"])
        self.schedule.load_state_dict(run["schedule"])
        self.state = RunState.from_dict(run["state"])
        self._resumed_rng = {name.rsplit("/", 1)[1]: values for name, values in random.items()}

    def _random(self) -> dict[str, Tensor]:
        """States of this process's random generators, for a resume with the same number of processes."""
        states = {f"random/{self.rank}/{self.world}/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states[f"random/{self.rank}/{self.world}/cuda"] = torch.cuda.get_rng_state(self.device)
        return states


def _gather_numbers(number: int, device: torch.device) -> list[int]:
    """All-gather one integer per process."""
    found = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    found[dist.get_rank()] = number
    dist.all_reduce(found)
    return found.tolist()


def _local_tensors(value: Any) -> list[Tensor]:
    return [s.tensor for s in value.local_shards()] if hasattr(value, "local_shards") else [value]


def _copies(value: Any) -> list[Tensor]:
    return [held.detach().clone() for held in _local_tensors(value)]
