"""``recsys-embed report``: bytes of embedding tables by cause, and what other methods would take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.cli._target import load_target
from recsys_embed.errors import ConfigError
from recsys_embed.optim import list_rules

WIDTH = 100


def report(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder, data folder, checkpoint or state dict (.pt), .safetensors, plan.json or schema.json."
        ),
    ] = None,
    factory: opt.ModelFactory = None,
    model: opt.FormerFactory = None,
    meta: Annotated[
        bool,
        typer.Option("--meta", help="Build the model on the meta device: tables of any size take no memory."),
    ] = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="Data folder: statistics, and the features of a plan.json.")
    ] = None,
    schema: Annotated[Path | None, typer.Option("--schema", help="Features of a plan.json: schema.json.")] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help=f"Of the tables: {', '.join(list_rules())}, ...")
    ] = None,
    dense_optimizer: Annotated[
        str | None,
        typer.Option("--dense-optimizer", help="Of all other parameters; default: the same, if torch has it."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Of deployed weights: fp32, fp16, bf16, fp8, int8, int4, int2.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples per step.")] = 4096,
    ids_per_sample: Annotated[float, typer.Option("--ids-per-sample", help="Ids per sample and feature.")] = 1.0,
    embedding_dim: Annotated[int, typer.Option("--embedding-dim", help="Width of the tables of a data folder.")] = 16,
    ratio: Annotated[float, typer.Option("--ratio", help="Compression at which other methods are compared.")] = 10.0,
    tables: Annotated[
        list[str] | None, typer.Option("--tables", help="Which tensors of a file are tables, e.g. '*emb*.weight'.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every table, not the 30 largest.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write one self-contained page with charts.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Also write Markdown.")] = None,
    as_json: opt.Json = False,
) -> int:
    """Show the bytes of embedding tables by cause, serving and training, and what other methods would cost."""
    from recsys_embed.report.memory import memory_report
    from recsys_embed.utils.files import write_text

    model = opt.model_factory(factory, model)
    if (source is None) == (model is None):
        raise ConfigError("give a SOURCE or --model-factory package.module:function, and not both")
    if meta and model is None:
        raise ConfigError("--meta is about --model-factory")
    found: Any = source if model is None else _load(model, meta)
    dataset = None
    if data is not None:
        from recsys_embed.data import open_dataset

        dataset = open_dataset(data)
    rep = memory_report(
        found,
        schema=_schema(schema, dataset, embedding_dim),
        optimizer=optimizer,
        dense_optimizer=dense_optimizer,
        precision=precision,  # type: ignore[arg-type]
        batch_size=batch_size,
        ids_per_sample=ids_per_sample,
        stats=dataset,
        embedding_dim=embedding_dim,
        tables=tables or None,
        ratio=ratio,
    )
    if html is not None:
        rep.to_html(html)
    if markdown is not None:
        write_text(markdown, rep.to_markdown())
    if as_json:
        print(rep.to_json())
        return 0
    print(rep.to_text(limit=None if every else 30, width=WIDTH), end="")
    for path in (html, markdown):
        if path is not None:
            print(f"written: {path}", file=sys.stderr)
    return 0


def _load(text: str, meta: bool) -> Any:
    import torch

    if not meta:
        return load_target(text)
    with torch.device("meta"):
        return load_target(text)


def _schema(path: Path | None, dataset: Any, embedding_dim: int) -> Any:
    """The features of a plan: from a schema file, or from the data."""
    if path is not None:
        from recsys_embed.features import Schema
        from recsys_embed.utils.strict_json import read_object

        return Schema.from_dict(read_object(path))
    return None if dataset is None else dataset.schema(embedding_dim)
