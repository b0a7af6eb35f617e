"""From the tables to replace to a changed model: what speaks against it, and the exchange itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from recsys_embed.compress import match
from recsys_embed.compress.build import Job, Start, build, components, shared_faults, try_out
from recsys_embed.compress.exchange import Exchange, apply, live_optimizers
from recsys_embed.compress.initializer import initializer_for
from recsys_embed.compress.module_state import dress, extra_faults
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError

Adapter = Callable[[nn.Module, CompressedEmbedding], nn.Module]
Subclasses = Collection[type] | Mapping[type, Adapter | None]


class Replacement:
    """Everything between a list of jobs and a changed model."""

    def __init__(
        self, model: nn.Module, jobs: Sequence[Job], optimizers: Sequence[Any], adapters: Mapping[type, Adapter | None]
    ) -> None:
        self.model, self.jobs, self.optimizers, self.adapters = model, jobs, optimizers, adapters
        self.groups: list[list[Job]] = []

    def faults(self) -> list[str]:
        """What speaks against the exchange; builds the trials of the jobs on the way."""
        faults = list(match.wrapper_faults(self.model)) if self.jobs else []
        for o in self.optimizers:
            if not isinstance(o, Optimizer):
                faults.append(f"`optimizer` must be torch optimizers; got {type(o).__name__}")
        if torch.is_inference_mode_enabled():
            faults.append("parameters made in torch.inference_mode() cannot be trained; leave it first")
        sound = True
        for job in self.jobs:
            wrong = [f for m in job.modules for f in match.module_faults(job.table, m, self._loses_forward(m))]
            if not wrong:
                job.initializer = initializer_for(job.modules[:1])
                wrong = try_out(job)
            if not wrong:
                new = job.trial or nn.Embedding(1, 1, device="meta")
                wrong = [f for m in job.modules for f in extra_faults(m, new, f"table {job.table.name!r}")]
            sound &= not wrong
            faults += wrong
        if sound:
            self.groups = components(self.jobs)
            for group in self.groups:
                faults += shared_faults(group)
                if len(group) > 1:
                    initializer = initializer_for([job.modules[0] for job in group])
                    for job in group:
                        job.initializer, job.trial = initializer, None
                        faults += try_out(job)
            exchange = self._exchange(lambda job, old: job.trial or nn.Embedding(1, 1, device="meta"))
            exchange.beside(self.model)
            faults += exchange.faults
            for o in self.optimizers:
                if isinstance(o, Optimizer) and not exchange.held_by(o):
                    faults.append(f"`optimizer` {type(o).__name__} holds none of the parameters to be replaced")
        return faults

    def _loses_forward(self, module: nn.Module) -> bool:
        cls = type(module)
        base = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
        if isinstance(module, CompressedEmbedding) or cls not in self.adapters:
            return False
        return cls.forward is not base.forward and self.adapters[cls] is None

    def _exchange(self, new_of: Callable[[Job, nn.Module], nn.Module]) -> Exchange:
        """What replaces what, given the new module of each old one."""
        pairs = [(job, old, new_of(job, old)) for job in self.jobs for old in job.modules]
        modules = {id(old): new for _, old, new in pairs}
        kept = _parameters_after(self.model, modules)
        parameters: dict[int, list[nn.Parameter]] = {}
        names: dict[int, str] = {id(old): f"table {job.table.name}" for job, old, _ in pairs}
        for job, old, new in pairs:
            gone = [p for p in old.parameters() if id(p) not in kept]
            for i, p in enumerate(gone):
                # All new parameters stand where the first old one stood.
                parameters.setdefault(id(p), list(new.parameters()) if i == 0 else [])
                names[id(p)] = job.table.name
        return Exchange(modules, parameters, names)

    def run(self, start: Start) -> None:
        """Build the new modules and put them in place; all or nothing."""
        for group in self.groups:
            build(group, start)
        placed: dict[int, nn.Module] = {}
        for job in self.jobs:
            for old, new in job.built.items():
                adapter = self.adapters.get(type(old))
                dress(old, new)
                placed[id(old)] = new if adapter is None else _adapted(adapter, old, new, job.table.name)
        exchange = self._exchange(lambda job, old: placed[id(old)])
        changes = exchange.tree(self.model) + exchange.beside(self.model)
        for o in self.optimizers:
            changes += exchange.optimizer(o)
        # Before anything changes, so that warnings turned into errors leave the model as it was.
        for sentence in live_optimizers(self.model, exchange, self.optimizers):
            warnings.warn(sentence, stacklevel=4)
        apply(changes)


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
