"""One training run from settings and a data folder to a run folder with results."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recsys_embed.core.footprint import Footprint, format_bytes, parse_bytes
from recsys_embed.data.folder import lock
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.features import Schema
from recsys_embed.models import CTRModel, build_model, get_model
from recsys_embed.optim import make_rule
from recsys_embed.plan import Plan
from recsys_embed.planning.planner import plan_for_budget
from recsys_embed.train.checkpoint import save_checkpoint
from recsys_embed.train.config import DENSE_ADAM, PLANNED, TrainConfig
from recsys_embed.train.loop import CHECKPOINT, Trainer, TrainResult
from recsys_embed.utils.files import write_json
from recsys_embed.utils.versions import installed_versions

LINEAR_METHOD = "unified"
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints of a run under torchrun; the file ``latest`` there names the newest."""


@dataclass(frozen=True)
class Plans:
    """Plans of a model's two collections; ``full_bytes`` is what both take uncompressed."""

    vectors: Plan
    linear: Plan | None
    full_bytes: int


def plans_for(schema: Schema, config: TrainConfig, data: Any = None) -> Plans:
    """Plans that hold the embedding part of ``config.model`` to its ``ratio`` or ``budget``.

    The budget covers vectors and first-order weights together. First-order weights get one part in ``D + 1`` (their
    share uncompressed), stored as one shared hashed array of width 1: the hashing trick. Without a budget the method's
    own parameters decide the vectors and first-order weights stay whole; beside a plan of the vectors they get their
    part of its bytes.

    Args:
        data: opened data set, whose frequencies the planner goes by (method ``"planned"`` without a plan).

    Raises:
        BudgetError: the method cannot meet the budget.
    """
    cls = get_model(config.model)
    vectors = schema if cls.uses_vectors else schema.with_dim(1)
    narrow = schema.with_dim(1) if cls.uses_vectors and cls.uses_linear else None
    # Arithmetic, not a plan: with raw ids no plain table can be built, yet it is what sizes are measured against.
    full_bytes = sum(4 * f.num_embeddings * f.embedding_dim for s in (vectors, narrow) if s is not None for f in s)
    budget = None
    if config.budget is not None:
        budget = parse_bytes(config.budget)
    elif config.ratio is not None:
        budget = int(full_bytes / config.ratio)
    if config.method == "full" and budget is None:
        return Plans(Plan.full(vectors), None if narrow is None else Plan.full(narrow), full_bytes)
    given = None if config.plan is None else Plan.from_dict(config.plan)
    if given is not None and budget is None:
        spent = given.footprint(vectors).serve
        budget = spent + max(spent // config.embedding_dim, 4)
    linear = None
    if narrow is not None and budget is not None:
        share = budget // (config.embedding_dim + 1)
        linear = Plan.uniform(narrow, LINEAR_METHOD, budget=share)
        budget -= linear.footprint(narrow).serve
    if given is not None:
        need = given.footprint(vectors).serve
        if budget is not None and need > budget:
            raise BudgetError(
                f"the plan needs {format_bytes(need)} for the vectors; the budget leaves {format_bytes(budget)}. "
                "Ways out: 1. a larger budget, or none; 2. plan again for less"
            )
        return Plans(given, linear, full_bytes)
    if config.method == PLANNED and budget is not None:
        stats = data if hasattr(data, "manifest") else None
        options = {"needs_equal_widths": cls.needs_equal_widths, **config.method_args}
        return Plans(plan_for_budget(vectors, budget, stats=stats, **options), linear, full_bytes)
    return Plans(Plan.uniform(vectors, config.method, budget=budget, **config.method_args), linear, full_bytes)


def resolve(schema: Schema, config: TrainConfig, data: Any) -> TrainConfig:
    """``config`` with the plan that method ``"planned"`` comes to on ``data``, so that a run says what it stored."""
    if config.method != PLANNED or config.plan is not None:
        return config
    return config.replace(plan=plans_for(schema, config, data).vectors.to_dict(), method_args={})


def make_optimizer(config: TrainConfig) -> Any:
    """The fused optimizer of the tables, or None for ``dense_adam``."""
    if config.embedding_optimizer == DENSE_ADAM:
        return None
    lr = config.embedding_learning_rate or config.learning_rate
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in config.embedding_optimizer_args.items()}
    if config.embedding_weight_decay:
        args = {"weight_decay": config.embedding_weight_decay, "rows": "all", **args}
    if "lr" in args:
        raise ConfigError("the tables' rate is `embedding_learning_rate`, not an `lr` in `embedding_optimizer_args`")
    try:
        return make_rule(config.embedding_optimizer, lr=lr, **args)
    except ConfigError as e:
        raise ConfigError(f"`embedding_optimizer_args`: {e}") from e


def model_from_config(
    config: TrainConfig, schema: Schema, num_dense: int, device: torch.device | str | None = None
) -> CTRModel:
    """Build the model of a run; ``schema`` has the width ``config.embedding_dim``."""
    plans = plans_for(schema, config)
    return build_model(
        config.model,
        schema,
        plans.vectors,
        plans.linear,
        num_dense=num_dense,
        optimizer=make_optimizer(config),
        seed=config.seed,
        backend=config.backend,
        device=device,
        **config.model_args,
    )


@dataclass(frozen=True)
class RunOutcome:
    """A finished run: what it measured and what its embeddings take."""

    result: TrainResult
    footprint: Footprint
    full_bytes: int
    model: CTRModel


def run_training(
    config: TrainConfig,
    data: Any,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    tensorboard: bool = False,
    save_model: bool = True,
    show_progress: bool | None = None,
    label: str = "train",
) -> RunOutcome:
    """Train by ``config`` on an opened data set; a run folder belongs to one process at a time.

    Args:
        config: settings.
        data: data set of :func:`recsys_embed.data.open_dataset`, or anything with its methods.
        folder: run folder; gets ``config.json``, ``run.json``, ``log.jsonl``, ``checkpoint.pt``, ``result.json`` and
            ``model.pt``. None keeps nothing.
        resume: go on from the folder's checkpoint; without one the run starts from the beginning.
        device: e.g. ``"cuda"``; None: CPU.
        tensorboard: also write TensorBoard events.
        save_model: write ``model.pt`` at the end.
        show_progress: see :class:`Trainer`.
        label: text beside the progress bar.

    Raises:
        ConfigError: the folder already holds a run and ``resume`` is False, or one under torchrun; the device cannot
            be used.
    """
    folder = None if folder is None else Path(folder)
    with nullcontext() if folder is None else lock(folder):
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if device is not None:
            check_device(device)
        schema = schema_of(data, config)
        config = resolve(schema, config, data)
        going_on = goes_on(folder, resume)
        model = model_from_config(config, schema, data.num_dense, device)
        if config.standardise and data.num_dense:
            model.standardise(*data.numeric_moments())
        footprint = trained_footprint(model)
        full_bytes = plans_for(schema, config).full_bytes
        identity = {"data": fingerprint(schema, data)}
        if folder is not None:
            write_json(folder / "config.json", config.to_dict())
            write_json(
                folder / "run.json", {"seed": config.seed, **environment(), "footprint": footprint_dict(footprint)}
            )
        trainer = Trainer(
            model,
            data,
            config,
            folder=folder,
            resume=going_on,
            tensorboard=tensorboard,
            device=device,
            show_progress=show_progress,
            label=label,
            identity=identity,
        )
        result = trainer.run()
        if folder is not None:
            if save_model:
                save_checkpoint(folder / "model.pt", {**config.to_dict(), **identity}, model=model.state_dict())
            write_json(folder / "result.json", plain(result.to_dict()))
        return RunOutcome(result, footprint, full_bytes, model)


def goes_on(folder: Path | None, resume: bool, *, torchrun: bool = False) -> bool:
    """Whether ``folder`` holds a run to go on with.

    Raises:
        ConfigError: it holds one and ``resume`` is False, or one whose checkpoints the other command reads.
    """
    if folder is None:
        return False
    alone, many = (folder / CHECKPOINT).exists(), (folder / CHECKPOINTS / "latest").exists()
    if (alone or many) and not resume:
        raise ConfigError(f"{folder} already holds a run; go on with it (--resume) or choose another folder (--out)")
    if many and not torchrun:
        raise ConfigError(
            f"{folder} holds a run under torchrun; go on with it so, on any number of processes "
            "(torchrun --nproc-per-node 1 for one), or choose another folder (--out)"
        )
    if alone and torchrun:
        raise ConfigError(f"{folder} holds a run without torchrun; go on with it so, or choose another folder (--out)")
    return alone or many


def trained_footprint(model: CTRModel) -> Footprint:
    """Bytes of the embedding part in a run: the trainer's Adam keeps two moments of what no fused optimizer holds."""
    ordinary = {p for c in model.collections().values() for p in c.parameters() if p.requires_grad}
    return model.footprint() + Footprint(optimizer=2 * sum(p.nbytes for p in ordinary))


def check_device(device: torch.device | str) -> None:
    """Raise ConfigError, with torch's reason, unless tensors can be made on ``device``."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {reason}; see 'recsys-embed doctor'") from e


def schema_of(data: Any, config: TrainConfig) -> Schema:
    """The data's features at the width and with the initial law and the unseen ids' policy of ``config``."""
    schema: Schema = data.schema(config.embedding_dim)
    return schema.with_init(config.embedding_init).with_unseen(config.unseen)


def fingerprint(schema: Schema, data: Any) -> str:
    """Short hash of the features and rows a run was trained on."""
    return hashlib.sha256(json.dumps([schema.to_dict(), data.digest], sort_keys=True).encode()).hexdigest()[:16]


def footprint_dict(footprint: Footprint) -> dict[str, int]:
    """A footprint as JSON values, sums included."""
    return {
        "weights": footprint.weights,
        "index": footprint.index,
        "optimizer": footprint.optimizer,
        "gradient": footprint.gradient,
        "serve": footprint.serve,
        "train": footprint.train,
    }


def environment() -> dict[str, Any]:
    """Versions, commit and command line: what else a result depends on."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    versions = {k: v for k, v in installed_versions().items() if v is not None} | {"torch": str(torch.__version__)}
    return {"python": sys.version.split()[0], "versions": versions, "commit": commit, "command": sys.argv}


def plain(value: Any) -> Any:
    """JSON values: numbers that JSON lacks become None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
