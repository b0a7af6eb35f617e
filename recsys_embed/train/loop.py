"""The training loop for any CTR model and data set on one device; a stopped run resumes bit-exactly."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.data.batch import Batch
from recsys_embed.data.checks import need_parts, no_weight
from recsys_embed.data.data_source import BatchSource, BatchStream, DataSource
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.models import RetrievalModel
from recsys_embed.models.base import CTRModel
from recsys_embed.train.batch_norm import LastRowJoined, leaves_one_row, need_two_rows, normalises_batches
from recsys_embed.train.catalogue import learn_items
from recsys_embed.train.checkpoint import CheckpointTimer, set_rng_state
from recsys_embed.train.config import DENSE_ADAM, TrainConfig
from recsys_embed.train.evaluation import evaluate
from recsys_embed.train.inputs import check_rows
from recsys_embed.train.loss import explain, loss_of, wrong_labels
from recsys_embed.train.losses import LOSSES, loss_args
from recsys_embed.train.metrics import Metrics
from recsys_embed.train.result import DivergedError, TrainResult
from recsys_embed.train.resumable import BEST, CHECKPOINT, Resumable
from recsys_embed.train.retrieval_losses import warn_of_large
from recsys_embed.train.retrieval_metrics import Seen
from recsys_embed.train.rounded_rows import rounded_rows
from recsys_embed.train.run_log import RunLog, progress_bar
from recsys_embed.train.run_state import RunState
from recsys_embed.train.schedule import Schedule
from recsys_embed.train.stop_request import Interrupted, StopRequest
from recsys_embed.utils.files import drop_leftovers
from recsys_embed.utils.types import JSON

__all__ = ["BEST", "CHECKPOINT", "BatchSource", "DivergedError", "TrainResult", "Trainer", "evaluate"]


def _length(batches: object, data: BatchSource) -> int:
    if not isinstance(batches, Sized):
        raise ConfigError(
            f"`batches` of {type(data).__name__} must return an iterable with len(), the number of batches of the "
            f"epoch; got {type(batches).__name__}"
        )
    return len(batches)


class Trainer(Resumable):
    """Trains one model by one :class:`TrainConfig`.

    Args:
        model: built with the fused optimizer the settings name, or without one for ``dense_adam``.
        data: splits ``train``, and ``valid`` and ``test`` where they exist.
        config: settings. Where their loss compares items and the model has counted none, it takes them from the
            training rows first.
        folder: run folder for checkpoints and logs; None keeps everything in memory. A process killed at any moment
            loses what it did after its last checkpoint: the step or validation at work and, unless the settings say
            how many steps lie between checkpoints, at most a second or twenty times what writing one takes.
        resume: go on from the folder's checkpoint.
        tensorboard: write TensorBoard events too.
        show_progress: a bar on standard error; None: only on a terminal.
        label: text beside the bar.
        identity: what else, besides the settings, a checkpoint must agree on, e.g. a fingerprint of the data.

    Raises:
        CheckpointError: the folder's checkpoint is absent, damaged or of other settings.
        ConfigError: batch normalisation over batches of one row; features of the user that tell the item.
        DataError: no training rows, or labels and numeric values that cannot be trained on.
    """

    def __init__(
        self,
        model: CTRModel,
        data: BatchSource,
        config: TrainConfig,
        *,
        folder: Path | None = None,
        resume: bool = False,
        tensorboard: bool = False,
        device: torch.device | str | None = None,
        show_progress: bool | None = None,
        label: str = "train",
        identity: JSON | None = None,
    ) -> None:
        self.model, self.data, self.config, self.folder = model, data, config, folder
        self.identity = {**config.to_dict(), **(identity or {})}
        self.device = torch.device("cpu" if device is None else device)
        self.label, self.show_progress = label, show_progress
        self.fused = config.embedding_optimizer != DENSE_ADAM
        self.table_lr = config.embedding_learning_rate or config.learning_rate
        self._labels_known, self._any_label = check_rows(data, config), LOSSES[config.loss].real_labels
        self.loss_args, self._seen = loss_args(config.loss, config.loss_args), cast("Seen", {})
        if not resume and LOSSES[config.loss].of_queries is not None:
            self._learn_items()
        if config.loss == "softmax" and isinstance(model, RetrievalModel):
            warn_of_large(model)
        self._norms = normalises_batches(model)
        self._joins_last_row = self._norms and self._leaves_one_row()
        self.optimizer, self.dense = self._dense_optimizer()
        if config.clip_norm is not None:
            for tables in model.collections().values():
                if isinstance(tables, EmbeddingCollection):
                    tables.expect_changed_gradients()
        self.steps_per_epoch = _length(self._epoch(0, 0), data)
        if self.steps_per_epoch == 0:
            raise DataError("no training samples: the split 'train' is empty")
        self.total_steps = self.steps_per_epoch * config.epochs
        if config.steps is not None:
            self.total_steps = min(self.total_steps, config.steps)
        self.schedule = Schedule(config, self.total_steps)
        self.state = RunState()
        self.best_weights: dict[str, Any] | None = None
        self._resumed_rng: dict[str, Tensor] | None = None
        if folder is not None:
            drop_leftovers(folder)
        if resume:
            self._restore()
        self.log = RunLog(folder, tensorboard=tensorboard, keep_bytes=self.state.log_bytes, step=self.state.step)

    def _learn_items(self) -> None:
        """Take the items from the training rows, where the model has not learned them yet."""
        model = self.model
        if isinstance(model, RetrievalModel) and not model.item_counts.any():
            learn_items(model, cast("DataSource", self.data))

    def _dense_optimizer(self) -> tuple[torch.optim.Adam, list[nn.Parameter]]:
        tables = {id(c.get_parameter(name)) for c in self.model.collections().values() for name in c.storages}
        params = self.model.trainable()
        dense = [p for p in params if self.fused or id(p) not in tables]
        groups: list[dict[str, Any]] = [
            {"params": dense, "peak": self.config.learning_rate, "weight_decay": self.config.weight_decay}
        ]
        if not self.fused:
            rows = [p for p in params if id(p) in tables]
            decay = self.config.embedding_weight_decay
            groups.append({"params": rows, "peak": self.table_lr, "weight_decay": decay})
        groups = [g for g in groups if g["params"]]
        return torch.optim.Adam(groups, lr=self.config.learning_rate, fused=self.device.type in ("cpu", "cuda")), dense

    def _epoch(self, epoch: int, start: int) -> BatchStream:
        """Batches of an epoch from the one with index ``start`` on."""
        c = self.config
        batches = self.data.batches(
            "train",
            c.batch_size,
            shuffle=c.shuffle,
            seed=c.seed,
            epoch=epoch,
            device=self.device,
            start_batch=start,
        )
        return LastRowJoined(batches) if self._joins_last_row else batches

    def _leaves_one_row(self) -> bool:
        return leaves_one_row(self.data, self.config.batch_size)

    def run(self) -> TrainResult:
        """Train to the end of the settings, then load the best weights and evaluate.

        Raises:
            DataError: a batch whose labels are not 0 and 1, or whose numeric values are NaN or infinite.
            DivergedError: the loss is no longer finite, for another reason.
            Interrupted: SIGINT or SIGTERM; the checkpoint is written and the text says how to go on.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), StopRequest() as stop:
                torch.manual_seed(self.config.seed)
                if self._resumed_rng is not None:
                    set_rng_state(self._resumed_rng, self.device)
                self._train(stop)
                return self._finish(stop)
        finally:
            self.log.close()

    def _finished(self) -> bool:
        return self.state.stopped or self.state.step >= self.total_steps

    def _train(self, stop: StopRequest) -> None:
        state = self.state
        self._cadence = CheckpointTimer(sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers())))
        self.model.train()
        bar = progress_bar(self.total_steps, self.label, state.step, self.show_progress)
        with contextlib.closing(bar):
            if state.pending_validation:
                self._validate(stop)
            while not self._finished():
                before = state.step
                for batch in self._timed(iter(self._epoch(state.epoch, state.batch))):
                    loss = self._step(batch)
                    bar.update(1)
                    if state.step % self.config.log_every == 0:
                        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                        self._log_train()
                    epoch_ends = self._advance()
                    if stop.requested:
                        self._interrupt()
                    # Before a validation too: it may take long, and its own checkpoint comes at its end.
                    if self._checkpoint_due() or (self._finished() and not state.pending_validation):
                        self._checkpoint()
                    if state.pending_validation:
                        self._validate(stop)
                    if epoch_ends or self._finished():
                        break
                if state.step == before:
                    raise DataError(
                        f"the split 'train' gave fewer than its {self.steps_per_epoch} batches in epoch {state.epoch}"
                    )

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _checkpoint_due(self) -> bool:
        if self.config.checkpoint_every is not None:
            return self._due(self.config.checkpoint_every)
        return self.folder is not None and self._cadence.due()

    def _advance(self) -> bool:
        """Advance the position by one batch and mark a due validation; True at the end of an epoch."""
        state = self.state
        epoch_ends = state.batch >= self.steps_per_epoch
        if epoch_ends:
            state.epoch, state.batch = state.epoch + 1, 0
        state.pending_validation = epoch_ends or state.step >= self.total_steps or self._due(self.config.eval_every)
        return epoch_ends

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches, adding the time from asking for one to asking for the next to ``state.seconds``."""
        while True:
            self._clock = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if self.state.batch == 0:
                need_parts(batch, type(self.data).__name__)
                if self.state.step == 0:
                    self._need_weights(batch)
            yield batch

    def _need_weights(self, first: Batch) -> None:
        """Refuse rows that all have weight 0; the others are read only where the first batch's all have."""
        if self._everywhere(no_weight(first)) and self._everywhere(all(map(no_weight, self._epoch(0, 0)))):
            raise DataError(
                "the `weight` of every training row is 0, so nothing can be learned: correct the weights, or convert "
                "the table without that column"
            )

    def _everywhere(self, holds: bool) -> bool:
        """Whether something holds in all processes."""
        return holds

    def _step(self, batch: Batch) -> float:
        state = self.state
        self._set_rates(self.schedule.factor(state.step))
        if self._norms:
            need_two_rows(batch)
        loss = loss_of(self.model, batch, loss=self.config.loss, args=self.loss_args)
        if self._labels_known or self._any_label:
            value, wrong = float(loss.detach()), 0.0
        else:
            value, wrong = torch.stack(
                (loss.detach(), wrong_labels(batch.label, self.config.loss).to(loss.dtype))
            ).tolist()
        if wrong or not math.isfinite(value):
            raise explain(value, batch, self.model, self.config, state.step, state.epoch)
        loss.backward()
        self._apply_gradients()
        state.step, state.batch = state.step + 1, state.batch + 1
        state.loss_sum, state.loss_count = state.loss_sum + value, state.loss_count + 1
        state.samples += int(batch.label.numel())
        state.seconds += time.perf_counter() - self._clock
        return value

    def _apply_gradients(self) -> None:
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.dense, self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if self.fused:
            self.model.embedding_lr = self.table_lr * factor

    def _log_train(self) -> None:
        state = self.state
        self.log.write(
            "train",
            state.step,
            epoch=state.epoch,
            loss=state.loss_sum / max(1, state.loss_count),
            lr=self.optimizer.param_groups[0]["lr"],
        )
        state.loss_sum, state.loss_count = 0.0, 0

    def _validate(self, stop: StopRequest) -> None:
        state = self.state
        if "valid" not in self.data.splits:
            state.pending_validation = False
            self._checkpoint()
            return
        metrics = self.evaluate("valid", stop)
        if metrics is None:
            self._interrupt()
            return
        self.schedule.on_validation(metrics.score)
        if not state.history:
            self._say_one_class("valid", metrics, "; the best weights, patience and plateaus go by its logloss")
        values = metrics.logged()
        best = state.note_validation(values, metrics.score, self.config.patience, self.config.min_delta)
        self.log.write("valid", state.step, epoch=state.epoch, **values)
        # No copy at the end of a run, because nothing overwrites the last weights.
        if best and self.config.keep_best and not self._finished():
            self._keep_best()
        self._checkpoint()

    def evaluate(self, split: str, stop: StopRequest | None = None) -> Metrics | None:
        """Metrics on a split of the run's data; None when ``stop`` asked to end early."""
        return evaluate(
            self.model,
            self.data,
            split,
            batch_size=self.config.eval_batch_size,
            device=self.device,
            stop=stop,
            loss=self.config.loss,
            top_k=self.config.top_k,
            exclude_seen=self.config.exclude_seen,
            seen=self._seen,
        )

    def _say_one_class(self, split: str, metrics: Metrics, then: str = "") -> None:
        if math.isnan(metrics.auc) and metrics.rmse is None and metrics.recall is None:
            kind = "positive" if metrics.positives else "negative"
            warnings.warn(
                f"all {metrics.samples:,} rows of the split {split!r} are {kind}, and AUC needs both classes{then}. "
                "Choose rows of both, e.g. by a larger split or by shuffling the input before it is split",
                stacklevel=2,
            )

    def _finish(self, stop: StopRequest) -> TrainResult:
        state = self.state
        if self.config.keep_best and state.history and state.best_step != state.step:
            self._load_best()
        results: dict[str, Metrics | None] = {}
        with rounded_rows(self.model):
            for split in ("valid", "test"):
                results[split] = self.evaluate(split, stop) if split in self.data.splits else None
                if stop.requested:
                    # The checkpoint of the last step is written, and the weights in memory may be older, better ones.
                    raise Interrupted(self._resume_hint())
        if (test := results["test"]) is not None:
            self._say_one_class("test", test)
            self.log.write("test", state.step, **test.logged())
        return TrainResult(
            test=test,
            valid=results["valid"],
            steps=state.step,
            best_step=state.best_step if state.history and self.config.keep_best else state.step,
            samples_per_s=state.samples / max(state.seconds, 1e-9),
            seconds=state.seconds,
            history=state.history,
        )

    def _interrupt(self) -> None:
        self._checkpoint()
        raise Interrupted(self._resume_hint())

    def _resume_hint(self) -> str:
        where = f"stopped at step {self.state.step} of {self.total_steps}"
        if self.folder is None:
            return f"{where}; nothing was kept, as the run has no folder"
        return f"{where}; checkpoint in {self.folder}: run the same command with --resume to go on"
