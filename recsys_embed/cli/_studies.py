"""``recsys-embed search methods`` and ``pick``: a study over methods, sizes and widths, and training of one trial."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.cli._settings import names, say_few_steps, search_settings, train_config
from recsys_embed.core.footprint import format_bytes, parse_bytes
from recsys_embed.errors import ConfigError, RecsysEmbedError
from recsys_embed.train import Interrupted, TrainConfig
from recsys_embed.train.quality import AUC, Quality, metrics_text
from recsys_embed.utils.files import drop_leftovers, write_json, write_text
from recsys_embed.utils.settings import Settings
from recsys_embed.utils.strict_json import read_object

EXIT_INTERRUPTED = 130
STUDY = "study.json"


@dataclass(frozen=True)
class StudyRequest(Settings):
    """What ``search methods`` was asked for, kept in the study's folder for ``pick`` and for later runs.

    Args:
        data: data folder.
        train: settings of training, see :class:`TrainConfig`.
        study: settings of the study, see :class:`recsys_embed.search.studies.settings.StudySettings`.
        storage: URL or file; None for the file in the study's own folder.
        device: e.g. ``"cuda"``.
    """

    data: str
    train: Mapping[str, Any]
    study: Mapping[str, Any]
    storage: str | None
    device: str


def methods(
    data: Annotated[Path, typer.Option("--data", help="Folder made by 'recsys-embed data'.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="Training settings, TOML or JSON; [search] the study's.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default runs/search/methods-MODEL-sSEED.")] = None,
    model: opt.Model = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", "--budget", help="Shares of the full tables or bytes, e.g. 5%,1MiB.")
    ] = None,
    chosen: Annotated[
        str | None, typer.Option("--methods", help="Keys, comma-separated; default: all that a budget sizes.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Trials of the study, over all workers.")] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="nsgaii, tpe, random, ... or evolution (OptEmbed's).")
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            "--objectives", help="auc (rmse of real labels, ndcg of items), or auc,bytes, or auc,bytes,latency."
        ),
    ] = None,
    proxy: Annotated[float | None, typer.Option("--proxy", help="Trials take this share of the steps.")] = None,
    check: Annotated[int, typer.Option("--check-proxy", help="Train this many trials in full, as a check.")] = 6,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="URL or file; default OUT/study.db; NAME.journal: a journal. A server's password may be in "
            "RECSYS_EMBED_STORAGE_PASSWORD.",
        ),
    ] = None,
    warm: Annotated[str | None, typer.Option("--warm-from", help="Storage of an earlier study.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes on this machine.")] = 1,
    embedding_dim: opt.EmbeddingDim = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    learning_rate: opt.LearningRate = None,
    seed: opt.Seed = None,
    assign: opt.SearchAssign = None,
    device: opt.Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Optuna study: which method, how large and how wide, for each group of fields, within hard byte budgets."""
    from recsys_embed.search.studies.optuna_library import require_optuna
    from recsys_embed.search.studies.urls import file_of, without_password

    require_optuna()

    given, own, rest = search_settings(config, assign or [])
    listed = {"budgets": budgets, "methods": chosen, "objectives": objectives}
    own |= {k: list(names(v)) for k, v in listed.items() if v is not None}
    own |= {k: v for k, v in {"trials": trials, "sampler": sampler, "proxy": proxy}.items() if v is not None}
    options = {"model": model, "embedding_dim": embedding_dim, "epochs": epochs, "batch_size": batch_size,
               "learning_rate": learning_rate, "seed": seed}  # fmt: skip
    train = train_config(given, options, rest)
    folder = out or Path("runs/search") / f"methods-{train.model}-s{train.seed}"
    place = file_of(storage) if storage is not None else None
    where = str(place) if place and "://" not in str(storage) else storage
    if place == (folder / "study.db").absolute():  # what lies in the folder moves with it
        where = None
    request = StudyRequest(str(data.absolute()), train.to_dict(), own, where, device)
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1; got {workers}")
    study = _make_study(request, folder)
    say_few_steps(study.data, study.config)
    if warm is not None:
        queued, outside = study.warm_from(warm)
        print(f"from {without_password(warm)}: {queued} trials queued, {outside} outside this space", file=sys.stderr)
    try:
        _work(study, request, folder, workers, quiet=as_json)
        checked = None if study.settings.proxy == 1 else _check(study, check, quiet=as_json)
        study.sweep()
        drop_leftovers(folder, age=3600)
    except Interrupted:
        print("recsys-embed: stopped; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    results = write_results(study, folder, checked)
    if as_json:
        print(json.dumps(results, indent=2))
    elif results["front"]:
        print(f"{table(results)}\nfiles in {folder}: front.md, results.json, front.png")
    return 0 if results["front"] else _fail_without_front(results)


def _make_study(request: StudyRequest, folder: Path) -> Any:
    """Create the study in a folder, or open the one that it holds, and record what was asked for.

    Raises:
        ConfigError: the folder's study has another storage.
    """
    from recsys_embed.search.studies.urls import without_password

    folder.mkdir(parents=True, exist_ok=True)
    known = read_request(folder)
    kept = request.replace(storage=request.storage and without_password(request.storage))
    if known is not None and (known.storage and without_password(known.storage)) != kept.storage:
        raise ConfigError(
            f"{folder} holds the results of a study in another storage, see {folder / STUDY}: give that "
            "--storage (none: the folder's own study.db), or another --out"
        )
    study = open_study(request, folder, must_exist=known is not None)
    write_json(folder / STUDY, kept.to_dict())
    return study


def _fail_without_front(results: dict[str, Any]) -> int:
    """Explain why a study has no complete trial; returns the exit status."""
    reasons = Counter(r["reason"].partition(" (")[0] for r in results["trials"] if r["reason"])
    print(
        f"recsys-embed: no trial of {len(results['trials'])} is complete, so there is no front. Most often: "
        f"{reasons.most_common(1)[0][0] if reasons else 'they failed'}. Ways out: 1. larger --budgets; 2. other "
        "--methods; 3. more --trials",
        file=sys.stderr,
    )
    return 1


def read_request(folder: Path) -> StudyRequest | None:
    """The request of the study in a folder; None if it holds none.

    Raises:
        ConfigError: its file is damaged.
    """
    path = folder / STUDY
    if not path.exists():
        return None
    try:
        return StudyRequest.from_dict(read_object(path))
    except ConfigError as e:
        raise ConfigError(
            f"{path} is damaged; remove it and run the same 'recsys-embed search methods' again: finished trials are "
            f"not trained again. {e}"
        ) from e


def open_study(request: StudyRequest, folder: Path, *, must_exist: bool) -> Any:
    """The study of these settings; ``must_exist`` if it must exist already."""
    from recsys_embed.data import open_dataset
    from recsys_embed.search.studies.optuna_library import require_optuna

    require_optuna()
    from recsys_embed.search.studies.settings import StudySettings
    from recsys_embed.search.studies.study import MethodStudy

    return MethodStudy(
        TrainConfig.from_dict(request.train),
        open_dataset(Path(request.data)),
        StudySettings.from_dict(request.study),
        request.storage or str(folder / "study.db"),
        device=None if request.device == "cpu" else request.device,
        must_exist=must_exist,
        folder=folder,
    )


def _join(request: StudyRequest, folder: Path, quiet: bool) -> None:
    """Main function of an additional worker process."""
    try:
        study = open_study(request, folder, must_exist=True)
        study.work(None if quiet else partial(say, study.quality.label))
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)
    except RecsysEmbedError as e:
        sys.exit(f"recsys-embed: a worker ended: {e}")


def _work(study: Any, request: StudyRequest, folder: Path, workers: int, *, quiet: bool) -> None:
    spawn = multiprocessing.get_context("spawn")
    told = None if quiet else partial(say, study.quality.label)
    others = [spawn.Process(target=_join, args=(request, folder, quiet)) for _ in range(workers - 1)]
    for process in others:
        process.start()
    try:
        study.work(told)
        for process in others:
            process.join()
        # Finish the trials of workers that died.
        study.work(told)
    except BaseException:
        for process in others:
            process.terminate()
            process.join()
        raise


def say(label: str, trial: Any, number: int, total: int) -> None:
    """Print one line per trial, of a quality that people call ``label``."""
    if trial.values is None:
        text = trial.user_attrs.get("reason", "failed")
    else:
        text = f"{label} {trial.values[0]:.4f}  {format_bytes(trial.user_attrs['bytes'])}"
    print(f"[{number}/{total}] trial {trial.number}, {short(trial.params)}: {text}", flush=True)


def short(params: dict[str, Any]) -> str:
    """Parameters in a few words.

    >>> short({"budget": "5%", "all.method": "optembed", "all.width": 8, "all.share": 0.5})
    '5%: all optembed/8'
    """
    from recsys_embed.search.studies.space import takes_width

    groups = {k.removesuffix(".method"): v for k, v in params.items() if k.endswith(".method")}
    parts = [f"{g} {m}" + (f"/{params[f'{g}.width']}" if takes_width(m) else "") for g, m in groups.items()]
    return f"{params['budget']}: " + ", ".join(parts)


def _check(study: Any, count: int, *, quiet: bool) -> dict[str, Any] | None:
    from recsys_embed.search.studies.results import check_proxy

    def tell(number: int, proxy: float, full: float) -> None:
        print(f"trial {number} in full: {study.quality.label} {full:.4f} ({proxy:.4f} when short)", flush=True)

    return check_proxy(study, count, None if quiet else tell)


def write_results(study: Any, folder: Path, checked: dict[str, Any] | None) -> dict[str, Any]:
    """Write ``results.json``, ``front.md`` and ``front.png``; returns what the first holds."""
    from recsys_embed.report.study_front import front_of, plot_front
    from recsys_embed.search.studies.results import importance, rows_of

    with study.guarded():
        rows = rows_of(study)
        results = {
            "budgets": study.budgets,
            "full_bytes": study.full_bytes,
            "quality": study.quality.to_dict(),
            "front": front_of(rows, study.quality),
            "importance": importance(study),
            "proxy": checked,
            "trials": rows,
        }
    write_json(folder / "results.json", results)
    write_text(folder / "front.md", table(results) + "\n")
    plot_front(rows, folder / "front.png", study.budgets, study.quality)
    return results


def table(results: dict[str, Any]) -> str:
    """The Pareto front, parameter importances and the rank correlation of short with full training, as Markdown."""
    timed = any("latency" in r for r in results["front"])
    quality = Quality.from_dict(results["quality"]) if "quality" in results else AUC
    lines = [
        f"| trial | validation {quality.label} | bytes | of full |{' lookup ms |' if timed else ''} plan |",
        f"| ---: | ---: | ---: | ---: |{' ---: |' if timed else ''} --- |",
    ]
    for r in results["front"]:
        share, ms = r["bytes"] / results["full_bytes"], f" {r['latency']:.3f} |" if timed else ""
        lines.append(
            f"| {r['trial']} | {r[quality.key]:.4f} | {r['bytes']:,} | {share:.1%} |{ms} {short(r['params'])} |"
        )
    states = [r["state"] for r in results["trials"]]
    lines += ["", f"{states.count('complete')} trials complete, {states.count('pruned')} stopped or refused."]
    if results["importance"]:
        parts = sorted(results["importance"].items(), key=lambda kv: -kv[1])
        lines.append(
            f"Importance for {quality.label}: " + ", ".join(f"{k} {v:.0%}" for k, v in parts if v >= 0.005) + "."
        )
    if results["proxy"] is not None:
        value = results["proxy"]["spearman"]
        said = "undefined (all values equal)" if value is None else f"{value:.2f}"
        lines.append(f"Rank correlation of short with full training: {said}, {len(results['proxy']['trials'])} trials.")
    return "\n".join(lines)


def pick(
    run: Annotated[Path, typer.Argument(help="Folder of 'recsys-embed search methods'.")],
    trial: Annotated[int | None, typer.Option("--trial", help="Number of the trial to take.")] = None,
    under: Annotated[
        str | None, typer.Option("--under", help="Or the best trial of at most this size, e.g. 1MiB.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder of the training; default RUN/trial-N.")] = None,
    file: Annotated[Path | None, typer.Option("--export", help="Also write the model to serve: m.safetensors.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="Precision of that file: fp32, fp16, bf16, fp8, int8, int4, int2; default the plan's."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Train one trial of a study in full, test it, and export it."""
    from recsys_embed.data import open_dataset
    from recsys_embed.exports import export
    from recsys_embed.search.studies.results import best_under, rows_of
    from recsys_embed.train.json_values import footprint_dict, json_ready
    from recsys_embed.train.run import run_training

    if (trial is None) == (under is None):
        raise ConfigError("give --trial N or --under SIZE, and not both")
    request = read_request(run)
    if request is None:
        raise ConfigError(
            f"{run} holds no study: {run / STUDY} does not exist; make one with 'recsys-embed search methods'"
        )
    study = open_study(request, run, must_exist=True)
    with study.guarded():
        rows = rows_of(study)
    if under is not None:
        row = best_under(rows, parse_bytes(under), study.quality)
    else:
        found = [r for r in rows if r["trial"] == trial and r["params"]]
        if not found:
            there = ", ".join(str(r["trial"]) for r in rows) or "none yet"
            raise ConfigError(f"the study has no finished trial {trial}; it has {there}")
        row = found[0]
    folder = out or run / f"trial-{row['trial']}"
    try:
        done = run_training(
            study.training_config(row["params"]), open_dataset(Path(request.data)), folder=folder, resume=True,
            device=study.device, label=f"trial {row['trial']}",
        )  # fmt: skip
    except Interrupted:
        print("recsys-embed: stopped; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    result: dict[str, Any] = {
        **json_ready(done.result.to_dict()),
        "trial": row["trial"],
        "footprint": footprint_dict(done.footprint),
        "full_bytes": done.full_bytes,
        "folder": str(folder),
    }
    if file is not None:
        result["export"] = export(folder, file, precision).to_dict()  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(result, indent=2))
        return 0
    test = done.result.test
    print(f"trial {row['trial']}, {short(row['params'])}")
    if test is not None:
        print(f" test: {metrics_text(test)} ({test.samples:,} rows)")
    print(f"bytes: {format_bytes(done.footprint.serve)} of {format_bytes(done.full_bytes)}; run in {folder}")
    if file is not None:
        print(f"exported to {file}")
    return 0
