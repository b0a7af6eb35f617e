"""``recsys-embed train``: one model, one method, one run folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.cli._settings import say_few_steps, split_settings, train_config
from recsys_embed.core.footprint import format_bytes
from recsys_embed.errors import ConfigError
from recsys_embed.plan import Plan
from recsys_embed.train import Interrupted, run_training
from recsys_embed.train.config import PLANNED
from recsys_embed.train.driver import RunOutcome
from recsys_embed.train.json_values import footprint_dict, json_ready
from recsys_embed.train.plans import on_top_of
from recsys_embed.train.warm_start import settings_of_run
from recsys_embed.utils.types import JSON

EXIT_INTERRUPTED = 130


def train(
    data: opt.Data,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings, TOML or JSON; options below override them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; default runs/train/MODEL-METHOD-sSEED.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's checkpoint.")] = False,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--start-from",
            help="Folder of a finished run, or its model.pt: train its model on, by its settings where none are given.",
        ),
    ] = None,
    model: opt.Model = None,
    method: Annotated[
        str | None, typer.Option("--method", help="How embeddings are stored; default full, planned under a budget.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Plan of 'recsys-embed plan --out', instead of --method.")
    ] = None,
    ratio: opt.Ratio = None,
    budget: opt.Budget = None,
    embedding_dim: opt.EmbeddingDim = None,
    epochs: opt.Epochs = None,
    steps: opt.Steps = None,
    batch_size: opt.BatchSize = None,
    learning_rate: opt.LearningRate = None,
    patience: opt.Patience = None,
    seed: opt.Seed = None,
    assign: opt.Assign = None,
    device: opt.Device = "cpu",
    shard: Annotated[
        str | None, typer.Option("--shard", help="Under torchrun: how TorchRec shards all tables, e.g. row_wise.")
    ] = None,
    export_to: Annotated[
        Path | None,
        typer.Option("--export", help="Also export the trained model to this file, at fp32, as `recsys-embed export`."),
    ] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events into the run folder.")] = True,
    as_json: opt.Json = False,
) -> int:
    """Train one model and report its test metrics and bytes. Ctrl-C keeps a checkpoint for --resume.

    Started by torchrun on several processes, they train it together: torchrun --nproc-per-node 2 -m recsys_embed train
    """
    from recsys_embed.data import open_dataset

    together = _together(shard, start_from)
    if plan is not None and method not in (None, PLANNED):
        raise ConfigError(f"give either --plan or --method; got {plan} and {method!r}")
    options = {
        "model": model,
        "method": PLANNED if plan is not None else method,
        "plan": None if plan is None else Plan.load(plan).to_dict(),
        "ratio": ratio,
        "budget": budget,
        "embedding_dim": embedding_dim,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "patience": patience,
        "seed": seed,
    }
    earlier = {} if start_from is None else settings_of_run(start_from)
    settings = train_config({**earlier, **split_settings(config)[0]}, options, assign or [], planned=True)
    folder = out or Path("runs/train") / f"{settings.model}-{settings.method}-s{settings.seed}"
    dataset = open_dataset(data)
    speaks = os.environ.get("RANK", "0") == "0"
    if speaks:
        say_few_steps(dataset, settings)
    keep: dict[str, Any] = {"folder": folder, "resume": resume, "device": device, "tensorboard": tensorboard}
    try:
        if together:
            from recsys_embed.sharding.run import run_sharded

            outcome = run_sharded(settings, dataset, kinds=shard, **keep)
        else:
            outcome = run_training(settings, dataset, start_from=start_from, **keep)
    except Interrupted as e:
        if speaks:
            print(f"recsys-embed: {e}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if not speaks:
        return 0
    if export_to is not None:
        from recsys_embed.exports import export as write

        report = write(folder, export_to)
        print(report, file=sys.stderr if as_json else sys.stdout)
    extra = on_top_of(dataset.schema(settings.embedding_dim), settings)
    _tell(summarise(outcome), folder, extra, as_json)
    return 0


def _tell(summary: dict[str, Any], folder: Path, extra: int, as_json: bool) -> None:
    """Print a finished run, with the bytes that come on top of its plan."""
    print(json.dumps({**summary, "folder": str(folder)}, indent=2) if as_json else render(summary, folder))
    if extra and not as_json:
        print(f"first-order weights (linear tables), {format_bytes(extra)}, come on top of the plan")


def _together(shard: str | None, start_from: Path | None) -> bool:
    """Whether several processes train together."""
    # A torchrun group of one process counts too: it can resume a run of several processes.
    together = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if shard is not None and not together:
        raise ConfigError("--shard goes with several processes: torchrun --nproc-per-node N -m recsys_embed train ...")
    if start_from is not None and together:
        raise ConfigError("--start-from goes with one process: train without torchrun")
    return together


def summarise(outcome: RunOutcome) -> dict[str, Any]:
    """A finished run as JSON values."""
    result = json_ready(outcome.result.to_dict())
    result["footprint"] = footprint_dict(outcome.footprint)
    result["compression"] = outcome.full_bytes / outcome.footprint.serve
    return dict(result)


def told(metrics: JSON) -> str:
    """The metrics of a split as text."""
    parts = [
        f"{title}@{k} {value:.4f}"
        for name, title in (("recall", "recall"), ("ndcg", "NDCG"))
        for k, value in (metrics.get(name) or {}).items()
    ]
    for name, title in (("rmse", "RMSE"), ("auc", "AUC"), ("grouped_auc", "grouped AUC"), ("logloss", "logloss")):
        if metrics.get(name) is not None:
            parts.append(f"{title} {metrics[name]:.4f}")
        elif name == "auc" and not parts:
            parts.append("AUC -")
    return "  ".join(parts)


def render(summary: dict[str, Any], folder: Path) -> str:
    """The result as text."""
    lines = []
    for split in ("valid", "test"):
        if (m := summary[split]) is not None:
            lines.append(f"{split:>5}: {told(m)}  ({m['samples']:,} rows)")
    parts = summary["footprint"]
    lines.append(
        f"bytes: weights {format_bytes(parts['serve'])}, training {format_bytes(parts['train'])}, "
        f"compression {summary['compression']:.1f}x"
    )
    lines.append(
        f"steps: {summary['steps']} (best at {summary['best_step']}), {summary['samples_per_s']:,.0f} samples/s; "
        f"files in {folder}"
    )
    return "\n".join(lines)
