"""``recsys-embed export``: a trained model as one small file to serve, and a check of such files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import is_zipfile

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.cli._target import load_target
from recsys_embed.core.footprint import format_bytes
from recsys_embed.errors import ConfigError
from recsys_embed.utils.strict_json import read_object

if TYPE_CHECKING:
    from recsys_embed.train import TrainConfig


def export(
    source: Annotated[
        Path | None, typer.Argument(help="Folder of a finished run, its model.pt, or an exported file to convert.")
    ] = None,
    target: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="File to write, as --out.")] = None,
    factory: opt.ModelFactory = None,
    model: opt.FormerFactory = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write, e.g. model.safetensors.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="Of the tables' rows: fp32 (same bits), fp16, bf16, fp8, int8, int4, int2; by default as planned.",
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option("--search", help="Scales of integer rows: minmax (fast), greedy or mse (least error)."),
    ] = None,
    rows_per_scale: Annotated[
        int,
        typer.Option("--rows-per-scale", help="Consecutive rows of few bits that share a scale: smaller, read slower."),
    ] = 1,
    prune: Annotated[bool, typer.Option(help="Drop rows and columns of zeros where that saves bytes.")] = True,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Folder of 'recsys-embed data': AUC, RMSE or NDCG before and after; its encoders are kept.",
        ),
    ] = None,
    encoders: Annotated[
        bool,
        typer.Option(help="Keep what turns raw rows into ids, for predict: of --data, or of the run's own folder."),
    ] = True,
    split: Annotated[str, typer.Option("--split", help="Rows of --data to measure on.")] = "test",
    check: Annotated[
        Path | None, typer.Option("--verify", help="Only check an exported file: every byte of it.")
    ] = None,
    as_json: opt.Json = False,
) -> int:
    """Export a model to one file, pruned, quantised and without optimizer state, and report its error.

    The file of a run holds what turns raw rows into ids too, so that `recsys-embed predict` scores them.
    """
    from recsys_embed.exports import export as write
    from recsys_embed.exports import load
    from recsys_embed.exports.run_model import check_run_data

    model = opt.model_factory(factory, model)
    if target is not None and out is not None:
        raise ConfigError(f"the file to write is given twice: {target} and --out {out}")
    out = out or target
    if check is not None:
        if source is not None or model is not None or out is not None:
            raise ConfigError("--verify only checks a file; leave out SOURCE, --model-factory and --out")
        print(_verified(check, as_json))
        return 0
    if (source is None) == (model is None):
        raise ConfigError("give a SOURCE or --model-factory package.module:function, and not both")
    if out is None:
        raise ConfigError("name the file to write: --out model.safetensors")
    found: Any = load_target(model) if model is not None else source
    if source is not None and source.is_file() and not is_zipfile(source):
        found = load(source, backend="torch")
    elif source is not None and data is not None:
        check_run_data(source, data)
    how = _settings(found)
    report = write(
        found,
        out,
        precision,  # type: ignore[arg-type]
        prune=prune,
        search=search,  # type: ignore[arg-type]
        rows_per_scale=rows_per_scale,
        evaluate=None if data is None else _quality(data, split, how),
        metric=f"{split} {_metric(found, how)}",
        encoders=_encoders(found, data) if encoders else False,
    )
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    return 0


def _encoders(found: Any, data: Path | None) -> Path | None:
    """The folder whose encoders are kept: the run's own, else --data; None leaves it to the file that is converted."""
    from recsys_embed.exports.run_model import run_data
    from recsys_embed.models import CTRModel

    if isinstance(found, Path):
        return run_data(found, []) or data
    return data if isinstance(found, CTRModel) and found.scorer is None else None


def _metric(found: Any, how: TrainConfig) -> str:
    """What a model, or that of a run, is measured by."""
    from recsys_embed.models import RetrievalModel, list_models
    from recsys_embed.train.quality import quality_of

    if isinstance(found, RetrievalModel):
        return f"NDCG@{how.top_k[0]}"
    return quality_of(how).label if how.model in list_models() else "AUC"


def _settings(found: Any) -> TrainConfig:
    """The settings of a run, or of a search, by which its metrics were told; the default ones of other models."""
    from recsys_embed.train.config import TrainConfig, read_settings

    if not isinstance(found, Path):
        return TrainConfig()
    folder = found if found.is_dir() else found.parent
    if (folder / "config.json").exists():
        return TrainConfig.from_dict(read_settings(folder / "config.json"))
    known = read_object(folder / "search.json") if (folder / "search.json").exists() else {}
    return TrainConfig.from_dict(known.get("identity", {}).get("train", {}))


def _quality(folder: Path, split: str, how: TrainConfig) -> Callable[[Any], float]:
    """A function that measures a model on a split of a data folder as its run did: AUC, RMSE of real labels, or NDCG of
    a retrieval model."""
    from recsys_embed.data import open_dataset
    from recsys_embed.train import evaluate

    dataset = open_dataset(folder)
    if split not in dataset.splits:
        raise ConfigError(f"--split must be one of {', '.join(dataset.splits)}; got {split!r}")
    seen: Any = {}

    def measure(model: Any) -> float:
        metrics = evaluate(
            model,
            dataset,
            split,
            top_k=how.top_k,
            exclude_seen=how.exclude_seen,
            seen=seen,
            batch_size=how.eval_batch_size,
            loss="squared_error" if how.loss == "squared_error" else "logloss",
        )
        if metrics is not None and metrics.rmse is not None:
            return metrics.rmse
        if metrics is not None and metrics.ndcg:
            return metrics.ndcg[how.top_k[0]]
        if metrics is None or math.isnan(metrics.auc):
            raise ConfigError(
                f"the {dataset.rows(split):,} rows of split {split!r} of {folder} are of one class, so there is no "
                "AUC; choose another --split or --data"
            )
        return float(metrics.auc)

    return measure


def _verified(path: Path, as_json: bool) -> str:
    from recsys_embed.exports import verify

    manifest = verify(path)
    size = path.stat().st_size
    if as_json:
        return json.dumps({"path": str(path), "bytes": size, "manifest": manifest}, indent=2)
    kinds = sorted({t["kind"] for t in manifest["tables"].values()})
    return (
        f"{path}: whole; {format_bytes(size)}, {len(manifest['tables'])} tables ({', '.join(kinds)}), "
        f"{len(manifest['dense'])} other tensors, written by recsys-embed {manifest['written_by'].get('recsys-embed')}"
    )
