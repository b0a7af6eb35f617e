"""A search from settings and data to a run folder with a plan, a model and a report."""

from __future__ import annotations

from pathlib import Path

import torch

from recsys_embed.collection.optimizer_state import weights_of
from recsys_embed.core.footprint import format_bytes, parse_bytes
from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.features import Schema
from recsys_embed.plan import Plan
from recsys_embed.search.base import Search
from recsys_embed.search.folder import SearchFolder, held
from recsys_embed.search.outcome import SearchOutcome
from recsys_embed.search.report import CURVES, curves_of, page
from recsys_embed.search.retrain import planned
from recsys_embed.train.build import trained_footprint
from recsys_embed.train.checkpoint import save_checkpoint
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.driver import data_folder
from recsys_embed.train.environment import check_device, environment
from recsys_embed.train.inputs import check_data, check_rows, fingerprint, schema_of
from recsys_embed.train.plans import plans_for
from recsys_embed.utils.settings import Settings


def total_budget(config: TrainConfig, schema: Schema) -> int | None:
    """Bytes that ``budget`` or ``ratio`` of the settings allow the embedding part."""
    if config.budget is not None:
        return parse_bytes(config.budget)
    if config.ratio is None:
        return None
    return int(plans_for(schema, config.replace(method="full", ratio=None)).full_bytes / config.ratio)


def _check_tables(schema: Schema) -> None:
    """Refuse features whose rows a search cannot choose."""
    raw = [s.name for s in schema if s.ids == "raw"]
    if raw:
        raise ConfigError(
            f"a search needs ids of a vocabulary; {', '.join(raw)} {'have' if len(raw) > 1 else 'has'} raw 64-bit ids, "
            "which have no rows to choose from: convert the data with a vocabulary, or choose hashing methods and "
            "sizes by `search methods` or `plan`"
        )


def run_search(
    kind: type[Search],
    config: TrainConfig,
    data: DataSource,
    settings: Settings,
    *,
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
    show_progress: bool | None = None,
) -> SearchOutcome:
    """Search, extract, retrain and test; a search that was stopped at any point resumes there.

    A killed search resumes from its last checkpoint, written as a :class:`Trainer` writes them in every
    stage, and comes to the same bits; the evolution counts a candidate on a batch of rows as a step.

    If a budget is too small, the same folder accepts another, and reuses what OptEmbed or DNIS trained.

    Args:
        kind: which search.
        config: training settings; its ``budget`` or ``ratio`` is what the plan must keep to.
        data: data set of :func:`recsys_embed.data.open_dataset`, or one of your own, see
            :class:`recsys_embed.data.DataSource`.
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
    if config.method != "full" or config.method_args or config.plan is not None:
        raise ConfigError(
            f"a search starts from full tables; drop `method`, `method_args` and `plan`; got {config.method!r}"
            + (f" with {config.method_args}" if config.method_args else "")
        )
    check_data(data, config, "a search")
    check_rows(data, config)
    schema = schema_of(data, config)
    _check_tables(schema)
    path = None if folder is None else Path(folder)
    if device is not None:
        check_device(device)
    with held(path):
        if config.threads is not None:
            torch.set_num_threads(config.threads)
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
            cost=sum(seconds.values()) / search.full_training_seconds(),
        )
        if path is not None:
            final_config = planned(bare, plan, budget).to_dict()
            save_checkpoint(path / "model.pt", {**final_config, "data": identity["data"]}, model=weights_of(model))
            store.put("run", {**environment(), **data_folder(data)})
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
