"""Replaces all chosen tables of a model: checks everything first, then exchanges the modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from recsys_embed.compress import match
from recsys_embed.compress.build import (
    InitMode,
    TableReplacement,
    build_group,
    check_on_meta,
    shared_faults,
    sharing_groups,
)
from recsys_embed.compress.exchange import ModuleExchange, apply_all, live_optimizers
from recsys_embed.compress.initializer import initializer_for
from recsys_embed.compress.module_state import carried_over, extra_faults, transfer_module_state
from recsys_embed.discover import find_tables
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.embedding.tied_linear import tied_output
from recsys_embed.errors import ConfigError

Adapter = Callable[[nn.Module, CompressedEmbedding], nn.Module]
Subclasses = Collection[type] | Mapping[type, Adapter | None]
_NONE: Mapping[int, nn.Module] = {}


class ModelReplacement:
    """All replacements in one model, with its optimizers and adapters."""

    def __init__(
        self,
        model: nn.Module,
        replacements: Sequence[TableReplacement],
        optimizers: Sequence[Any],
        adapters: Mapping[type, Adapter | None],
    ) -> None:
        self.model, self.replacements, self.optimizers, self.adapters = model, replacements, optimizers, adapters
        self.groups: list[list[TableReplacement]] = []

    def faults(self) -> list[str]:
        """Faults that forbid the exchange; also builds each replacement on the meta device."""
        faults = list(match.wrapper_faults(self.model)) if self.replacements else []
        for o in self.optimizers:
            if not isinstance(o, Optimizer):
                faults.append(f"`optimizer` must be torch optimizers; got {type(o).__name__}")
        if torch.is_inference_mode_enabled():
            faults.append("parameters made in torch.inference_mode() cannot be trained; leave it first")
        sound = True
        for replacement in self.replacements:
            wrong = [
                f
                for m in replacement.modules
                for f in match.module_faults(replacement.table, m, self._loses_forward(m))
            ]
            wrong += match.output_layer_faults(replacement.table)
            if not wrong:
                replacement.initializer = initializer_for(replacement.modules[:1])
                wrong = check_on_meta(replacement)
            if not wrong:
                new = replacement.trial or nn.Embedding(1, 1, device="meta")
                wrong = [
                    f for m in replacement.modules for f in extra_faults(m, new, f"table {replacement.table.name!r}")
                ]
            sound &= not wrong
            faults += wrong
        if sound:
            self.groups = sharing_groups(self.replacements)
            for group in self.groups:
                faults += shared_faults(group)
                if len(group) > 1:
                    initializer = initializer_for([replacement.modules[0] for replacement in group])
                    for replacement in group:
                        replacement.initializer, replacement.trial = initializer, None
                        faults += check_on_meta(replacement)
            exchange = self._exchange(lambda replacement: dict.fromkeys(replacement.modules, _trial_of(replacement)))
            exchange.in_containers(self.model, carried_over)
            faults += exchange.faults
            faults += self._optimizer_faults(exchange)
        return faults

    def _optimizer_faults(self, exchange: ModuleExchange) -> Iterator[str]:
        """Faults of optimizers: they hold no table, or cannot train the new ones."""
        # What stays a full table has its optimizer too, which is then none for the others.
        tables = {id(p) for t in find_tables(self.model) for m in t.modules for p in m.parameters()}
        for o in self.optimizers:
            if not isinstance(o, Optimizer):
                continue
            held = exchange.held_by(o)
            if self.replacements and not held and not any(id(p) in tables for g in o.param_groups for p in g["params"]):
                yield f"`optimizer` {type(o).__name__} holds none of the parameters to be replaced"
            if isinstance(o, torch.optim.SparseAdam):
                yield from self._dense_faults(set(held))

    def _dense_faults(self, names: set[str]) -> Iterator[str]:
        """Faults: tables of these names whose replacements have dense gradients, which SparseAdam refuses in a step."""
        for replacement in self.replacements:
            if replacement.table.name not in names or replacement.trial is None:
                continue
            sparse = {id(p) for p in replacement.trial.sparse_parameters()}
            dense = [n for n, p in replacement.trial.named_parameters() if id(p) not in sparse]
            if dense:
                yield (
                    f"table {replacement.table.name!r}: SparseAdam takes sparse gradients alone, and those of "
                    f"{', '.join(dense)} of method {replacement.config.method!r} are dense; choose another method, or "
                    "another optimizer, such as Adam"
                )

    def _loses_forward(self, module: nn.Module) -> bool:
        cls = type(module)
        base = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
        if isinstance(module, CompressedEmbedding) or cls not in self.adapters:
            return False
        return cls.forward is not base.forward and self.adapters[cls] is None

    def _exchange(
        self,
        new_of: Callable[[TableReplacement], Mapping[nn.Module, nn.Module]],
        placed: Mapping[int, nn.Module] = _NONE,
    ) -> ModuleExchange:
        """The exchange, given the new embedding of each old one, and what takes its place where that is another."""
        pairs = []
        for replacement in self.replacements:
            built = new_of(replacement)
            for old in replacement.readers():
                new = built[old] if old in built else tied_output(old, built[replacement.modules[0]])
                pairs.append((replacement, old, placed.get(id(old), new)))
        modules = {id(old): new for _, old, new in pairs}
        kept = _parameters_after(self.model, modules)
        parameters: dict[int, list[nn.Parameter]] = {}
        names: dict[int, str] = {id(old): f"table {replacement.table.name}" for replacement, old, _ in pairs}
        for replacement, old, new in pairs:
            gone = [p for p in old.parameters() if id(p) not in kept]
            for i, p in enumerate(gone):
                # All new parameters take the position of the first old one.
                parameters.setdefault(id(p), list(new.parameters()) if i == 0 else [])
                names[id(p)] = replacement.table.name
        return ModuleExchange(modules, parameters, names)

    def run(self, start: InitMode) -> None:
        """Build the new modules and put them in place; all or nothing."""
        for group in self.groups:
            build_group(group, start)
        placed: dict[int, nn.Module] = {}
        for replacement in self.replacements:
            for old, new in replacement.built.items():
                adapter = self.adapters.get(type(old))
                transfer_module_state(old, new)
                placed[id(old)] = new if adapter is None else _adapted(adapter, old, new, replacement.table.name)
        exchange = self._exchange(lambda replacement: replacement.built, placed)
        changes = exchange.in_modules(self.model) + exchange.in_containers(self.model, carried_over)
        for o in self.optimizers:
            changes += exchange.in_optimizer(o)
        # Before anything changes, so that warnings turned into errors leave the model as it was.
        for sentence in [*exchange.part_searched(), *live_optimizers(self.model, exchange, self.optimizers)]:
            warnings.warn(sentence, stacklevel=3)
        apply_all(changes)


def _trial_of(replacement: TableReplacement) -> nn.Module:
    return replacement.trial or nn.Embedding(1, 1, device="meta")


def _adapted(adapter: Adapter, old: nn.Module, new: nn.Module, name: str) -> nn.Module:
    wrapped = adapter(old, new)  # type: ignore[arg-type]
    if not isinstance(wrapped, nn.Module):
        raise ConfigError(f"the adapter of {type(old).__qualname__} must return a module; got {type(wrapped).__name__}")
    return wrapped


def _parameters_after(model: nn.Module, modules: Mapping[int, nn.Module]) -> set[int]:
    """Ids of the parameters the model will hold once ``modules`` are exchanged."""
    out: set[int] = set()
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        module = modules.get(id(module), module)
        if id(module) not in seen:
            seen.add(id(module))
            out.update(id(p) for p in module._parameters.values() if p is not None)
            stack += [m for m in module._modules.values() if m is not None]
    return out
