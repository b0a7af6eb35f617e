"""``recsys-embed plan``: a method and a size for every table within a byte budget."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys_embed.cli import _options as opt
from recsys_embed.cli._settings import names
from recsys_embed.cli._target import load_target
from recsys_embed.compress import table_counts
from recsys_embed.core.footprint import format_bytes
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.optim import list_rules
from recsys_embed.plan import Plan
from recsys_embed.planning import describe_changes, plan_for_budget, size_in_words
from recsys_embed.planning.explain import SHARED_WITHOUT_NETWORK
from recsys_embed.utils.files import write_text
from recsys_embed.utils.strict_json import read_object, strict_json

if TYPE_CHECKING:
    from recsys_embed.sharding.placement import Cluster

WIDTH = 160
BUDGET = (
    "Bytes of all tables of the plan, e.g. 64MiB; default: what --world-size holds. The first-order weights of a model "
    "that 'train --plan' trains come on top."
)
Network = Annotated[
    bool | None,
    typer.Option(
        "--network/--no-network",
        help="Whether a network reads every vector beside many others, so that ids may share rows; by default found "
        "out from the model's layers or, of a schema, true from eight features on.",
    ),
]
Precisions = Annotated[
    str,
    typer.Option(
        "--precision", help="Of served rows: auto, or one or more of fp32, fp16, bf16, fp8, int8, int4, int2."
    ),
]


def plan(
    budget: Annotated[str | None, typer.Option("--budget", help=BUDGET)] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data folder: its features and id frequencies.")] = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", help="Or the features as a JSON file of Schema.to_dict.")
    ] = None,
    factory: opt.ModelFactory = None,
    model: opt.FormerFactory = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Data folder: id frequencies for --schema or --model-factory.")
    ] = None,
    embedding_dim: Annotated[
        int, typer.Option("--embedding-dim", "--dim", help="Width of the vectors (with --data).")
    ] = 16,
    target: Annotated[
        str, typer.Option("--target", help="What the bytes cover: serve (tables and index buffers) or train.")
    ] = "serve",
    optimizer: Annotated[
        str, typer.Option("--optimizer", help=f"For --target train: {', '.join(list_rules())}, none.")
    ] = "rowwise_adagrad",
    itemsize: Annotated[
        int | None,
        typer.Option("--itemsize", help="Bytes per number; by default those of the model's tables, else 4."),
    ] = None,
    precision: Precisions = "fp32",
    methods: Annotated[
        str | None, typer.Option("--methods", help="Keys to choose from, comma-separated; all by default.")
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option("--pin", help="FEATURE=METHOD, or =JSON of a configuration; '*' stands for all others."),
    ] = None,
    forbid: Annotated[
        list[str] | None, typer.Option("--forbid", help="FEATURE=METHOD,METHOD, or METHOD for all features.")
    ] = None,
    full_below: Annotated[
        int, typer.Option("--full-below", help="Features of fewer ids keep full tables where the budget allows.")
    ] = 200,
    min_width: Annotated[int, typer.Option("--min-width", help="Least width of stored rows.")] = 1,
    width_multiple: Annotated[int, typer.Option("--width-multiple", help="Widths of stored rows are multiples.")] = 1,
    equal_widths: Annotated[
        bool, typer.Option("--equal-widths", help="The model needs vectors of one width (FM, DLRM, ...).")
    ] = False,
    network: Network = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows-per-id", help="Most rows a lookup gathers.")] = None,
    max_bytes: Annotated[int | None, typer.Option("--max-bytes-per-id", help="Most bytes a lookup gathers.")] = None,
    evidence: Annotated[
        Path | None, typer.Option("--evidence", help="Folder of 'recsys-embed compare', to fit losses to.")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", help="Show the placement on this many devices; no --budget: fill them."),
    ] = None,
    hosts: Annotated[int, typer.Option("--hosts", help="Machines that hold these devices.")] = 1,
    hbm: Annotated[str, typer.Option("--hbm", help="Memory of a device.")] = "80GiB",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples per device and step.")] = 4096,
    out: Annotated[Path | None, typer.Option("--out", help="Write the plan: JSON, to train with.")] = None,
    diff: Annotated[Path | None, typer.Option("--diff", help="Also show the changes against this plan.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> int:
    """Choose a method and a size for every table, within a byte budget, and explain each choice."""
    model = opt.model_factory(factory, model)
    features, source, known = _features(data, schema, model, stats, embedding_dim)
    cluster = _cluster(world_size, hosts, hbm, batch_size)
    budget, target = _planned_bytes(budget, target, cluster)
    rule = None if optimizer == "none" else optimizer
    limits: dict[str, Any] = {
        "pin": _pins(pin or []),
        "forbid": _forbidden(forbid or []),
        "full_below": full_below,
        "min_width": min_width,
        "width_multiple": width_multiple,
        "needs_equal_widths": equal_widths,
        "max_rows_per_id": max_rows,
        "max_bytes_per_id": max_bytes,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ids of .* share rows")  # the summary says so
        made = plan_for_budget(
            source,
            budget,
            target,
            None if methods is None else names(methods),
            rule,
            known,
            evidence=evidence,
            itemsize=itemsize,
            precision=precision if precision == "auto" else names(precision),
            network=network,
            **limits,
        )
    changes = () if diff is None else describe_changes(Plan.load(diff), made, features)
    if out is not None:
        write_text(out, made.to_json() + "\n")
    _print_plan(features, made, cluster, rule, as_json, first_order=model is None)
    print(*changes, sep="\n", end="\n" if changes else "", file=sys.stderr if as_json else sys.stdout)
    if out is not None:
        print(f"written: {out}", file=sys.stderr)
    return 0


def _planned_bytes(budget: str | None, target: str, cluster: Cluster | None) -> tuple[str, str]:
    """The budget and what it covers: as given, else all that the cluster's devices hold, optimizer state included."""
    if budget is not None:
        return budget, target
    if cluster is None:
        raise ConfigError("give --budget, or --world-size with --hbm for as much as these devices hold")
    from recsys_embed.sharding.placement import largest_budget

    return str(largest_budget(cluster)), "train"


def _cluster(world_size: int | None, hosts: int, hbm: str, batch_size: int) -> Cluster | None:
    """The machines that the options describe; None without ``--world-size``."""
    if world_size is None:
        if (hosts, hbm, batch_size) != (1, "80GiB", 4096):
            raise ConfigError("--hosts, --hbm and --batch-size go with --world-size")
        return None
    from recsys_embed.sharding.placement import Cluster

    return Cluster(world_size, hosts, hbm, batch_size)


def _print_plan(
    features: Schema, made: Plan, cluster: Cluster | None, rule: str | None, as_json: bool, first_order: bool
) -> None:
    """Print the plan, what comes on top of it, and for a cluster the placement of its tables."""
    placements = None
    if cluster is not None:
        from recsys_embed.cli import _placement

        placements = _placement.place_both(features, made, cluster, rule)
    if as_json:
        extra = {} if placements is None else {"placement": placements.to_dict()}
        print(json.dumps({**made.to_dict(), **extra}, indent=2) if extra else made.to_json())
        return
    _show(features, made)
    if first_order:
        _show_first_order(features, made)
    if placements is not None:
        _placement.show(placements)


def _features(
    data: Path | None, schema: Path | None, model: str | None, stats: Path | None, embedding_dim: int
) -> tuple[Schema, Any, Any]:
    """The features, the schema or model to plan for, and the source of id frequencies."""
    if sum(source is not None for source in (data, schema, model)) != 1:
        raise ConfigError("give one of --data, --schema and --model-factory")
    if data is not None:
        if stats is not None:
            raise ConfigError("--stats goes with --schema or --model-factory; --data has its own")
        dataset = _open(data)
        features = dataset.schema(embedding_dim)
        return features, features, dataset
    known = None if stats is None else _open(stats)
    if schema is not None:
        features = Schema.from_dict(read_object(schema))
        return features, features, known
    target = load_target(model or "")
    return Schema.from_model(target), target, None if known is None else table_counts(target, known)


def _open(folder: Path) -> Any:
    from recsys_embed.data import open_dataset

    return open_dataset(folder)


def _pins(texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    faults = []
    for text in texts:
        feature, sign, value = (part.strip() for part in text.partition("="))
        if not sign or not feature or not value:
            faults.append(f"--pin takes FEATURE=METHOD; got {text!r}")
            continue
        try:
            found[feature] = strict_json(value) if value.startswith("{") else value
        except ValueError as e:
            faults.append(f"--pin {text!r} is not valid JSON: {e}")
    raise_faults(faults, "command line")
    return found


def _forbidden(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        feature, sign, value = (part.strip() for part in text.partition("="))
        feature, value = (feature, value) if sign else ("*", feature)
        found[feature] = (*found.get(feature, ()), *names(value))
    return found


def _show(features: Schema, made: Plan) -> None:
    """Print the plan as a table, then a summary."""
    from rich.console import Console
    from rich.table import Table

    itemsize = 4 if made.notes is None else made.notes.itemsize
    costs = {s.name: made[s.name].footprint(s, itemsize) for s in features}
    shared = {s.name: [t for t in made[s.name].program(s).tables if t.shared] for s in features}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, justify in (("feature", "left"), ("ids", "right"), ("method", "left"), ("size", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for spec in features:
        own = costs[spec.name].serve - sum(t.nbytes(itemsize) for t in shared[spec.name])
        first = features.by_table[spec.table_name][0].name
        size = format_bytes(own) if own or not shared[spec.name] else "shared"
        size = size if first == spec.name else f"with {first}"
        words = size_in_words(made[spec.name])
        why = made.reasons.get(spec.name, "")
        table.add_row(spec.name, f"{spec.num_embeddings:,}", made[spec.name].method, words, size, why)
    Console(width=None if sys.stdout.isatty() else WIDTH, soft_wrap=False).print(table)
    for key, found in {t.name: t for tables in shared.values() for t in tables}.items():
        users = sum(any(t.name == key for t in tables) for tables in shared.values())
        held = format_bytes(found.nbytes(itemsize))
        print(f"table {key!r}: {found.rows:,} x {found.width}, {held}, read by {users} features")
    print(_summary(features, made))


def _show_first_order(features: Schema, made: Plan) -> None:
    """Say what comes on top of the plan in models with a weight per id beside the vectors."""
    from recsys_embed.models import get_model, vector_models
    from recsys_embed.train.plans import first_order_bytes

    if features.uniform_dim is None:
        return
    keys = ", ".join(key for key in vector_models() if get_model(key).uses_linear)
    extra = format_bytes(first_order_bytes(made, features))
    print(f"first-order weights (linear tables) of {keys} come on top: {extra} with 'train --plan'")


def _summary(features: Schema, made: Plan) -> str:
    notes = made.notes
    if notes is None:
        return ""
    plain = notes.itemsize * sum(s.num_embeddings * s.embedding_dim for s in features.first_readers)
    whole = made.footprint(features, itemsize=notes.itemsize)
    serve = whole.serve
    kind = "for training" if notes.target == "train" else "to serve"
    if notes.target == "train":
        kind += f" with {notes.optimizer or 'dense gradients'}"
    gap = notes.predicted_loss - notes.least_loss
    proved = (
        "proved best" if notes.exact else f"at most {100 * gap / max(notes.predicted_loss, 1e-12):.2g} % above the best"
    )
    sharing = any(SHARED_WITHOUT_NETWORK in why for why in made.reasons.values())
    penalties = ", and more where ids share rows that no network tells apart" if sharing else ""
    lines = [
        f"{format_bytes(notes.bytes)} {kind}, of {format_bytes(notes.budget)}; full tables would take "
        f"{format_bytes(plain)} to serve, {plain / max(serve, 1):.1f}x as much",
        f"predicted loss {notes.predicted_loss:.4g} (1 is all that one feature tells{penalties}), {proved} of the "
        + ("options; a guess, since nothing was counted" if notes.statistics.startswith("a guess") else "options"),
        f"frequencies: {notes.statistics}",
    ]
    if whole.unrounded and notes.target != "train":
        lines.insert(1, f"{format_bytes(whole.train)} of weights while they train, before an export rounds them")
    if notes.left_out:
        lines.append(f"not in the plan nor its budget: {'; '.join(notes.left_out)}")
    lines += [f"warning: {text}" for text in notes.warnings]
    if notes.measured:
        lines.append(f"losses fitted to measured runs: {', '.join(notes.measured)}")
    return "\n".join(lines)
