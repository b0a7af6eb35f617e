"""``recsys-embed compress``: replace the embedding tables of any model by a plan, from its trained state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.cli._target import load_target
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.plan import Plan


def compress(
    plan: Annotated[Path, typer.Option("--plan", help="JSON of 'recsys-embed plan', by table name or path.")],
    factory: opt.ModelFactory = None,
    model: opt.FormerFactory = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Trained state dict of the uncompressed model: .pt or .safetensors.")
    ] = None,
    init: Annotated[str, typer.Option("--init", help="dense (fit to the trained tables) or fresh.")] = "dense",
    counts: Annotated[
        Path | None, typer.Option("--counts", help="Data folder that says how often ids occur: weighs the fit.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Only tables like this, e.g. 'emb.*'.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Leave tables like this alone.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the table, build nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the compressed model's state dict (.pt), to train on or export.")
    ] = None,
    as_json: opt.Json = False,
) -> int:
    """Replace the embedding tables of a model by those of a plan, fitted to the trained ones, and write the new state.

    To go on in Python: build the model, compress_(model, plan, init="fresh"), load_state_dict(torch.load(OUT)).
    """
    import torch

    from recsys_embed.compress import compress_
    from recsys_embed.utils.files import atomic_write

    if dry_run and out is not None:
        raise ConfigError("--dry-run writes nothing; leave --out or --dry-run away")
    chosen = Plan.load(plan)
    named = opt.model_factory(factory, model)
    if named is None:
        raise ConfigError("give --model-factory package.module:function, which returns the uncompressed model")
    target = load_target(named)
    if state is not None:
        _load(target, state)
    report = compress_(
        target,
        chosen,
        init,  # type: ignore[arg-type]
        counts=None if counts is None else _counts(target, counts),
        include=include or (),
        exclude=exclude or (),
        dry_run=dry_run,
    )
    if out is not None:
        atomic_write(out, lambda file: torch.save(target.state_dict(), file))
    print(report.to_json() if as_json else report)
    if out is not None and not as_json:
        print(f"state: {out}")
    return 0


def _counts(model: Any, folder: Path) -> Any:
    from recsys_embed.compress import table_counts
    from recsys_embed.data import open_dataset

    return table_counts(model, open_dataset(folder))


def _load(model: Any, path: Path) -> None:
    import torch

    from recsys_embed.utils.files import check_packing, file_form
    from recsys_embed.utils.optional import require

    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    try:
        if file_form(path) == "safetensors":
            found = require("safetensors.torch", extra="train", purpose="reading .safetensors").load_file(path)
        else:
            check_packing(path)
            found = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(found)
    except ImportError:
        raise
    except Exception as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        raise CheckpointError(f"{path} is not a state dict of this model: {' '.join(lines)[:400]}") from e
