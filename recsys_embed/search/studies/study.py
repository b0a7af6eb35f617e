"""Studies: Optuna searches over method, size and width. A trial is a training run without the test split."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from recsys_embed.data.folder import lock
from recsys_embed.errors import BudgetError, CheckpointError
from recsys_embed.models import CTRModel
from recsys_embed.search.studies.open_study import KEY, OpenStudy
from recsys_embed.search.studies.queue import requeue, requeue_lost, take, try_take
from recsys_embed.search.studies.trial import ReportingTrainer, key_of
from recsys_embed.train.build import model_from_config, standardise
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.inputs import fingerprint
from recsys_embed.train.result import DivergedError, TrainResult
from recsys_embed.train.resumable import CHECKPOINT
from recsys_embed.train.stop_request import Interrupted

LEAST_PEERS = 4
"""Fewest trials of at most as many bytes that pruning compares a trial with."""
_BEAT = 60.0


class MethodStudy(OpenStudy):
    """A study of methods on one data set, open for work.

    Args:
        config: settings of every training; method ``full``, no budget.
        data: opened data set with splits ``train`` and ``valid``.
        settings: of the study.
        storage: URL or file, see :func:`recsys_embed.search.studies.storage.open_storage`.
        device: e.g. ``"cuda"``; None: CPU.
        must_exist: the study must exist already; a missing storage is then an error.
        folder: of this study alone, for checkpoints of running trials: a trial whose process was killed resumes from
            them; None: it restarts. All processes of a machine must name the same folder.

    Raises:
        ConfigError: settings or data that cannot produce a result.
        BudgetError: a budget below the smallest plan.
        CheckpointError: the storage holds a study of another space or other data.
        StorageError: the storage cannot be used.
    """

    def work(self, on_trial: Callable[[optuna.trial.FrozenTrial, int, int], None] | None = None) -> int:
        """Train queued trials until none is left, and return how many; other processes may work beside this one.

        Raises:
            Interrupted: SIGINT or SIGTERM; the trial is queued again.
            CheckpointError: the trial's is damaged or cannot be written; the trial is queued again.
            StorageError: the storage is gone or locked.
        """
        done = 0
        with self.guarded():
            while True:
                with nullcontext() if self.folder is None else lock(self.folder, wait=True):
                    requeue_lost(self.study, self.storage)
                    trial = take(self.study, self.storage)
                if trial is None:
                    return done
                self._one(trial)
                done += 1
                if on_trial is not None:
                    every = self.study.get_trials(deepcopy=False)
                    left = sum(t.state in (TrialState.WAITING, TrialState.RUNNING) for t in every)
                    on_trial(every[trial.number], len(every) - left, len(every))

    def _one(self, trial: optuna.Trial) -> None:
        params = self._draw(trial)
        state, values = TrialState.COMPLETE, None
        try:
            with self._beating(trial):
                values = self._objectives(trial, params)
        except BudgetError as e:
            state = TrialState.PRUNED
            trial.set_user_attr("reason", f"not trained: {e}")
        except optuna.TrialPruned as e:
            state = TrialState.PRUNED
            trial.set_user_attr("reason", str(e))
        except DivergedError as e:
            state = TrialState.PRUNED
            trial.set_user_attr("reason", f"diverged: {e}")
        except (Interrupted, KeyboardInterrupt, CheckpointError):
            requeue(self.storage, trial._trial_id)
            raise
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # no heartbeat for too long: another worker requeued the trial
        except (optuna.exceptions.OptunaError, OSError):
            raise  # the storage failed: without a heartbeat the trial is requeued
        except Exception as e:
            # A trial that would fail again is not requeued.
            trial.set_user_attr("reason", f"{type(e).__name__}: {e}")
            self._tell(trial, None, TrialState.FAIL)
            raise
        self._tell(trial, values, state)

    def _tell(self, trial: optuna.Trial, values: list[float] | None, state: TrialState) -> None:
        # Another worker may have requeued the trial while this process slept; it is finished nevertheless.
        try_take(self.storage, trial._trial_id)
        self.study.tell(trial, values, state=state, skip_if_finished=True)
        # After the result is stored, so that a kill in between loses no training.
        self.training_folders.forget(trial.user_attrs.get(KEY))

    def sweep(self) -> None:
        """Remove checkpoints of finished trials, which processes left that were killed just before their end."""
        with self.guarded():
            going = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        self.training_folders.sweep({str(t.user_attrs.get(KEY)) for t in going})

    @contextmanager
    def _beating(self, trial: optuna.Trial) -> Iterator[None]:
        """Say now and then that the trial is at work, for workers on other machines."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(_BEAT):
                # A storage that fails now says so at the trial's next write; one that was busy gets the next beat.
                with suppress(Exception):
                    self.storage.set_trial_user_attr(trial._trial_id, "seen", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # -- a trial --------------------------------------------------------------------------------------------------

    def _objectives(self, trial: optuna.Trial, params: Mapping[str, Any]) -> list[float]:
        config = self.training_config(params, full=False)
        size = self.bytes(config)
        trial.set_user_attr("bytes", size)
        # Other parameters may mean the same plan, as a width does to methods that take none, and samplers come back.
        key = key_of(config)
        for twin in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if twin.user_attrs.get(KEY) == key:
                trial.set_user_attr("reason", f"not trained again: the plan is that of trial {twin.number}")
                return list(twin.values)
        trial.set_user_attr(KEY, key)
        model, result = self.train(config, lambda step, value: self._report_or_prune(trial, step, value, size))
        found = {self.quality.key: self.quality.of(result.valid), "bytes": float(size)}
        if "latency" in self.settings.objectives:
            found["latency"] = self._latency(model)
        return [found[o] for o in self.settings.objectives]

    def train(
        self, config: TrainConfig, on_validation: Callable[[int, float], None] = lambda step, value: None
    ) -> tuple[CTRModel, TrainResult]:
        """Train and validate, never test; a killed training resumes from its checkpoint."""
        model = model_from_config(config, self.schema, self.data.num_dense, self.device)
        standardise(model, config, self.data)
        with self.training_folders.place(key_of(config)) as folder:
            trainer = ReportingTrainer(
                model, self.data, config, folder=folder, resume=folder is not None and (folder / CHECKPOINT).exists(),
                device=self.device, show_progress=False, identity={"data": fingerprint(self.schema, self.data)},
            )  # fmt: skip
            trainer.on_validation, trainer.quality = on_validation, self.quality
            return model, trainer.run()

    def _report_or_prune(self, trial: optuna.Trial, step: int, value: float, size: int) -> None:
        curve = dict(trial.user_attrs.get("curve", {}))
        if str(step) not in curve:  # a killed worker may have reported it
            if len(self.settings.objectives) == 1:  # Optuna keeps intermediate values of single objectives only
                trial.report(value, step)
            trial.set_user_attr("curve", curve | {str(step): value})
        if not self.settings.prune:
            return
        peers = [
            t.user_attrs["curve"][str(step)]
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
            if str(step) in t.user_attrs.get("curve", {}) and t.user_attrs["bytes"] <= size
        ]
        score, label = self.quality.score, self.quality.label
        if len(peers) >= LEAST_PEERS and score(value) < score(statistics.median(peers)):
            side = "below" if self.quality.rises else "above"
            raise optuna.TrialPruned(
                f"stopped at step {step}: {label} {value:.4f} is {side} {statistics.median(peers):.4f}, the median of "
                f"{len(peers)} trials of at most as many bytes"
            )

    @torch.no_grad()
    def _latency(self, model: CTRModel) -> float:
        batch = next(iter(self.data.batches("valid", 512, shuffle=False, device=self.device)))
        collection = next(iter(model.collections().values()))
        times = []
        for _ in range(25):
            begin = time.perf_counter()
            collection(batch.inputs)
            if batch.ids.is_cuda:
                torch.cuda.synchronize(batch.ids.device)
            times.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(times[5:])
