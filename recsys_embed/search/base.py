"""Base class of the searches: data, stages, and retraining of the plan."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from recsys_embed.data.data_source import BatchSource, DataSource
from recsys_embed.features import Schema
from recsys_embed.models import CTRModel, get_model
from recsys_embed.plan import Plan
from recsys_embed.search.folder import SearchFolder
from recsys_embed.search.frequency_blocks import id_counts
from recsys_embed.search.retrain import StartWeights, build_retrained, dense_weights, initial_hashes, planned
from recsys_embed.search.supernet import Supernet
from recsys_embed.train.build import model_from_config, standardise
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.inputs import fingerprint, schema_of
from recsys_embed.train.json_values import json_ready
from recsys_embed.train.loop import Trainer
from recsys_embed.train.plans import linear_share
from recsys_embed.train.result import TrainResult
from recsys_embed.train.resumable import CHECKPOINT
from recsys_embed.train.run_log import progress_bar
from recsys_embed.utils.deprecated import warn_renamed
from recsys_embed.utils.settings import Settings
from recsys_embed.utils.types import Option

T = TypeVar("T", bound=Trainer)

_TIMED_STEPS = 20


@dataclass
class Search(ABC):
    """Base class of a search, which turns full tables into a plan; subclasses define :meth:`search`.

    Args:
        config: training settings of the search and of the retraining; method ``full``, without a budget.
        data: opened data set.
        settings: of the search.
        folder: run folder, for results of stages.
        budget: most bytes of the embedding part; None: no limit.
        device: e.g. ``"cuda"``; None: CPU.
        show_progress: see :class:`Trainer`.

    >>> from types import SimpleNamespace
    >>> from recsys_embed.search.checks import need_validation
    >>> from recsys_embed.utils.deprecated import warn_renamed
    >>> from recsys_embed.utils.settings import Settings
    >>> from recsys_embed import FeatureSpec
    >>> from recsys_embed.search.extract import full_bytes
    >>> @dataclass(frozen=True)
    ... class HeadSettings(Settings):
    ...     share: float = 0.5
    >>> class HeadSearch(Search):  # what is to be beaten: the most frequent ids
    ...     settings: HeadSettings
    ...     method, stages = "head", ("retrain",)
    ...
    ...     def check(self) -> None:
    ...         need_validation(self.data)
    ...
    ...     def search(self) -> Plan:
    ...         budget = int(self.settings.share * full_bytes(self.schema))
    ...         return Plan.uniform(self.schema, "freqcut", budget=budget)
    >>> data = SimpleNamespace(schema=lambda width: Schema([FeatureSpec("C1", 100, width)]))  # a stub
    >>> HeadSearch(TrainConfig(), data, HeadSettings(), SearchFolder(None, {})).search()["C1"].num_frequent
    49
    """

    config: TrainConfig
    data: DataSource
    settings: Settings
    folder: SearchFolder
    budget: int | None = None
    device: torch.device | str | None = None
    show_progress: bool | None = None

    method: ClassVar[str]
    """Key of the search, and of the method that stores what it finds."""
    summary: ClassVar[str]
    """One line of help for the command line."""
    settings_cls: ClassVar[type]
    """Class of its settings, with ``from_dict``."""
    stages: ClassVar[tuple[str, ...]] = ("supernet", "evolution", "retrain")
    redo: ClassVar[tuple[str, ...] | None] = None
    """Stages to repeat if the budget changes before there is a plan; None: a run folder accepts one budget only."""

    @abstractmethod
    def check(self) -> None:
        """Raise for settings and data that cannot produce a result, before any work is done."""

    @abstractmethod
    def search(self) -> Plan:
        """The plan of the vectors."""

    def start_weights(self) -> StartWeights:
        """Arguments of :func:`build_retrained` that say what the retraining starts from; the initial weights here."""
        return {"hashes": self.folder.get("initial")}

    def trained_weights(self, net: Supernet, tables: Mapping[str, Tensor]) -> StartWeights:
        """Arguments of :func:`build_retrained` that go on with a trained supernet's network and first-order weights."""
        found: StartWeights = {"tables": tables, "dense": dense_weights(net.model)}
        if net.model.linear is not None:
            first = {s.name: net.model.linear.table(f"{s.table_name}.weight").detach() for s in self.first_readers}
            found["linear"] = {s.name: (first[s.name], c) for s, c in zip(self.first_readers, self.counts, strict=True)}
        return found

    @cached_property
    def counts(self) -> list[Tensor]:
        """How often each id of each table occurs in training: int64 ``[num_ids]`` each."""
        return id_counts(self.data, self.schema)

    # -- what it works on -----------------------------------------------------------------------------------------

    @cached_property
    def schema(self) -> Schema:
        """Features at the width of the settings."""
        return schema_of(self.data, self.config)

    @property
    def first_readers(self) -> Schema:
        """The first feature of each table: what is masked, pruned and stored once, whatever else reads it."""
        return self.schema.first_readers

    @cached_property
    def linear_bytes(self) -> int:
        """Bytes of first-order weights under the budget: their share, as in every other run with a budget."""
        cls = get_model(self.config.model)
        if self.budget is None or not cls.uses_linear:
            return 0
        return linear_share(self.budget, self.config, self.schema.with_dim(1))

    @property
    def vector_budget(self) -> int | None:
        """Bytes that the plan of the vectors may take."""
        return None if self.budget is None else self.budget - self.linear_bytes

    def rows(self, split: str) -> int | None:
        """Rows of a split, where the data set knows."""
        return self.data.splits.get(split) if isinstance(self.data.splits, Mapping) else None

    # -- parts of every search ------------------------------------------------------------------------------------

    def full_model(self) -> CTRModel:
        """The untrained model over full tables; stores hashes of its weights, which a retraining checks."""
        model = self._untrained()
        if self.folder.get("initial") is None:
            self.folder.put("initial", initial_hashes(model))
        return model

    def plain_model(self) -> CTRModel:
        """The deprecated name of :meth:`full_model`."""
        warn_renamed("method of Search", "plain_model", "full_model")
        return self.full_model()

    def plain_seconds(self) -> float:
        """The deprecated name of :meth:`full_training_seconds`."""
        warn_renamed("method of Search", "plain_seconds", "full_training_seconds")
        return self.full_training_seconds()

    def _untrained(self) -> CTRModel:
        model = model_from_config(self.config, self.schema, self.data.num_dense, self.device)
        return standardise(model, self.config, self.data)

    def trainer(
        self,
        cls: Callable[..., T],
        model: nn.Module,
        stage: str,
        config: TrainConfig | None = None,
        *,
        data: BatchSource | None = None,
        **options: Option,
    ) -> T:
        """A trainer that resumes a stage from its checkpoint; ``data`` replaces the search's own data."""
        folder = self.folder.inside(stage)
        going_on = folder is not None and (folder / CHECKPOINT).exists()
        number = f"[{self.stages.index(stage) + 1}/{len(self.stages)}] {stage}{self._time_left(stage)}"
        return cls(
            model, self.data if data is None else data, config or self.config, folder=folder, resume=going_on,
            device=self.device, show_progress=self.show_progress, label=number,
            identity={"data": fingerprint(self.schema, self.data)}, **options,
        )  # fmt: skip

    def run_stage(self, stage: str, trainer: Trainer) -> TrainResult:
        """Train to the end, from the checkpoint if there is one, and store the result."""
        with self.folder.clock(stage):
            result = trainer.run()
        self.folder.put(f"{stage}_result", json_ready(result.to_dict()))
        return result

    def _time_left(self, stage: str) -> str:
        """Estimated time left, from the finished stages."""
        spent = self.folder.seconds
        longest = max((spent.get(s, 0.0) for s in self.stages[: self.stages.index(stage)]), default=0.0)
        left = (len(self.stages) - self.stages.index(stage)) * longest
        return f" (about {max(1, round(left / 60))} min left in all)" if longest else ""

    def progress(self, stage: str, done: int, total: int, text: str) -> None:
        """Show the progress of a stage."""
        bar = self.__dict__.get("_bar")
        if bar is None:
            label = f"[{self.stages.index(stage) + 1}/{len(self.stages)}] {stage}{self._time_left(stage)}"
            bar = self.__dict__["_bar"] = progress_bar(total, label, done - 1, self.show_progress)
        bar.set_postfix_str(text, refresh=False)
        bar.update(1)
        if done >= total:
            bar.close()
            del self.__dict__["_bar"]

    def full_training_seconds(self) -> float:
        """Estimated seconds of training the model over full tables, from a few timed steps."""
        known = self.folder.get("probe")
        if known is None:
            model = self._untrained()
            trainer = Trainer(model, self.data, self.config, device=self.device, show_progress=False)
            times = []
            with torch.random.fork_rng(devices=[]):
                for batch in islice(iter(trainer._epoch(0, 0)), _TIMED_STEPS + 3):
                    trainer._clock = time.perf_counter()
                    trainer._step(batch)
                    times.append(time.perf_counter() - trainer._clock)
            begin = time.perf_counter()
            validations = 0.0
            if "valid" in self.data.splits:
                trainer.evaluate("valid")
                validations = (time.perf_counter() - begin) * -(-trainer.total_steps // self._validation_steps(trainer))
            known = {"seconds": statistics.median(times[3:] or times) * trainer.total_steps + validations}
            self.folder.put("probe", known)
        return float(known["seconds"])

    def _validation_steps(self, trainer: Trainer) -> int:
        """Steps between validations."""
        return min(self.config.eval_every or trainer.steps_per_epoch, trainer.steps_per_epoch)

    def retrain(self, plan: Plan) -> tuple[CTRModel, TrainResult]:
        """Train the plan."""
        config = planned(self.config, plan, self.budget)
        start = self.start_weights()
        model = build_retrained(config, self.schema, self.data.num_dense, device=self.device, **start)
        trainer = self.trainer(Trainer, standardise(model, self.config, self.data), "retrain", config)
        return model, self.run_stage("retrain", trainer)
