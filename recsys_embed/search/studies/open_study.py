"""Create a study in its storage, or open the one that it holds, and fill its queue."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from recsys_embed.data.data_source import DataSource
from recsys_embed.data.folder import StorageError
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.search.folder import differences
from recsys_embed.search.studies.definition import StudyDefinition
from recsys_embed.search.studies.queue import fill
from recsys_embed.search.studies.settings import OBJECTIVES, StudySettings
from recsys_embed.search.studies.storage import open_storage, storage_errors
from recsys_embed.search.studies.trial import TrainingFolders
from recsys_embed.search.studies.urls import without_password
from recsys_embed.train.config import TrainConfig

NAME = "methods"
TRAINING_FOLDERS = "trainings"
_IDENTITY, _READY, KEY = "identity", "ready", "training"
_MAKING = 300
"""Tenths of a second to wait for another process that is creating the study."""


class OpenStudy(StudyDefinition):
    """A study that is open for work; see :class:`MethodStudy`, which does it."""

    def __init__(
        self,
        config: TrainConfig,
        data: DataSource,
        settings: StudySettings,
        storage: str,
        *,
        device: torch.device | str | None = None,
        must_exist: bool = False,
        folder: Path | None = None,
    ) -> None:
        super().__init__(config, data, settings)
        self.where, self.device, self.folder = without_password(storage), device, folder
        self.training_folders = TrainingFolders(None if folder is None else folder / TRAINING_FOLDERS)
        self._check_sampler(self._sampler())
        self.storage = open_storage(storage, must_exist=must_exist)
        with self.guarded():
            self.study = self._open(must_exist)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Convert errors of the storage into StorageError."""
        with storage_errors(self.where):
            yield

    # -- the study ------------------------------------------------------------------------------------------------

    def _open(self, must_exist: bool) -> optuna.Study:
        s = self.settings
        sampler = self._sampler()
        # Everything that can fail comes before the study is created, so that no half-made study remains.
        known = NAME in optuna.get_all_study_names(self.storage)
        if must_exist and not known:
            raise StorageError(f"{self.where} no longer holds the study that was begun in it; put it back")
        points = list(self._planner_points()) if s.warm and not known else []
        try:
            study = optuna.create_study(
                study_name=NAME, storage=self.storage, sampler=sampler, directions=[OBJECTIVES[o] for o in s.objectives]
            )
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(study_name=NAME, storage=self.storage, sampler=sampler)
            for _ in range(_MAKING):  # another process is creating it, or was killed while it did
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

    def _check_sampler(self, sampler: optuna.samplers.BaseSampler) -> None:
        """Draw two trials from a throw-away study: some samplers reject several objectives or floats only then."""
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
        """Initialise a new study, or complete one whose creator was killed."""
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

    def warm_from(self, storage: str) -> tuple[int, int]:
        """Queue the best trials of an earlier study, ahead of the trials that the sampler draws.

        Returns:
            how many were queued, and how many are outside this study's space.
        """
        with storage_errors(storage):
            found = open_storage(storage, must_exist=True)
            if NAME not in optuna.get_all_study_names(found):
                raise StorageError(
                    f"{without_password(storage)} holds no study of methods to start from; name the storage of one"
                )
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

    def _draw(self, trial: optuna.Trial) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for name, d in self.distributions.items():
            if isinstance(d, CategoricalDistribution):
                params[name] = trial.suggest_categorical(name, d.choices)
            elif isinstance(d, FloatDistribution):
                params[name] = trial.suggest_float(name, d.low, d.high, log=d.log)
        return params
