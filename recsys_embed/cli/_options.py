"""Options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from recsys_embed.errors import ConfigError
from recsys_embed.models import list_models

Data = Annotated[Path, typer.Option("--data", help="Folder made by 'recsys-embed data'.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1.")]

# Options of training.
Model = Annotated[str | None, typer.Option("--model", help=f"Key: {', '.join(list_models())}.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Embedding bytes, e.g. 4MiB.")]
Ratio = Annotated[float | None, typer.Option("--ratio", help="Or: the bytes of full tables divided by this.")]
EmbeddingDim = Annotated[int | None, typer.Option("--embedding-dim", help="Width of the vectors.")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training rows.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Stop after this many batches.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Rows per step.")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate.")]
Patience = Annotated[int | None, typer.Option("--patience", help="Stop after this many validations without gain.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of weights, data order and all random draws.")]
Assign = Annotated[
    list[str] | None, typer.Option("--set", help="Any other setting: key=value, e.g. model_args.dropout=0.1.")
]
SearchAssign = Annotated[
    list[str] | None, typer.Option("--set", help="Any other setting: key=value; search.KEY=value for the search's.")
]

# Options for a model of the user.
ModelFactory = Annotated[
    str | None,
    typer.Option("--model-factory", help="A model: package.module:function, called without arguments."),
]
FormerFactory = Annotated[str | None, typer.Option("--model", hidden=True)]


def model_factory(factory: str | None, former: str | None) -> str | None:
    """The value of ``--model-factory``, or of its former name ``--model``, which warns.

    Raises:
        ConfigError: both are given.
    """
    if former is None:
        return factory
    if factory is not None:
        raise ConfigError("--model is the former name of --model-factory; give one of them")
    print(
        "recsys-embed: --model is a model's key elsewhere; here it is now --model-factory, and the former name goes "
        "with the next version",
        file=sys.stderr,
    )
    return former
