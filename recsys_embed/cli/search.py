"""``recsys-embed search``: search rows and widths end to end: search, extract, retrain, test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.cli._settings import say_few_steps, search_settings, train_config
from recsys_embed.cli._studies import methods, pick
from recsys_embed.core.footprint import format_bytes
from recsys_embed.models import vector_models
from recsys_embed.report.search_curves import plot_curves
from recsys_embed.search import Search, SearchOutcome, list_searches, run_search
from recsys_embed.train import Interrupted
from recsys_embed.train.quality import metrics_text

EXIT_INTERRUPTED = 130
DEFAULT_DECAY = 1e-3
"""Default L2 penalty of the tables, without which no rows are pruned."""

search_app = typer.Typer(
    no_args_is_help=True,
    help="Find rows and widths to keep, retrain and test; stopped runs go on when run again.",
)

search_app.command()(methods)
search_app.command()(pick)

_Config = Annotated[
    Path | None, typer.Option("--config", help="Training settings, TOML or JSON; [search] the search's.")
]
_Out = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/search/METHOD-MODEL-sSEED.")]
_Model = Annotated[str | None, typer.Option("--model", help=f"{', '.join(vector_models())}.")]


def _add(kind: type[Search]) -> None:
    """Add the command of a search; all searches have the same options."""

    @search_app.command(kind.method, help=kind.summary)
    def command(
        data: opt.Data,
        config: _Config = None,
        out: _Out = None,
        model: _Model = None,
        budget: opt.Budget = None,
        ratio: opt.Ratio = None,
        embedding_dim: opt.EmbeddingDim = None,
        epochs: opt.Epochs = None,
        batch_size: opt.BatchSize = None,
        learning_rate: opt.LearningRate = None,
        seed: opt.Seed = None,
        assign: opt.SearchAssign = None,
        device: opt.Device = "cpu",
        as_json: opt.Json = False,
    ) -> int:
        options = {
            "model": model,
            "budget": budget,
            "ratio": ratio,
            "embedding_dim": embedding_dim,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        return _search(kind, data, config, out, options, assign, device, as_json)


for _kind in list_searches():
    _add(_kind)


def read_search(
    path: Path | None, options: dict[str, Any], assignments: list[str], settings_cls: Any
) -> tuple[Any, Any]:
    """Training settings and those of a search, from a file, options and ``key=value`` texts, later ones winning."""
    settings, own, rest = search_settings(path, assignments)
    config = train_config({"embedding_weight_decay": DEFAULT_DECAY, **settings}, options, rest)
    return config, settings_cls.from_dict(own)


def _search(
    kind: type[Search],
    data: Path,
    config: Path | None,
    out: Path | None,
    options: dict[str, Any],
    assign: list[str] | None,
    device: str,
    as_json: bool,
) -> int:
    from recsys_embed.data import open_dataset

    train, settings = read_search(config, options, assign or [], kind.settings_cls)
    folder = out or Path("runs/search") / f"{kind.method}-{train.model}-s{train.seed}"
    dataset = open_dataset(data)
    say_few_steps(dataset, train)
    try:
        outcome = run_search(kind, train, dataset, settings, folder=folder, device=device)
    except Interrupted:
        print(f"recsys-embed: stopped; run the same command again to go on in {folder}", file=sys.stderr)
        return EXIT_INTERRUPTED
    plot_curves(json.loads((folder / "curves.json").read_text(encoding="utf-8")), folder / "curves.png")
    print(json.dumps({**outcome.to_dict(), "folder": str(folder)}, indent=2) if as_json else render(outcome, folder))
    return 0


def render(outcome: SearchOutcome, folder: Path) -> str:
    """The result as text."""
    lines = []
    for split, m in (("valid", outcome.result.valid), ("test", outcome.result.test)):
        if m is not None:
            lines.append(f"{split:>5}: {metrics_text(m)} ({m.samples:,} rows)")
    serve = outcome.footprint.serve
    lines.append(
        f"bytes: {format_bytes(serve)} of {format_bytes(outcome.full_bytes)}, compression "
        f"{outcome.full_bytes / serve:.1f}x"
    )
    lines.append(f"cost: {outcome.cost:.1f} trainings over full tables ({sum(outcome.seconds.values()):,.0f} s)")
    lines.append(f"plan: {folder / 'plan.json'}; report: {folder / 'report.md'}")
    return "\n".join(lines)
