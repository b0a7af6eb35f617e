"""``compress_`` and ``materialize_``: replace full tables of a model by compressed ones in place, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from recsys_embed.compress import match
from recsys_embed.compress.build import InitMode, TableReplacement
from recsys_embed.compress.model_replacement import ModelReplacement, Subclasses
from recsys_embed.compress.report import CompressReport
from recsys_embed.compress.summary import compression_report
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.discover import bare_tables, find_tables, select_tables, unwrapped
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import Unseen
from recsys_embed.methods.full import FullConfig
from recsys_embed.plan import Plan


def compress_(
    model: nn.Module,
    plan: Plan | Mapping[str, MethodConfig],
    init: InitMode = "dense",
    *,
    counts: Mapping[str, Tensor] | None = None,
    unseen: Unseen | Mapping[str, Unseen] | None = None,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    subclasses: Subclasses = (),
    dry_run: bool = False,
) -> CompressReport:
    """Replace the embedding tables of ``model`` in place by compressed ones, following ``plan``.

    ``nn.Embedding``, ``nn.EmbeddingBag`` and the tables inside TorchRec's collections become drop-ins that are called
    the same way, on the same device, in the same dtype, with the same hooks, attributes, ``requires_grad`` and mode.
    Their ``weight`` still reads as one row per id, computed at every access. Everything is checked and built
    before the model changes, so an error leaves the model as it was. What else the model holds tables by (lists,
    closures, ``functools.partial``, hooks, plain objects) follows, or is refused by name. Features of the plan
    that name a shared table store it once. The padding id of a table gives zeros.

    Args:
        model: any module that holds the tables; not a table itself.
        plan: a method configuration per table, by name (its path with ``/`` for ``.``, as
            :meth:`Schema.from_model` names features) or dotted path. ``full`` leaves a table as it is.
        init: ``"dense"`` fits each new table to the trained one in least squares (bucket means for hashes, a truncated
            SVD for lowdim, alternating least squares for products); ``"fresh"`` draws rows as wide as the old ones.
        counts: how often each id of a table occurs, ``[rows]``, by name or path: weights of the fit; they also tell
            methods which ids are frequent. Without counts that is what the plan says, where it was made with counts,
            else ids are assumed to be numbered by falling frequency.
        unseen: policy for ids outside a table, for all tables or by name or path: ``"hash"``, ``"oov"``, ``"zero"`` or
            ``"raise"``, see :class:`FeatureSpec`; by default hashing methods hash and others raise, as full tables do.
            A table with a policy is replaced also where the plan says ``full``.
        optimizer: torch optimizers to update: new parameters take the places of the old ones in their groups and start
            without state. A warning names other optimizers that hold a replaced parameter.
        include: shell patterns of names or paths; only matching tables are considered.
        exclude: patterns of tables to leave alone.
        subclasses: classes derived from ``nn.Embedding`` or ``nn.EmbeddingBag`` to replace like their base. One that
            overrides ``forward`` needs a function ``(old, new) -> module`` that wraps the new table: give a mapping.
        dry_run: check everything and return the report; build nothing.

    Returns:
        One line per table, with bytes before and after and the relative error of the fit.

    Raises:
        ConfigError: all faults at once: plan entries that fit no table, tables without an entry, behaviour of a table
            that its replacement would lose (``max_norm``, state-dict hooks, weights tied to other layers, ...).

    >>> import torch, recsys_embed as rse
    >>> model = nn.ModuleDict({"user": nn.Embedding(50_000, 16), "item": nn.Embedding(2_000, 16)})
    >>> plan = rse.Plan.uniform(rse.Schema.from_model(model), "hash", budget="300KiB")
    >>> report = compress_(model, plan, init="fresh")
    >>> model["user"](torch.tensor([1, 49_999])).shape, report.bytes_after <= 300 * 1024
    (torch.Size([2, 16]), True)
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be a torch.nn.Module; got {type(model).__name__}")
    if init not in get_args(InitMode):
        raise ConfigError(f"`init` must be 'dense' or 'fresh'; got {init!r}")
    # The wrappers that hold on to parameters are refused; what torch.compile made follows its model.
    model = model if type(model).__name__ != "OptimizedModule" else unwrapped(model)
    adapters = dict(subclasses) if isinstance(subclasses, Mapping) else dict.fromkeys(subclasses)
    tables = find_tables(model, subclasses=tuple(adapters))
    chosen = select_tables(tables, include, exclude)
    faults: list[str] = []
    configs = match.by_table(match.configs_of(plan), tables, "the plan", faults)
    held = match.by_table(match.index_contents(plan), tables, "the plan", [])
    known = match.checked_counts(counts or {}, tables, faults)
    policies = match.policies(unseen, tables, faults)
    faults += match.uncovered(tables, chosen, configs)
    replacements = [
        TableReplacement(
            t, configs[t.name], known.get(t.name), policies.get(t.name), index_contents=held.get(t.name, {})
        )
        for t in chosen
        if t.name in configs and not t.obstacle
    ]
    # A full table that stays one needs no replacement.
    replacements = [
        replacement for replacement in replacements if not replacement.plain or replacement.table.kind == "compressed"
    ]
    exchange = ModelReplacement(model, replacements, _optimizers(optimizer), adapters)
    faults += exchange.faults()
    if init == "dense":
        faults += [fault for replacement in replacements for fault in match.weight_faults(replacement.table)]
    raise_faults(faults, f"compress_({type(model).__name__})")
    if not dry_run:
        exchange.run(init)
        adapt_to_libraries(model)
    report = compression_report(tables, replacements, configs, dry_run)
    return replace(report, notes=tuple(map(str, bare_tables(model))))


def materialize_(
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> CompressReport:
    """Turn the drop-ins of ``model`` back into ``nn.Embedding`` and ``nn.EmbeddingBag`` with full tables.

    Undoes :func:`compress_` except for the values, which are those of the compressed tables, also inside TorchRec's
    collections. Options, hooks, mode and ``requires_grad`` carry over, as in :func:`compress_`. An
    :class:`EmbeddingCollection` stays: full tables are one of its plans.

    Args:
        model: holds the drop-ins; not one itself.
        optimizer: as for :func:`compress_`.
        include: shell patterns of names or paths; only matching tables.
        exclude: patterns of tables to leave alone.

    Raises:
        ConfigError: there are no drop-ins, or one cannot be replaced.

    >>> import torch, recsys_embed as rse
    >>> model = nn.Sequential(rse.HashEmbedding(1000, 8, num_buckets=100))
    >>> before = model(torch.tensor([7]))
    >>> _ = materialize_(model)
    >>> type(model[0]).__name__, torch.equal(model(torch.tensor([7])), before)
    ('Embedding', True)
    """
    model = model if type(model).__name__ != "OptimizedModule" else unwrapped(model)
    tables = find_tables(model)
    chosen = [t for t in select_tables(tables, include, exclude) if t.kind == "compressed"]
    replacements = [TableReplacement(t, FullConfig()) for t in chosen]
    exchange = ModelReplacement(model, replacements, _optimizers(optimizer), {})
    faults = exchange.faults()
    faults += [f"table {t.name!r} cannot be replaced: {t.obstacle}" for t in chosen if t.obstacle]
    if not replacements:
        faults.append("there is no compressed table to turn back")
    raise_faults(faults, f"materialize_({type(model).__name__})")
    exchange.run("fresh")
    adapt_to_libraries(model)
    return compression_report(tables, replacements, {}, False)


def adapt_to_libraries(model: nn.Module) -> None:
    """Let models of libraries with file formats of their own save, load, tie and resize by their tables of now."""
    if "transformers.modeling_utils" in sys.modules:
        from recsys_embed.compress import hugging_face

        hugging_face.adapt(model)
    if "sentence_transformers" in sys.modules:
        from recsys_embed.compress import sentence_transformers

        sentence_transformers.adapt(model)


def _optimizers(given: Any) -> list[Any]:
    return [given] if isinstance(given, Optimizer) or not isinstance(given, Iterable) else list(given)
