"""Train every combination of model, method, size and seed with the same settings, and summarise over seeds."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from recsys_embed.core.footprint import Footprint, parse_bytes
from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import BudgetError, ConfigError, UnknownNameError, raise_faults, unknown_name
from recsys_embed.models import get_model, hyperparameters
from recsys_embed.models.base import make_params
from recsys_embed.registry import get_method, list_methods, with_current_names
from recsys_embed.train.config import PLANNED, TrainConfig
from recsys_embed.train.inputs import check_data, check_rows, fingerprint, schema_of
from recsys_embed.train.json_values import footprint_dict, json_ready
from recsys_embed.train.plans import plans_for
from recsys_embed.train.result import DivergedError
from recsys_embed.train.run import run_training
from recsys_embed.utils.files import write_json
from recsys_embed.utils.settings import Settings, param
from recsys_embed.utils.strict_json import own_json

ROWS = "rows"


@dataclass(frozen=True)
class Comparison(Settings):
    """What to compare; everything else is the same for all rows.

    Args:
        models: model keys.
        methods: method keys; ``full`` is always added, as the others are measured against it.
        ratios: compressions; each gives every method ``full``'s bytes divided by it.
        budgets: byte budgets of the whole embedding part, instead of or besides ratios.
        seeds: number of seeds, 0 to ``seeds - 1``; one seed fixes data order and dense start of every method.
        train: settings of all rows; each model takes those of its ``model_args`` that it knows.
        model_args: hyperparameters by model key, over ``train.model_args``.
        method_args: parameters by method key, over ``train.method_args``.

    >>> [c.name for c in Comparison(models=("fm",), methods=("hash",), ratios=(4.0,)).cases()]
    ['fm full seed 0', 'fm hash 4x seed 0']
    """

    models: tuple[str, ...] = ("deepfm",)
    methods: tuple[str, ...] = param(("hash", "unified"), empty=True)
    ratios: tuple[float, ...] = param((20.0,), low=1, empty=True)
    budgets: tuple[str | int, ...] = ()
    seeds: int = param(1, low=1)
    train: TrainConfig = field(default_factory=TrainConfig)
    model_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    method_args: dict[str, dict[str, Any]] = field(default_factory=dict)

    def conflicts(self) -> list[str]:
        faults = []
        if not self.ratios and not self.budgets and any(m != "full" for m in self.methods):
            faults.append("give `ratios` or `budgets` for the methods to meet")
        for key in ("method", "plan", "ratio", "budget", "seed"):
            if key in self.train.non_defaults():
                faults.append(f"`{key}` varies between rows; it must not be among the settings of all rows")
        return faults

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.methods:
            if method != PLANNED:
                get_method(method)
        for budget in self.budgets:
            parse_bytes(budget)
        self._check_args()

    def _check_args(self) -> None:
        for model in self.model_args:
            if model not in self.models:
                raise unknown_name("model in `model_args`", model, self.models)
        for model in self.models:
            make_params(get_model(model), self._model_args(model))
        for method in self.method_args:
            if method not in self.methods:
                raise unknown_name("method in `method_args`", method, self.methods)
        if self.method_args.get("full"):
            raise ConfigError("`method_args` of 'full' would change what the others are compared with; leave them out")
        known = {key for model in self.models for key in hyperparameters(model)}
        for key in self.train.model_args:
            if key not in known:
                raise unknown_name("hyperparameter of the models", key, known)

    def _model_args(self, model: str) -> dict[str, Any]:
        shared = {k: v for k, v in self.train.model_args.items() if k in hyperparameters(model)}
        return {**shared, **self.model_args.get(model, {})}

    def cases(self) -> Iterator[Case]:
        """All rows in order of training: seed by seed, so that the first round shows every method."""
        methods = [m for m in dict.fromkeys(self.methods) if m != "full"]
        sizes: list[tuple[float | None, str | int | None]] = [(r, None) for r in self.ratios]
        sizes += [(None, b) for b in self.budgets]
        for seed in range(self.seeds):
            for model in self.models:
                yield self._case(model, "full", None, None, seed)
                for ratio, budget in sizes:
                    for method in methods:
                        yield self._case(model, method, ratio, budget, seed)

    def _case(self, model: str, method: str, ratio: float | None, budget: str | int | None, seed: int) -> Case:
        config = self.train.replace(
            model=model,
            method=method,
            ratio=ratio,
            budget=budget,
            seed=seed,
            model_args=self._model_args(model),
            method_args={} if method == "full" else {**self.train.method_args, **self.method_args.get(method, {})},
        )
        return Case(config)


@dataclass(frozen=True)
class Case:
    """One row to train."""

    config: TrainConfig

    @property
    def size(self) -> str:
        if self.config.ratio is not None:
            return f"{self.config.ratio:g}x"
        return "" if self.config.budget is None else str(self.config.budget)

    @property
    def name(self) -> str:
        parts = (self.config.model, self.config.method, self.size, f"seed {self.config.seed}")
        return " ".join(p for p in parts if p)

    @property
    def key(self) -> str:
        """File name of the row."""
        return self.name.replace(" ", "-")


def all_methods() -> tuple[str, ...]:
    """Keys of every registered method that a budget alone can size; other methods need a search."""
    return tuple(m.name for m in list_methods() if m.config_cls.plannable)


def run_comparison(
    comparison: Comparison,
    data: DataSource,
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    on_row: Callable[[int, int, dict[str, Any]], None] | None = None,
    show_progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Train what is not yet trained and return all rows as JSON values.

    Each row is a file in ``folder/rows``, so a comparison that was stopped goes on where it was; a row that cannot be
    built within its budget is kept too, with the reason.

    Args:
        comparison: what to compare.
        data: opened data set.
        folder: where rows go.
        device: e.g. ``"cuda"``; None: CPU.
        on_row: called after each row with its number, the number of rows and the row.
        show_progress: see :class:`recsys_embed.train.Trainer`.

    Raises:
        ConfigError: the folder holds a row of other settings or other data.
    """
    check_data(data, comparison.train, "a comparison")
    for model in comparison.models:
        check_rows(data, comparison.train.replace(model=model))
    folder = Path(folder)
    cases = list(comparison.cases())
    raw = [s.name for s in data.schema(1) if s.ids == "raw"]
    if raw:
        # Raw ids have no full table, so that nothing is measured against one.
        cases = [case for case in cases if case.config.method != "full"]
        unfit = [m for m in comparison.methods if m != "full" and not get_method(m).config_cls.accepts_raw]
        faults = [f"method {m!r} needs vocabulary indices, and {', '.join(raw[:3])} have raw 64-bit ids" for m in unfit]
        known = ", ".join(m.name for m in list_methods() if m.config_cls.accepts_raw)
        raise_faults(faults, f"a comparison; compare {known}, or convert the data with vocabularies")
    found = [_finished_row(folder, case, data) for case in cases]
    rows = []
    left, spent, trained = sum(row is None for row in found), 0.0, 0
    for number, (case, row) in enumerate(zip(cases, found, strict=True), 1):
        if row is None:
            label = f"[{number}/{len(cases)}] {case.name}"
            if trained:
                label += f" (about {max(1, round(spent / trained * left / 60))} min left in all)"
            start = time.perf_counter()
            row = _train_row(case, data, folder, device=device, label=label, show_progress=show_progress)
            write_json(_row_path(folder, case), row)
            left, spent, trained = left - 1, spent + time.perf_counter() - start, trained + 1
        # Only after the row is written: a process that was killed before resumes from these checkpoints.
        shutil.rmtree(folder / ROWS / case.key, ignore_errors=True)
        rows.append(row)
        if on_row is not None:
            on_row(number, len(cases), row)
    return rows


def _row_path(folder: Path, case: Case) -> Path:
    return folder / ROWS / f"{case.key}.json"


def _finished_row(folder: Path, case: Case, data: DataSource) -> dict[str, Any] | None:
    path = _row_path(folder, case)
    if not path.exists():
        return None
    try:
        row = own_json(path.read_text(encoding="utf-8"))
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("settings"), dict):
        raise ConfigError(f"{path} is not a row of a comparison; remove it to train the row again")
    wanted = case.config.to_dict()
    # Settings pass through JSON so that tuples and lists compare equal.
    wanted, settings = with_current_names(json.loads(json.dumps(wanted))), with_current_names(row["settings"])
    # Settings at their defaults may be left out on either side; names of earlier versions' settings say nothing.
    known = {f.name for f in fields(TrainConfig)}
    differing = [k for k in {**wanted, **settings} if k in known and settings.get(k) != wanted.get(k)]
    if row.get("data") != fingerprint(schema_of(data, case.config), data):
        differing.append("data")
    if differing:
        raise ConfigError(
            f"{path} was made with other settings ({', '.join(differing)}); choose another folder (--out) or remove it"
        )
    return row


def _train_row(
    case: Case,
    data: DataSource,
    folder: Path,
    *,
    device: torch.device | str | None,
    label: str,
    show_progress: bool | None,
) -> dict[str, Any]:
    config = case.config
    schema = schema_of(data, config)
    row: dict[str, Any] = {
        "model": config.model,
        "method": config.method,
        "size": case.size,
        "ratio": config.ratio,
        "budget": config.budget,
        "seed": config.seed,
        "status": "ok",
        "reason": "",
        "settings": config.to_dict(),
        "data": fingerprint(schema, data),
    }
    try:
        plans_for(schema, config, data)
    except UnknownNameError:
        raise  # a misspelt option is an error of the request, not of the size
    except (BudgetError, ConfigError) as e:
        return {**row, "status": "infeasible", "reason": str(e)}
    try:
        out = run_training(
            config,
            data,
            folder=folder / ROWS / case.key,
            resume=True,
            device=device,
            save_model=False,
            show_progress=show_progress,
            label=label,
        )
    except DivergedError as e:
        return {**row, "status": "diverged", "reason": str(e)}
    done = {
        **row,
        **json_ready(out.result.to_dict()),
        "footprint": footprint_dict(out.footprint),
        "full_bytes": out.full_bytes,
        "compression": out.full_bytes / out.footprint.serve,
    }
    if config.method == PLANNED:
        done["plan"] = out.model.vectors.plan.to_dict()
    return done


@dataclass(frozen=True)
class Summary:
    """One line of the table: a model, method and size over all seeds.

    ``auc_gain`` is the mean over seeds of test AUC minus that of ``full`` at the same seed. Standard deviations are
    over seeds, None for one seed. ``ranking`` holds recall and NDCG of retrieval models, by names such as
    ``"recall@10"``, or the RMSE of real labels (``"rmse"``), and ``ranking_gain`` what they gain on ``full``.
    """

    model: str
    method: str
    size: str
    status: str
    reason: str
    seeds: int
    auc: float | None = None
    auc_sd: float | None = None
    logloss: float | None = None
    logloss_sd: float | None = None
    auc_gain: float | None = None
    auc_gain_sd: float | None = None
    footprint: Footprint = field(default_factory=Footprint)
    compression: float | None = None
    samples_per_s: float | None = None
    ranking: dict[str, float] = field(default_factory=dict)
    ranking_sd: dict[str, float | None] = field(default_factory=dict)
    ranking_gain: dict[str, float] = field(default_factory=dict)
    ranking_gain_sd: dict[str, float | None] = field(default_factory=dict)


def ranking_of(test: dict[str, Any]) -> dict[str, float]:
    """What tells rows without clicks, by name: recall and NDCG of retrieval models, RMSE of real labels.

    >>> ranking_of({"auc": 0.7, "recall": {"10": 0.2}, "ndcg": {"10": 0.1}})
    {'recall@10': 0.2, 'ndcg@10': 0.1}
    >>> ranking_of({"auc": None, "logloss": None, "rmse": 0.9})
    {'rmse': 0.9}
    """
    found = {f"{name}@{k}": v for name in ("recall", "ndcg") for k, v in (test.get(name) or {}).items()}
    real = not found and test.get("logloss") is None and test.get("rmse") is not None
    return {"rmse": test["rmse"]} if real else found


def summarise(rows: Sequence[dict[str, Any]]) -> list[Summary]:
    """Means and standard deviations over the seeds of each (model, method, size), in order of appearance."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"], row["size"]), []).append(row)
    full = {
        (r["model"], r["seed"]): r["test"]
        for r in rows
        if r["method"] == "full" and r["status"] == "ok" and r["test"] is not None
    }
    return [_summary(key, members, full) for key, members in groups.items()]


def _summary(
    key: tuple[str, str, str], rows: list[dict[str, Any]], full: dict[tuple[str, int], dict[str, Any]]
) -> Summary:
    tested = [r for r in rows if r["status"] == "ok" and r["test"] is not None]
    good = [r for r in tested if r["test"]["auc"] is not None or ranking_of(r["test"])]
    if not good:
        bad = rows[0]
        none = "no test split" if bad.get("test") is None else "the test rows are of one class, so they have no AUC"
        return Summary(*key, status=bad["status"], reason=bad["reason"] or none, seeds=0)
    found: dict[str, list[float]] = {}
    gains: dict[str, list[float]] = {}
    for r in good:
        base = _told(full.get((r["model"], r["seed"]), {}))
        for name, value in _told(r["test"]).items():
            found.setdefault(name, []).append(value)
            if name in base:
                gains.setdefault(name, []).append(value - base[name])
    ranked = [name for name in found if name not in ("auc", "logloss")]
    parts = good[0]["footprint"]
    missing = [r for r in rows if r["status"] != "ok"]
    return Summary(
        *key,
        status="ok",
        reason="; ".join(f"seed {r['seed']}: {r['reason']}" for r in missing),
        seeds=len(good),
        auc=_mean(found.get("auc", [])),
        auc_sd=_sd(found.get("auc", [])),
        logloss=_mean(found.get("logloss", [])),
        logloss_sd=_sd(found.get("logloss", [])),
        auc_gain=_mean(gains.get("auc", [])),
        auc_gain_sd=_sd(gains.get("auc", [])),
        footprint=Footprint(
            **{k: parts[k] for k in ("weights", "index", "optimizer", "gradient")}, unrounded=parts.get("unrounded", 0)
        ),
        compression=good[0]["compression"],
        samples_per_s=statistics.median(r["samples_per_s"] for r in good),
        ranking={name: statistics.fmean(found[name]) for name in ranked},
        ranking_sd={name: _sd(found[name]) for name in ranked},
        ranking_gain={name: statistics.fmean(gains[name]) for name in ranked if name in gains},
        ranking_gain_sd={name: _sd(gains[name]) for name in ranked if name in gains},
    )


def _told(test: dict[str, Any]) -> dict[str, float]:
    """Metrics of a row that it has, by name."""
    values = {"auc": test.get("auc"), "logloss": test.get("logloss"), **ranking_of(test)}
    return {name: value for name, value in values.items() if value is not None}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
