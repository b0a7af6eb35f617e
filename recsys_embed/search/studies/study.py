"""Studies: Optuna searches over method, size and width, each trial a training that is judged without the test rows."""

from __future__ import annotations

import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from recsys_embed.data.folder import StorageError, lock
from recsys_embed.errors import BudgetError, CheckpointError, ConfigError
from recsys_embed.features import Schema
from recsys_embed.models import CTRModel, get_model
from recsys_embed.plan import Plan
from recsys_embed.planning.planner import plan_for_budget
from recsys_embed.search.common import need_validation
from recsys_embed.search.folder import differences
from recsys_embed.search.retrain import planned
from recsys_embed.search.studies.queue import fill, put_back, requeue_lost, retake, take
from recsys_embed.search.studies.samplers import make_sampler
from recsys_embed.search.studies.settings import OBJECTIVES, StudySettings
from recsys_embed.search.studies.space import LEAST_SHARE, StudySpace, read_budget, study_methods
from recsys_embed.search.studies.storage import faults_of, open_storage
from recsys_embed.search.studies.trial import Hopeless, Trainings, Untested, Watched, key_of
from recsys_embed.search.studies.urls import shown
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.loop import CHECKPOINT, DivergedError, TrainResult
from recsys_embed.train.run import LINEAR_METHOD, fingerprint, model_from_config, plans_for, schema_of
from recsys_embed.train.stop_request import Interrupted

NAME = "methods"
TRAININGS = "trainings"
LEAST_PEERS = 4
"""Trials of at most as many bytes that must have come as far before one is stopped by comparison with them."""
_IDENTITY, _READY, _KEY = "identity", "ready", "training"
_MAKING = 300
"""Tenths of a second after which whoever began to make a study is taken for lost."""
_BEAT = 60.0


class MethodStudy:
    """A study of methods on one data set, open for work.

    Args:
        config: settings of every training; method ``full``, no budget.
        data: opened data set with splits ``train`` and ``valid``.
        settings: of the study.
        storage: URL or file, see :func:`recsys_embed.search.studies.storage.open_storage`.
        device: e.g. ``"cuda"``; None: CPU.
        there: the study was made before; a storage that is gone is then an error.
        folder: of this study alone, for checkpoints of trials that are not over, so that one whose process was killed
            goes on as any training does; None: it begins anew. All processes of a machine are to name the same.

    Raises:
        ConfigError: settings or data that come to nothing.
        BudgetError: a budget below the smallest plan.
        CheckpointError: the storage holds a study of another space or other data.
        StorageError: the storage cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Any,
        settings: StudySettings,
        storage: str,
        *,
        device: torch.device | str | None = None,
        there: bool = False,
        folder: Path | None = None,
    ) -> None:
        if config.method != "full" or config.plan is not None or config.budget is not None or config.ratio is not None:
            raise ConfigError("a study chooses method, plan and budget; leave them out of the training settings")
        need_validation(data)
        self.full_config, self.data, self.settings = config, Untested(data), settings
        self.where, self.device, self.folder = shown(storage), device, folder
        self.trainings = Trainings(None if folder is None else folder / TRAININGS)
        schema = schema_of(data, config)
        cls = get_model(config.model)
        self.schema: Schema = schema if cls.uses_vectors else schema.with_dim(1)
        self._narrow = schema.with_dim(1) if cls.uses_vectors and cls.uses_linear else None
        self.full_bytes = plans_for(schema, config).full_bytes
        self.budgets = {text: read_budget(text, self.full_bytes) for text in settings.budgets}
        room = {text: budget - self._linear_bytes(budget) for text, budget in self.budgets.items()}
        methods = settings.methods or study_methods()
        self.space = StudySpace(self.schema, room, methods, settings.groups, settings.widths)
        self._row_lookup(self._sampler())
        self.storage = open_storage(storage, there=there)
        with self.guarded():
            self.study = self._open(there)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Say what is wrong when the storage is."""
        with faults_of(self.where):
            yield

    def _linear_bytes(self, budget: int) -> int:
        if self._narrow is None:
            return 0
        share = budget // (self.full_config.embedding_dim + 1)
        return Plan.uniform(self._narrow, LINEAR_METHOD, budget=share).footprint(self._narrow).serve

    @cached_property
    def steps(self) -> int:
        """Of a full training."""
        c = self.full_config
        row_lookup = self.data.batches("train", c.batch_size, shuffle=False)
        return min(c.steps or 1 << 62, len(row_lookup) * c.epochs)

    @cached_property
    def config(self) -> TrainConfig:
        """Settings of a trial."""
        s, c = self.settings, self.full_config
        if s.proxy == 1 and not s.prune:
            return c
        steps = max(1, round(self.steps * s.proxy))
        every = max(1, -(-steps // s.validations)) if s.prune else c.eval_every
        return c.replace(steps=steps, eval_every=min(every or steps, c.eval_every or steps))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Of all parameters, in one order."""
        found: dict[str, BaseDistribution] = {"budget": CategoricalDistribution(list(self.space.budgets))}
        for group in self.space.fields:
            found[f"{group}.method"] = CategoricalDistribution(list(self.space.methods))
            found[f"{group}.width"] = CategoricalDistribution(list(self.space.widths))
            found[f"{group}.share"] = FloatDistribution(LEAST_SHARE, 1.0, log=True)
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must agree on to share a study."""
        settings = {k: v for k, v in self.settings.to_dict().items() if k in ("objectives", "proxy", "validations")}
        return {
            "space": self.space.to_dict(),
            "study": settings,
            "train": self.full_config.to_dict(),
            "data": fingerprint(self.schema, self.data),
        }

    # -- the study ------------------------------------------------------------------------------------------------

    def _open(self, there: bool) -> optuna.Study:
        s = self.settings
        sampler = self._sampler()
        # What can fail comes before there is a study, so that none is left half made.
        known = NAME in optuna.get_all_study_names(self.storage)
        if there and not known:
            raise StorageError(f"{self.where} no longer holds the study that was begun in it; put it back")
        points = list(self._planner_points()) if s.warm and not known else []
        try:
            study = optuna.create_study(
                study_name=NAME, storage=self.storage, sampler=sampler, directions=[OBJECTIVES[o] for o in s.objectives]
            )
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(study_name=NAME, storage=self.storage, sampler=sampler)
            for _ in range(_MAKING):  # another process is making it, or was killed over it
                if _READY in study.user_attrs:
                    break
                time.sleep(0.1)
            saved = study.user_attrs.get(_IDENTITY)
            begun = saved is None and not study.get_trials(deepcopy=False)
            differing = [] if begun else differences(saved or {}, self.identity)
            if differing:
                raise CheckpointError(
                    f"{self.where} holds a study of another space or other data; use those, or another storage:\n"
                    + "\n".join(differing)
                ) from None
            if _READY in study.user_attrs:
                self._fill(study)
            else:
                self._make(study, points or (list(self._planner_points()) if s.warm else []))
        else:
            self._make(study, points)
        return study

    def _sampler(self) -> optuna.samplers.BaseSampler:
        s = self.settings
        return make_sampler(s.sampler, self.distributions, self.full_config.seed, s.trials, s.sampler_args)

    def _row_lookup(self, sampler: optuna.samplers.BaseSampler) -> None:
        """Let a sampler draw for nothing: some take one objective, or no continuous parameters, and say so late."""
        objectives = self.settings.objectives
        study = optuna.create_study(sampler=sampler, directions=[OBJECTIVES[o] for o in objectives])
        try:
            for _ in range(2):
                trial = study.ask()
                self._draw(trial)
                study.tell(trial, [0.0] * len(objectives))
        except (ValueError, TypeError, ImportError) as e:
            raise ConfigError(
                f"sampler {self.settings.sampler!r} cannot draw for a study of {', '.join(objectives)}: {e}; choose "
                "another (nsgaii, tpe, random, evolution), other objectives, or install what it needs"
            ) from e

    def _make(self, study: optuna.Study, points: Sequence[dict[str, Any]]) -> None:
        """What a new study gets, or one whose maker was killed lacks."""
        s = self.settings
        if _IDENTITY not in study.user_attrs:
            study.set_user_attr(_IDENTITY, self.identity)
        with warnings.catch_warnings():  # Optuna calls it experimental; its dashboard names axes by it
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(s.objectives))
        queued = [t.system_attrs.get("fixed_params") for t in study.get_trials(deepcopy=False)]
        for point in [p for p in points if p not in queued][: max(0, s.trials - len(queued))]:
            study.enqueue_trial(point, user_attrs={"from": "planner"})
        self._fill(study)
        study.set_user_attr(_READY, True)

    def _fill(self, study: optuna.Study) -> None:
        fill(study, self.storage, self.settings.trials)

    def _planner_points(self) -> Iterator[dict[str, Any]]:
        stats = self.data if hasattr(self.data, "manifest") else None
        for text, budget in self.space.budgets.items():
            equal = get_model(self.full_config.model).needs_equal_widths
            try:
                found = plan_for_budget(
                    self.schema, budget, stats=stats, methods=list(self.space.methods), needs_equal_widths=equal
                )
            except BudgetError:
                continue
            yield self.space.point_of(found, text)

    def warm_from(self, storage: str) -> tuple[int, int]:
        """Queue the best trials of an earlier study, ahead of what is still to be drawn.

        Returns:
            how many were queued, and how many are no points of this space.
        """
        with faults_of(storage):
            found = open_storage(storage, there=True)
            if NAME not in optuna.get_all_study_names(found):
                raise StorageError(f"{shown(storage)} holds no study of methods to start from; name the storage of one")
            earlier = optuna.load_study(study_name=NAME, storage=found).best_trials
        fitting = [t.params for t in earlier if self.space.holds(t.params)]
        with self.guarded():
            waiting = [
                t
                for t in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
                if not t.system_attrs.get("fixed_params") and not t.params
            ]
            known = [t.system_attrs.get("fixed_params") or t.params for t in self.study.get_trials(deepcopy=False)]
            fresh = [p for p in fitting if p not in known][: len(waiting)]
            for trial, params in zip(waiting, fresh, strict=False):
                self.storage.set_trial_system_attr(trial._trial_id, "fixed_params", params)
                self.storage.set_trial_user_attr(trial._trial_id, "from", "an earlier study")
        return len(fresh), len(earlier) - len(fitting)

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
        except Hopeless as e:
            state = TrialState.PRUNED
            trial.set_user_attr("reason", str(e))
        except DivergedError as e:
            state = TrialState.PRUNED
            trial.set_user_attr("reason", f"diverged: {e}")
        except (Interrupted, KeyboardInterrupt, CheckpointError):
            put_back(self.storage, trial._trial_id)
            raise
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # silent for so long that others took it for lost: it is theirs now
        except (optuna.exceptions.OptunaError, OSError):
            raise  # of the storage: nobody shows life for the trial, so it is queued again
        except Exception as e:
            # What fails again each time is not queued again.
            trial.set_user_attr("reason", f"{type(e).__name__}: {e}")
            self._tell(trial, None, TrialState.FAIL)
            raise
        self._tell(trial, values, state)

    def _tell(self, trial: optuna.Trial, values: list[float] | None, state: TrialState) -> None:
        # One that others took for lost, as this process slept, may be queued again: it is over all the same.
        retake(self.storage, trial._trial_id)
        self.study.tell(trial, values, state=state, skip_if_finished=True)
        # Not before it is told: a process killed in between has no training to do again.
        self.trainings.forget(trial.user_attrs.get(_KEY))

    def sweep(self) -> None:
        """Remove checkpoints that no trial goes on from: of processes that were killed when all but done."""
        with self.guarded():
            going = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        self.trainings.sweep({str(t.user_attrs.get(_KEY)) for t in going})

    def _draw(self, trial: optuna.Trial) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for name, d in self.distributions.items():
            if isinstance(d, CategoricalDistribution):
                params[name] = trial.suggest_categorical(name, d.choices)
            elif isinstance(d, FloatDistribution):
                params[name] = trial.suggest_float(name, d.low, d.high, log=d.log)
        return params

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

    def settled(self, params: Mapping[str, Any], *, full: bool = True) -> TrainConfig:
        """Training settings of a point: those of a full training, or of a trial.

        Raises:
            BudgetError: the point does not keep to its budget.
        """
        budget = self.budgets[params["budget"]]
        config = planned(self.full_config if full else self.config, self.space.plan(params), budget)
        need = self.bytes(config)
        if need > budget:
            raise BudgetError(f"the plan takes {need:,} bytes; {budget:,} are available")
        return config

    def bytes(self, config: TrainConfig) -> int:
        """Bytes to serve the embedding part."""
        plans = plans_for(self.schema, config)
        narrow = 0 if plans.linear is None or self._narrow is None else plans.linear.footprint(self._narrow).serve
        return plans.vectors.footprint(self.schema).serve + narrow

    def _objectives(self, trial: optuna.Trial, params: Mapping[str, Any]) -> list[float]:
        config = self.settled(params, full=False)
        size = self.bytes(config)
        trial.set_user_attr("bytes", size)
        # Other parameters may mean the same plan, as a width does to methods that take none, and samplers come back.
        key = key_of(config)
        for twin in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if twin.user_attrs.get(_KEY) == key:
                trial.set_user_attr("reason", f"not trained again: the plan is that of trial {twin.number}")
                return list(twin.values)
        trial.set_user_attr(_KEY, key)
        model, result = self.train(config, lambda step, auc: self._judge(trial, step, auc, size))
        found = {"auc": auc_of(result), "bytes": float(size)}
        if "latency" in self.settings.objectives:
            found["latency"] = self._latency(model)
        return [found[o] for o in self.settings.objectives]

    def train(
        self, config: TrainConfig, watch: Callable[[int, float], None] = lambda step, auc: None
    ) -> tuple[CTRModel, TrainResult]:
        """Train and validate, never test; a training that was killed goes on."""
        model = model_from_config(config, self.schema, self.data.num_dense, self.device)
        if config.standardise and self.data.num_dense:
            model.standardise(*self.data.numeric_moments())
        with self.trainings.place(key_of(config)) as folder:
            trainer = Watched(
                model, self.data, config, folder=folder, resume=folder is not None and (folder / CHECKPOINT).exists(),
                device=self.device, show_progress=False, identity={"data": fingerprint(self.schema, self.data)},
            )  # fmt: skip
            trainer.watch = watch
            return model, trainer.run()

    def _judge(self, trial: optuna.Trial, step: int, auc: float, size: int) -> None:
        curve = dict(trial.user_attrs.get("curve", {}))
        if str(step) not in curve:  # as it is where a killed worker said so
            if len(self.settings.objectives) == 1:  # Optuna keeps intermediate values of single objectives only
                trial.report(auc, step)
            trial.set_user_attr("curve", curve | {str(step): auc})
        if not self.settings.prune:
            return
        peers = [
            t.user_attrs["curve"][str(step)]
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
            if str(step) in t.user_attrs.get("curve", {}) and t.user_attrs["bytes"] <= size
        ]
        if len(peers) >= LEAST_PEERS and auc < statistics.median(peers):
            raise Hopeless(
                f"stopped at step {step}: AUC {auc:.4f} is below {statistics.median(peers):.4f}, the median of "
                f"{len(peers)} trials of at most as many bytes"
            )

    @torch.no_grad()
    def _latency(self, model: CTRModel) -> float:
        batch = next(iter(self.data.batches("valid", 512, shuffle=False, device=self.device)))
        collection = next(iter(model.collections().values()))
        times = []
        for _ in range(25):
            begin = time.perf_counter()
            collection(batch.ids)
            if batch.ids.is_cuda:
                torch.cuda.synchronize(batch.ids.device)
            times.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(times[5:])


def auc_of(result: TrainResult) -> float:
    """Validation AUC of the best weights."""
    if result.valid is None or result.valid.auc is None or result.valid.auc != result.valid.auc:
        raise ConfigError("the validation rows are of one class, so no trial has an AUC; use more of them")
    return float(result.valid.auc)
