"""What all searches have in common: from settings and data to a run folder with a plan, a model and a report."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from recsys_embed.core.footprint import Footprint, format_bytes, parse_bytes
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.features import Schema
from recsys_embed.models import CTRModel, get_model
from recsys_embed.plan import Plan
from recsys_embed.search.folder import SearchFolder, held
from recsys_embed.search.frequency_blocks import count_ids
from recsys_embed.search.report import CURVES, curves_of, page
from recsys_embed.search.retrain import build_retrained, dense_weights, initial_hashes, planned
from recsys_embed.search.supernet import Supernet
from recsys_embed.train.checkpoint import save_checkpoint
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.loop import CHECKPOINT, Trainer, TrainResult
from recsys_embed.train.run import (
    LINEAR_METHOD,
    check_device,
    fingerprint,
    footprint_dict,
    model_from_config,
    plain,
    plans_for,
    schema_of,
    trained_footprint,
)
from recsys_embed.train.run_log import progress_bar
from recsys_embed.utils.settings import Settings

LEAST_OF_A_CLASS = 50
"""Rows of the rarer class below which what is measured on them is mostly chance."""
_ROW_LOOKUP_STEPS = 20


def need_validation(data: Any) -> None:
    """Refuse data on which candidates cannot be told apart.

    Raises:
        ConfigError: no validation rows, or too few of a class.
    """
    if "valid" not in data.splits:
        raise ConfigError(
            "a search chooses by validation rows, and this data has no split 'valid'; convert it with --valid 1/12"
        )
    need_classes(data, "valid", "compare candidates", "Convert the data with a larger --valid")


def need_classes(data: Any, split: str, purpose: str, remedy: str) -> None:
    """Refuse a split with too few rows of a class.

    Raises:
        ConfigError: says what they are for, and the remedy.
    """
    positives = negatives = 0
    for batch in data.batches(split, 1 << 16, shuffle=False):
        positives += int((batch.label > 0.5).sum())
        negatives += int((batch.label <= 0.5).sum())
        if min(positives, negatives) >= LEAST_OF_A_CLASS:
            return
    raise ConfigError(
        f"the split {split!r} is too small to {purpose}: {positives} positives and {negatives} "
        f"negatives; at least {LEAST_OF_A_CLASS} of each are needed. {remedy}"
    )


@dataclass
class Search(ABC):
    """One search: plain tables in, a plan out. Subclasses say how.

    Args:
        config: training settings of the search and of the retraining; method ``full``, without a budget.
        data: opened data set.
        settings: of the search.
        folder: where it keeps what it has done.
        budget: bytes of the embedding part that the plan must keep to; None: whatever the search comes to.
        device: e.g. ``"cuda"``; None: CPU.
        show_progress: see :class:`Trainer`.

    >>> from types import SimpleNamespace
    >>> from recsys_embed import FeatureSpec
    >>> from recsys_embed.search.extract import plain_bytes
    >>> @dataclass(frozen=True)
    ... class HeadSettings(Settings):
    ...     share: float = 0.5
    >>> class HeadSearch(Search):  # what is to be beaten: the most frequent ids
    ...     method, stages = "head", ("retrain",)
    ...
    ...     def check(self) -> None:
    ...         need_validation(self.data)
    ...
    ...     def search(self) -> Plan:
    ...         budget = int(self.settings.share * plain_bytes(self.schema))
    ...         return Plan.uniform(self.schema, "freqcut", budget=budget)
    >>> data = SimpleNamespace(schema=lambda width: Schema([FeatureSpec("C1", 100, width)]))  # `run_search` needs more
    >>> HeadSearch(TrainConfig(), data, HeadSettings(), SearchFolder(None, {})).search()["C1"].num_frequent
    49
    """

    config: TrainConfig
    data: Any
    settings: Any
    folder: SearchFolder
    budget: int | None = None
    device: torch.device | str | None = None
    show_progress: bool | None = None

    method: ClassVar[str]
    """Key of the search, and of the method that stores what it finds."""
    summary: ClassVar[str]
    """What it does, in a line, for the command line."""
    settings_cls: ClassVar[type]
    """Class of its settings, with ``from_dict``."""
    stages: ClassVar[tuple[str, ...]] = ("supernet", "evolution", "retrain")
    redo: ClassVar[tuple[str, ...] | None] = None
    """What is done again for another budget, tried before there is a plan; None: everything is."""

    @abstractmethod
    def check(self) -> None:
        """Raise for what cannot come to anything, before any work is done."""

    @abstractmethod
    def search(self) -> Plan:
        """The plan of the vectors."""

    def start_weights(self) -> dict[str, Any]:
        """Arguments of :func:`build_retrained` that say what the retraining starts from; the initial weights here."""
        return {"hashes": self.folder.get("initial")}

    def trained_weights(self, net: Supernet, tables: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of :func:`build_retrained` that go on with a trained supernet's network and first-order weights."""
        found: dict[str, Any] = {"tables": tables, "dense": dense_weights(net.model)}
        if net.model.linear is not None:
            first = {s.name: net.model.linear.table(f"{s.name}.weight").detach() for s in self.schema}
            found["linear"] = {s.name: (first[s.name], c) for s, c in zip(self.schema, self.counts, strict=True)}
        return found

    @cached_property
    def counts(self) -> list[Tensor]:
        """How often each id of each feature occurs in training."""
        return count_ids(self.data, self.schema)

    # -- what it works on -----------------------------------------------------------------------------------------

    @cached_property
    def schema(self) -> Schema:
        """Features at the width of the settings."""
        return schema_of(self.data, self.config)

    @cached_property
    def linear_bytes(self) -> int:
        """Bytes of first-order weights under the budget: their share, as in every other run with a budget."""
        cls = get_model(self.config.model)
        if self.budget is None or not cls.uses_linear:
            return 0
        narrow = self.schema.with_dim(1)
        share = self.budget // (self.config.embedding_dim + 1)
        return Plan.uniform(narrow, LINEAR_METHOD, budget=share).footprint(narrow).serve

    @property
    def vector_budget(self) -> int | None:
        """Bytes that the plan of the vectors may take."""
        return None if self.budget is None else self.budget - self.linear_bytes

    def rows(self, split: str) -> int | None:
        """Rows of a split, where the data set knows."""
        return self.data.splits.get(split) if isinstance(self.data.splits, Mapping) else None

    # -- parts of every search ------------------------------------------------------------------------------------

    def plain_model(self) -> CTRModel:
        """The untrained model over plain tables; what its weights are is noted, so that a retraining can check."""
        model = self._standardised(model_from_config(self.config, self.schema, self.data.num_dense, self.device))
        if self.folder.get("initial") is None:
            self.folder.put("initial", initial_hashes(model))
        return model

    def _standardised(self, model: CTRModel) -> CTRModel:
        if self.config.standardise and self.data.num_dense:
            model.standardise(*self.data.numeric_moments())
        return model

    def trainer(
        self, cls: Any, model: Any, stage: str, config: TrainConfig | None = None, *, data: Any = None, **options: Any
    ) -> Any:
        """A trainer that goes on where the stage was stopped; on ``data`` where that is not the search's own."""
        folder = self.folder.inside(stage)
        going_on = folder is not None and (folder / CHECKPOINT).exists()
        number = f"[{self.stages.index(stage) + 1}/{len(self.stages)}] {stage}{self._time_left(stage)}"
        return cls(
            model, self.data if data is None else data, config or self.config, folder=folder, resume=going_on,
            device=self.device, show_progress=self.show_progress, label=number,
            identity={"data": fingerprint(self.schema, self.data)}, **options,
        )  # fmt: skip

    def run_stage(self, stage: str, trainer: Trainer) -> TrainResult:
        """Train to the end; what was done before takes no time again."""
        with self.folder.clock(stage):
            result = trainer.run()
        self.folder.put(f"{stage}_result", plain(result.to_dict()))
        return result

    def _time_left(self, stage: str) -> str:
        """A guess for all that is left, from stages that are over."""
        spent = self.folder.seconds
        longest = max((spent.get(s, 0.0) for s in self.stages[: self.stages.index(stage)]), default=0.0)
        left = (len(self.stages) - self.stages.index(stage)) * longest
        return f" (about {max(1, round(left / 60))} min left in all)" if longest else ""

    def progress(self, stage: str, done: int, total: int, text: str) -> None:
        """Show how far a stage is."""
        bar = self.__dict__.get("_bar")
        if bar is None:
            label = f"[{self.stages.index(stage) + 1}/{len(self.stages)}] {stage}{self._time_left(stage)}"
            bar = self.__dict__["_bar"] = progress_bar(total, label, done - 1, self.show_progress)
        bar.set_postfix_str(text, refresh=False)
        bar.update(1)
        if done >= total:
            bar.close()
            del self.__dict__["_bar"]

    def plain_seconds(self) -> float:
        """Seconds of a plain training with these settings, from a few of its steps."""
        known = self.folder.get("row_lookup")
        if known is None:
            model = self._standardised(model_from_config(self.config, self.schema, self.data.num_dense, self.device))
            trainer = Trainer(model, self.data, self.config, device=self.device, show_progress=False)
            times = []
            with torch.random.fork_rng(devices=[]):
                for batch in islice(iter(trainer._epoch(0, 0)), _ROW_LOOKUP_STEPS + 3):
                    trainer._clock = time.perf_counter()
                    trainer._step(batch)
                    times.append(time.perf_counter() - trainer._clock)
            begin = time.perf_counter()
            validations = 0.0
            if "valid" in self.data.splits:
                trainer.evaluate("valid")
                validations = (time.perf_counter() - begin) * -(-trainer.total_steps // self._validation_steps(trainer))
            known = {"seconds": statistics.median(times[3:] or times) * trainer.total_steps + validations}
            self.folder.put("row_lookup", known)
        return float(known["seconds"])

    def _validation_steps(self, trainer: Trainer) -> int:
        """Steps between validations."""
        return min(self.config.eval_every or trainer.steps_per_epoch, trainer.steps_per_epoch)

    def retrain(self, plan: Plan) -> tuple[CTRModel, TrainResult]:
        """Train the plan."""
        config = planned(self.config, plan, self.budget)
        start = self.start_weights()
        model = build_retrained(config, self.schema, self.data.num_dense, device=self.device, **start)
        trainer = self.trainer(Trainer, self._standardised(model), "retrain", config)
        return model, self.run_stage("retrain", trainer)


@dataclass(frozen=True)
class SearchOutcome:
    """A finished search.

    Args:
        plan: of the vectors.
        model: the retrained model.
        result: what the retraining measured.
        footprint: bytes of the embedding part.
        full_bytes: bytes of the plain tables.
        seconds: by stage.
        cost: seconds of all stages over those of one plain training of as many epochs.

    >>> from recsys_embed import FeatureSpec
    >>> from recsys_embed.models import build_model
    >>> schema = Schema([FeatureSpec("C1", 100, 4)])
    >>> model = build_model("dnn", schema, Plan.uniform(schema, "hash", budget=400), num_dense=2, hidden=(8,))
    >>> result = TrainResult(None, None, steps=9, best_step=9, samples_per_s=1e5, seconds=0.2, history=[])
    >>> found = SearchOutcome(model.vectors.plan, model, result, model.footprint(), 1600, {"retrain": 0.2}, cost=1.0)
    >>> found.to_dict()["compression"]
    4.0
    """

    plan: Plan
    model: CTRModel
    result: TrainResult
    footprint: Footprint
    full_bytes: int
    seconds: dict[str, float]
    cost: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the model left out."""
        return {
            **plain(self.result.to_dict()),
            "footprint": footprint_dict(self.footprint),
            "full_bytes": self.full_bytes,
            "compression": self.full_bytes / self.footprint.serve,
            "stage_seconds": self.seconds,
            "cost_in_trainings": self.cost,
        }


def total_budget(config: TrainConfig, schema: Schema) -> int | None:
    """Bytes that ``budget`` or ``ratio`` of the settings allow the embedding part."""
    if config.budget is not None:
        return parse_bytes(config.budget)
    if config.ratio is None:
        return None
    return int(plans_for(schema, config.replace(method="full", ratio=None)).full_bytes / config.ratio)


def run_search(
    kind: type[Search],
    config: TrainConfig,
    data: Any,
    settings: Settings,
    *,
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
    show_progress: bool | None = None,
) -> SearchOutcome:
    """Search, extract, retrain and test; a search that was stopped at any point goes on where it was.

    One whose process is killed goes on from its last checkpoint, written as a :class:`Trainer` writes them in every
    stage, and comes to the same bits; the evolution counts a candidate on a batch of rows as a step.

    Where a budget turns out too small, the same folder takes another and goes on from what OptEmbed or DNIS trained.

    Args:
        kind: which search.
        config: training settings; its ``budget`` or ``ratio`` is what the plan must keep to.
        data: data set of :func:`recsys_embed.data.open_dataset`, or anything with its methods.
        settings: of the search.
        folder: run folder; gets ``plan.json``, ``report.json``, ``model.pt`` and what each stage leaves. None keeps
            nothing.
        device: e.g. ``"cuda"``; None: CPU.
        show_progress: see :class:`Trainer`.

    Raises:
        ConfigError: settings that would find nothing; validation rows too few to compare candidates.
        BudgetError: the budget is below the smallest plan there is.
        CheckpointError: the folder holds a search of other settings or data.
        DivergedError: a loss that is no longer finite.
        Interrupted: SIGINT or SIGTERM, after what was done has been written.

    >>> from tempfile import TemporaryDirectory
    >>> from recsys_embed.data import make_synthetic, open_dataset
    >>> from recsys_embed.search import DnisSearch, DnisSettings
    >>> with TemporaryDirectory() as folder:
    ...     _ = make_synthetic(folder, rows=3000)
    ...     config = TrainConfig(model="dnn", model_args={"hidden": [8]}, embedding_dim=4, ratio=4)
    ...     found = run_search(DnisSearch, config, open_dataset(folder), DnisSettings(), folder=f"{folder}/search")
    ...     Path(folder, "search", "plan.json").exists()
    True
    >>> found.footprint.serve <= found.full_bytes / 4
    True
    """
    if config.method != "full" or config.plan is not None:
        raise ConfigError(f"a search starts from plain tables; drop `method` and `plan`; got {config.method!r}")
    path = None if folder is None else Path(folder)
    if device is not None:
        check_device(device)
    with held(path):
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        schema = schema_of(data, config)
        if any(s.ids == "raw" for s in schema):
            raise ConfigError("a search needs ids of a vocabulary; this data holds raw 64-bit ids, which have no rows")
        budget = total_budget(config, schema)
        identity = {
            "method": kind.method,
            "train": config.replace(ratio=None, budget=None).to_dict(),
            "budget": budget,
            "search": settings.to_dict(),
            "data": fingerprint(schema, data),
        }
        bare = config.replace(ratio=None, budget=None)
        store = SearchFolder(path, identity, kind.redo)
        search = kind(bare, data, settings, store, budget, device, show_progress)
        search.check()
        store.claim()
        known = store.get("plan")
        plan = search.search() if known is None else Plan.from_dict(known)
        if known is None:
            _check_budget(search, plan)
            store.put("plan", plan.to_dict())
        model, result = search.retrain(plan)
        seconds = store.seconds
        outcome = SearchOutcome(
            plan=plan,
            model=model,
            result=result,
            footprint=trained_footprint(model),
            full_bytes=plans_for(schema, bare).full_bytes,
            seconds=seconds,
            cost=sum(seconds.values()) / search.plain_seconds(),
        )
        if path is not None:
            settled = planned(bare, plan, budget).to_dict()
            save_checkpoint(path / "model.pt", {**settled, "data": identity["data"]}, model=model.state_dict())
            store.put("report", outcome.to_dict())
            store.put(CURVES, curves_of(search))
            store.text("report.md", page(search, outcome))
        return outcome


def _check_budget(search: Search, plan: Plan) -> None:
    """A plan over its budget is a fault of the search, found before any training is spent on it."""
    need, budget = plan.footprint(search.schema).serve, search.vector_budget
    if budget is not None and need > budget:
        raise BudgetError(
            f"the plan found takes {format_bytes(need)} for the vectors; {format_bytes(budget)} are available"
        )
