"""Definition of a study: its data, budgets and search space, and the training configuration of a point in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.features import Schema
from recsys_embed.models import get_model
from recsys_embed.planning.planner import plan_for_budget
from recsys_embed.search.checks import need_validation
from recsys_embed.search.retrain import planned
from recsys_embed.search.studies.samplers import make_sampler
from recsys_embed.search.studies.settings import StudySettings
from recsys_embed.search.studies.space import LEAST_SHARE, StudySpace, read_budget, study_methods
from recsys_embed.search.studies.trial import without_test
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.inputs import check_data, check_rows, fingerprint, schema_of
from recsys_embed.train.plans import linear_share, plans_for
from recsys_embed.train.quality import quality_of


class StudyDefinition:
    """Everything that determines the trials of a study.

    Args:
        config: settings of every training; method ``full``, no budget.
        data: opened data set with splits ``train`` and ``valid``.
        settings: of the study.

    Raises:
        ConfigError: settings or data that cannot produce a result.
        BudgetError: a budget below the smallest plan.
    """

    def __init__(self, config: TrainConfig, data: DataSource, settings: StudySettings) -> None:
        check_data(data, config, "a study")
        chosen = ("method", "method_args", "plan", "budget", "ratio")
        given = [name for name in chosen if getattr(config, name) not in (None, {}, "full")]
        if given:
            raise ConfigError(
                "a study chooses method, plan and budget, and sizes methods with their defaults; leave "
                f"{', '.join(given)} out of the training settings"
            )
        check_rows(data, config)
        need_validation(data, config)
        self.full_config, self.data, self.quality = config, without_test(data), quality_of(config)
        self.settings = self._with_objectives(settings)
        schema = schema_of(data, config)
        cls = get_model(config.model)
        self.schema: Schema = schema if cls.uses_vectors else schema.with_dim(1)
        self._narrow = schema.with_dim(1) if cls.uses_vectors and cls.uses_linear else None
        self.full_bytes = plans_for(schema, config).full_bytes
        self.budgets = {text: read_budget(text, self.full_bytes) for text in settings.budgets}
        room = {text: budget - self._linear_bytes(budget) for text, budget in self.budgets.items()}
        methods = settings.methods or study_methods(raw=any(s.ids == "raw" for s in schema))
        self.space = StudySpace(self.schema, room, methods, settings.groups, settings.widths)

    def _with_objectives(self, settings: StudySettings) -> StudySettings:
        """The settings with the quality that runs of this loss and model have."""
        quality = self.quality
        if settings.objectives and settings.objectives[0] != quality.key:
            raise ConfigError(
                f"runs of model {self.full_config.model!r} with loss={self.full_config.loss!r} are compared by "
                f"{quality.key}; got objectives {', '.join(settings.objectives)}: name {quality.key} first, or leave "
                "`objectives` out"
            )
        return replace(settings, objectives=settings.objectives or (quality.key, "bytes"))

    def _linear_bytes(self, budget: int) -> int:
        if self._narrow is None:
            return 0
        return linear_share(budget, self.full_config, self._narrow)

    @cached_property
    def steps(self) -> int:
        """Steps of a full training run."""
        c = self.full_config
        batches = self.data.batches("train", c.batch_size, shuffle=False)
        return min(c.steps or 1 << 62, len(batches) * c.epochs)

    @cached_property
    def config(self) -> TrainConfig:
        """Training settings of a trial, without its plan."""
        s, c = self.settings, self.full_config
        if s.proxy == 1 and not s.prune:
            return c
        steps = max(1, round(self.steps * s.proxy))
        every = max(1, -(-steps // s.validations)) if s.prune else c.eval_every
        return c.replace(steps=steps, eval_every=min(every or steps, c.eval_every or steps))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Distributions of all parameters, in a fixed order."""
        found: dict[str, BaseDistribution] = {"budget": CategoricalDistribution(list(self.space.budgets))}
        for group in self.space.fields:
            found[f"{group}.method"] = CategoricalDistribution(list(self.space.methods))
            found[f"{group}.width"] = CategoricalDistribution(list(self.space.widths))
            found[f"{group}.share"] = FloatDistribution(LEAST_SHARE, 1.0, log=True)
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that runs must have in common to share a study."""
        settings = {k: v for k, v in self.settings.to_dict().items() if k in ("objectives", "proxy", "validations")}
        return {
            "space": self.space.to_dict(),
            "study": settings,
            "train": self.full_config.to_dict(),
            "data": fingerprint(self.schema, self.data),
        }

    def _sampler(self) -> optuna.samplers.BaseSampler:
        s = self.settings
        return make_sampler(s.sampler, self.distributions, self.full_config.seed, s.trials, s.sampler_args)

    def _planner_points(self) -> Iterator[dict[str, Any]]:
        stats = self.data if hasattr(self.data, "counts") else None
        for text, budget in self.space.budgets.items():
            model = get_model(self.full_config.model)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "ids of .* share rows")  # a search begins here, and goes on
                    found = plan_for_budget(
                        self.schema,
                        budget,
                        stats=stats,
                        methods=list(self.space.methods),
                        needs_equal_widths=model.needs_equal_widths,
                        network=None if model.uses_network else False,
                    )
            except BudgetError:
                continue
            yield self.space.point_of(found, text)

    def training_config(self, params: Mapping[str, Any], *, full: bool = True) -> TrainConfig:
        """Training settings of a point, for a full training or for a trial.

        Raises:
            BudgetError: the point's plan exceeds its budget.
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
