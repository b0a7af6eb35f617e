"""``recsys-embed compare``: train several methods at the same bytes and print one table."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.cli._settings import names, numbers, say_few_steps, split_settings, train_config
from recsys_embed.errors import ConfigError
from recsys_embed.models import hyperparameters
from recsys_embed.report.comparison import markdown_table, reasons, rich_table
from recsys_embed.report.pareto import plot_pareto
from recsys_embed.train import Interrupted
from recsys_embed.train.compare import Comparison, Summary, all_methods, ranking_of, run_comparison, summarise
from recsys_embed.train.environment import environment
from recsys_embed.train.json_values import footprint_dict
from recsys_embed.utils.files import write_json, write_text
from recsys_embed.utils.settings import build

EXIT_INTERRUPTED = 130
DEMO_ROWS = 400_000
DEMO_SEED = 1
DEMO_SETTINGS = {"epochs": 3, "batch_size": 1024, "learning_rate": 1e-3}
DEMO_MODEL_ARGS = {"hidden": [128, 64], "dropout": 0.1, "batch_norm": True}
DEMO_COMPARISON = {"methods": ["all"], "ratios": [10.0]}


def compare(
    data: Annotated[Path | None, typer.Option(help="Folder made by 'recsys-embed data'.")] = None,
    source: Annotated[
        str | None, typer.Option("--input", help="Criteo text instead: converted with default options to OUT/data.")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Seeded synthetic rows instead: the embedded default.")] = False,
    out: Annotated[Path, typer.Option(help="Run folder; finished rows in it are not trained again.")] = Path(
        "runs/compare"
    ),
    config: Annotated[Path | None, typer.Option(help="Settings, TOML or JSON; [compare] holds what varies.")] = None,
    models: Annotated[str | None, typer.Option("--models", "--model", help="Keys, comma-separated.")] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", "--method", help="'all', or keys; full is always there.")
    ] = None,
    ratios: Annotated[
        str | None, typer.Option("--ratios", "--ratio", help="Compressions, e.g. 4,20: bytes of full over these.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", "--budget", help="Embedding bytes instead, e.g. 1MiB,4MiB.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Repetitions; each fixes data order and start of all.")] = None,
    embedding_dim: opt.EmbeddingDim = None,
    epochs: opt.Epochs = None,
    steps: opt.Steps = None,
    batch_size: opt.BatchSize = None,
    learning_rate: opt.LearningRate = None,
    patience: opt.Patience = None,
    assign: opt.Assign = None,
    device: opt.Device = "cpu",
    as_json: opt.Json = False,
) -> int:
    """Train methods with the same settings and bytes, and print AUC, logloss, bytes and speed of each.

    Of retrieval models, such as twotower, also recall@k and NDCG@k.

    OUT gets results.json, table.md, pareto.png and a file per row; a comparison that was stopped resumes there.
    """
    settings, varied = split_settings(config)
    if demo:
        varied = {**DEMO_COMPARISON, **varied}
        chosen = names(models) if models is not None else tuple(varied.get("models", Comparison.models))
        known = {key for model in chosen for key in hyperparameters(model)}
        shared = {k: v for k, v in DEMO_MODEL_ARGS.items() if k in known}
        settings = {**DEMO_SETTINGS, "model_args": shared, **settings}
    options = {
        "embedding_dim": embedding_dim,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "patience": patience,
    }
    train = train_config(settings, options, assign or [])
    given: dict[str, Any] = {
        "models": None if models is None else names(models),
        "methods": None if methods is None else names(methods),
        "ratios": None if ratios is None else numbers(ratios),
        "budgets": None if budgets is None else names(budgets),
        "seeds": seeds,
    }
    if budgets is not None and ratios is None:
        varied = {**varied, "ratios": []}
    comparison = make_comparison(varied, given, train)
    dataset = open_source(data, source, demo, out, quiet=as_json)
    say_few_steps(dataset, train)
    write_json(out / "run.json", environment())
    try:
        rows = run_comparison(comparison, dataset, out, device=device, on_row=None if as_json else say_row)
    except Interrupted as e:
        print(f"recsys-embed: {e}", file=sys.stderr)
        print(f"recsys-embed: finished rows are in {out}; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    summaries = summarise(rows)
    results = write_results(out, comparison, rows, summaries, dataset)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        show(summaries, results, out)
    return 0


def make_comparison(varied: dict[str, Any], given: dict[str, Any], train: Any) -> Comparison:
    """A comparison of the table ``[compare]``, overridden by the options that were given (not None)."""
    if "train" in varied:
        raise ConfigError("settings of training stand at the top of the file, not as `train` in [compare]")
    merged = {**varied, **{k: v for k, v in given.items() if v is not None}, "train": train}
    chosen = merged.get("methods")
    if isinstance(chosen, list | tuple) and "all" in chosen:
        merged["methods"] = all_methods()
    return build(Comparison, merged, "key of [compare]", where="[compare]")


def open_source(data: Path | None, source: str | None, demo: bool, out: Path, *, quiet: bool) -> Any:
    """The data set of ``--data``, ``--input`` or ``--demo``, exactly one of which is given."""
    from recsys_embed.cli._table import show_progress
    from recsys_embed.data import convert_criteo, make_synthetic, open_dataset

    if sum((data is not None, source is not None, demo)) != 1:
        raise ConfigError("give one of --data FOLDER, --input FILE or --demo")
    if data is not None:
        return open_dataset(data)
    folder = out / "data"
    with show_progress(quiet) as progress:
        if demo:
            make_synthetic(folder, rows=DEMO_ROWS, seed=DEMO_SEED, progress=progress)
        elif source is not None:
            convert_criteo(source, folder, progress=progress)
    return open_dataset(folder)


def say_row(number: int, total: int, row: dict[str, Any]) -> None:
    """Print one line per finished row."""
    name = " ".join(p for p in (row["model"], row["method"], row["size"], f"seed {row['seed']}") if p)
    if row["status"] != "ok":
        text = f"{row['status']}: {' '.join(row['reason'].split())[:120]}"
    elif row["test"] is None:
        text = "trained; no test split"
    else:
        text = (
            f"{_told(row['test'])}  {row['footprint']['serve'] / 2**20:.3f} MiB  {row['samples_per_s']:,.0f} samples/s"
        )
    print(f"[{number}/{total}] {name}: {text}", flush=True)


def _told(test: dict[str, Any]) -> str:
    """The metric that rows are chosen by."""
    ranked = [(name, v) for name, v in ranking_of(test).items() if name.startswith(("ndcg", "rmse"))]
    found = next(iter(ranked), ("AUC", test["auc"]))
    return (
        f"{found[0].replace('ndcg', 'NDCG').replace('rmse', 'RMSE')} {'-' if found[1] is None else f'{found[1]:.4f}'}"
    )


def write_results(
    out: Path, comparison: Comparison, rows: list[dict[str, Any]], summaries: list[Summary], dataset: Any
) -> dict[str, Any]:
    """Write ``results.json``, ``table.md`` and ``pareto.png``; returns what the first holds."""
    results = {
        "comparison": {**dataclasses.asdict(comparison), "train": comparison.train.to_dict()},
        "environment": environment(),
        "data": {"path": str(dataset.path), "splits": dict(dataset.splits), "truth": dataset.truth},
        "summary": [{**dataclasses.asdict(s), "footprint": footprint_dict(s.footprint)} for s in summaries],
        "rows": rows,
    }
    write_json(out / "results.json", results)
    write_text(out / "table.md", markdown_table(summaries))
    plot_pareto(summaries, out / "pareto.png")
    return results


def show(summaries: list[Summary], results: dict[str, Any], out: Path) -> None:
    """Print the table, the reasons for rows without results, and the paths of the files."""
    from rich.console import Console

    seeds = results["comparison"]["seeds"]
    table = rich_table(summaries, f"test split, {seeds} seed{'s' if seeds > 1 else ''}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    # A line that wraps can be read; a number that is cut cannot.
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(width=max(console.width, needed)).print(table)
    for line in reasons(summaries):
        console.print(line, style="dim", highlight=False)
    if (truth := results["data"]["truth"]) is not None:
        best = truth["attainable"]["test"]
        console.print(
            f"attainable here (the planted probabilities): AUC {best['auc']:.4f}  logloss {best['logloss']:.4f}",
            highlight=False,
        )
    console.print(f"files in {out}: results.json, table.md, pareto.png, rows/", highlight=False)
