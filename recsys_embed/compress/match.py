"""Matches tables of a model with configurations of a plan, and checks both before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.discover import FoundTable, find_tables
from recsys_embed.errors import ConfigError
from recsys_embed.plan import Plan

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# What torch.compile and data-parallel wrappers put before the names of their model's modules.
_WRAPPED = re.compile(r"^((_orig_mod|module)[./])+")
_COMPILED = re.compile(r"(?<=[./])_orig_mod[./]")
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DistributedModelParallel", "DataParallel")


def configs_of(plan: Any) -> dict[str, MethodConfig]:
    """The configurations of a plan: a :class:`Plan`, a mapping from names, or an object with a plan as ``.plan``."""
    plan = getattr(plan, "plan", plan)
    if not isinstance(plan, Plan | Mapping):
        raise ConfigError(
            f"`plan` must be a recsys_embed.Plan, or method configurations by table name; got {type(plan).__name__}"
        )
    return dict((plan if isinstance(plan, Plan) else Plan(plan)).configs)


def index_contents(plan: Any) -> Mapping[str, Mapping[str, str | Tensor]]:
    """Contents of indexes by feature, as a plan stores them: sets of ids as text, and arrays."""
    plan = getattr(plan, "plan", plan)
    if not isinstance(plan, Plan):
        return {}
    arrays = {} if plan.arrays is None else plan.arrays.need_values()
    return {name: {**plan.sets.get(name, {}), **arrays.get(name, {})} for name in (*plan.sets, *arrays)}


def by_table(given: Mapping[str, Any], tables: Sequence[FoundTable], what: str, faults: list[str]) -> dict[str, Any]:
    """``given`` by the tables' names, from names or paths, a wrapper's too; unknown ones are added to ``faults``."""
    names = {n: t.name for t in tables for n in (*t.paths, t.name)}
    out: dict[str, Any] = {}
    for key, value in given.items():
        name = names.get(key) or names.get(_COMPILED.sub("", _WRAPPED.sub("", str(key))))
        if name is None:
            near = get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            faults.append(f"{what} names {key!r}, which is no table of the model{hint}")
        elif name in out:
            faults.append(f"{what} names table {name!r} twice, once as {key!r}")
        else:
            out[name] = value
    return out


def uncovered(
    tables: Sequence[FoundTable], chosen: Sequence[FoundTable], configs: Mapping[str, MethodConfig]
) -> Iterator[str]:
    """Faults: tables without a configuration, and configurations of tables that are not to be touched."""
    inside = {t.name for t in chosen}
    for table in tables:
        config = configs.get(table.name)
        if table.name not in inside:
            if config is not None:
                yield f"the plan names {table.name!r}, which include and exclude leave out"
        elif config is None and not table.obstacle and table.weight is not None and not table.output_layers:
            yield f"table {table.name!r} has no entry in the plan; add one, or exclude={[table.name]!r}"
        elif config is not None and config.method != "full" and table.obstacle:
            remedy = " (name the class in `subclasses`)" if "subclass" in table.obstacle else ""
            yield f"table {table.name!r} cannot be replaced: {table.obstacle}{remedy}"


def module_faults(table: FoundTable, module: nn.Module, overriding: bool) -> Iterator[str]:
    """Faults: behaviour of a module that its replacement would lose."""
    where = f"table {table.name!r}"
    if "" in table.paths:
        yield f"{where} is the whole model, which cannot be replaced in place; use <Method>Embedding.from_dense(weight)"
    if table.kind == "collection":
        yield f"{where} belongs to an EmbeddingCollection; build that with EmbeddingCollection(schema, plan)"
        return
    if module.__dict__.get("_compiled_call_impl") is not None:
        yield f"{where} was compiled in place (Module.compile) and would go on running as it was; compress first"
    for hooks in _STATE_HOOKS:
        if getattr(module, hooks, None):
            yield f"{where} has hooks in {hooks}, which rewrite the state of a full table; remove them first"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield f"{where}: its parameter {name!r} has gradient hooks, which would be lost; remove them first"
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            yield f"{where}: its parameter {name!r} is sharded (DTensor); compress before sharding"
    if overriding:
        yield (
            f"{where}: {type(module).__qualname__} overrides forward, which a replacement would lose; give "
            f"subclasses={{{type(module).__qualname__}: lambda old, new: module}} that wraps the new table"
        )


def output_layer_faults(table: FoundTable) -> Iterator[str]:
    """Faults: behaviour of output layers with the table's weight that the layers in their places would lose."""
    for layer in table.output_layers:
        for hooks in _STATE_HOOKS:
            if getattr(layer, hooks, None):
                yield f"table {table.name!r}: its output layer has {hooks}, which rewrite its state; remove them first"


def wrapper_faults(model: nn.Module) -> Iterator[str]:
    """Wrappers that keep their own references to the parameters."""
    for path, module in model.named_modules():
        if path and type(module).__name__ == "OptimizedModule" and find_tables(module):
            inner = module._modules["_orig_mod"]
            if find_tables(module)[0].module is inner:
                yield f"{path} is an embedding wrapped by torch.compile, which keeps calling it; compress first"
        if type(module).__name__ in _WRAPPERS:
            yield f"{path or 'the model'} is a {type(module).__name__}, which holds on to parameters; compress first"


def weight_faults(table: FoundTable) -> Iterator[str]:
    """Faults: why a replacement cannot be fitted to a table, full or compressed."""
    held = [table.weight] if table.weight is not None else list(table.modules[0].parameters())
    for values in (getattr(v, "stored", v).detach() for v in held):
        if values.is_meta:
            yield f"table {table.name!r} is on the meta device and has no values; use init='fresh'"
            return
        if not all(torch.isfinite(part).all() for part in values.split(1 << 20)):
            bad = int((~torch.isfinite(values)).reshape(len(values), -1).any(1).sum())
            yield f"table {table.name!r} has {bad} rows that are not finite"


def policies(given: Any, tables: Sequence[FoundTable], faults: list[str]) -> dict[str, Any]:
    """Policies for unseen ids, by table name; drop-ins that are replaced keep theirs."""
    kept = {t.name: t.module.spec.unseen for t in tables if t.kind == "compressed"}  # type: ignore[union-attr]
    if isinstance(given, Mapping):
        return kept | by_table(given, tables, "`unseen`", faults)
    return kept if given is None else {t.name: given for t in tables}


def checked_counts(given: Mapping[str, Any], tables: Sequence[FoundTable], faults: list[str]) -> dict[str, Tensor]:
    """Counts by table name, on the tables' devices; wrong ones are added to ``faults``."""
    found = {t.name: t for t in tables}
    out: dict[str, Tensor] = {}
    for name, value in by_table(given, tables, "`counts`", faults).items():
        where, rows = f"`counts` of table {name!r}", found[name].rows
        try:
            counts = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            faults.append(f"{where} must be numbers [{rows}], how often each id occurs; got {type(value).__name__}")
            continue
        if counts.shape != (rows,):
            faults.append(f"{where} must be [{rows}], how often each id occurs; got shape {tuple(counts.shape)}")
        elif not (torch.isfinite(counts) & (counts >= 0)).all() or not counts.any():
            faults.append(f"{where} must be finite numbers >= 0, not all 0")
        else:
            out[name] = counts.to(found[name].device)
    return out
