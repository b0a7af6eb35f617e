"""A torch optimizer of tables with fused rules: gradients accumulate by row, and kernels apply them at ``step()``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recsys_embed.errors import CheckpointError, ConfigError, raise_faults
from recsys_embed.optim.base import FusedOptimizer, is_rate, refuse_maximize
from recsys_embed.optim.optimizer_views import GroupTables, OptimizerState, ParamGroups
from recsys_embed.optim.replicas import Replicas
from recsys_embed.optim.state_format import copy_state
from recsys_embed.utils.types import JSON

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_OWN = "fused_tables"
"""Key of param groups of fused tables: the paths of their modules."""


@runtime_checkable
class SteppedTables(Protocol):
    """Tables with a fused optimizer, as :class:`recsys_embed.EmbeddingCollection` has them."""

    optimizer: FusedOptimizer | None
    storages: tuple[str, ...]
    lr: float

    def leave_steps_to(self, optimizer: Callable[[], object], replicas: Replicas) -> None: ...
    def begin_anew(self) -> tuple[FusedOptimizer, float]: ...
    def is_stepped_by(self, optimizer: object) -> bool: ...
    def check_gradients(self, rule: FusedOptimizer) -> None: ...
    def apply_gradients(self, rule: FusedOptimizer, lr: float) -> None: ...
    def catch_up_(self) -> object: ...
    def reset_optimizer_(self) -> None: ...
    def steps_taken(self, steps: Mapping[str, int] | None = None) -> dict[str, int]: ...


def fused_tables(model: nn.Module) -> dict[str, SteppedTables]:
    """The modules of a model that have a fused optimizer, by path."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, SteppedTables) and m.optimizer is not None}
    return cast("dict[str, SteppedTables]", found)


def _tables_of(module: SteppedTables) -> list[nn.Parameter]:
    parameters = cast("nn.Module", module)._parameters
    return [cast("nn.Parameter", parameters[name]) for name in module.storages]


def _catch_up(modules: Iterable[SteppedTables]) -> None:
    for module in modules:
        module.catch_up_()


def unfused_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a torch optimizer steps: all that require grad, but for tables with a fused optimizer.

    >>> from recsys_embed import EmbeddingCollection, FeatureSpec, RowwiseAdagrad, Schema
    >>> coll = EmbeddingCollection(Schema([FeatureSpec("C1", 10, 4)]), optimizer=RowwiseAdagrad())
    >>> [p.shape for p in unfused_parameters(torch.nn.Sequential(coll, torch.nn.Linear(4, 1)))]
    [torch.Size([1, 4]), torch.Size([1])]
    """
    fused = {id(p) for module in fused_tables(model).values() for p in _tables_of(module)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in fused]


def fused_optimizer(
    model: nn.Module, dense: Optimizer | None = None, *, process_group: ProcessGroup | None = None
) -> FusedTableOptimizer:
    """A torch optimizer of all tables of ``model`` that have a fused update rule, and of the rest of the model.

    From then on ``backward`` leaves each table a :class:`RowGradient` in ``.grad``, and ``step()`` applies it by the
    same kernels, with the same bits, as a step in backward. So gradient accumulation, several lookups and losses,
    clipping, gradient scalers, learning-rate schedulers, freezing and DistributedDataParallel work as with torch's
    optimizers.

    Args:
        model: any module that holds an :class:`recsys_embed.EmbeddingCollection` with ``optimizer=``.
        dense: steps the other parameters; its param groups and its state become part of this optimizer. Fused tables
            among its parameters are taken out of it.
        process_group: of replicas whose gradients are averaged without DistributedDataParallel, e.g. under FSDP with
            the tables in ``ignored_params``; by default those of the DistributedDataParallel around the lookup.

    Raises:
        ConfigError: no module of the model has a fused optimizer.

    >>> from recsys_embed import EmbeddingCollection, FeatureSpec, RowwiseAdagrad, Schema
    >>> coll = EmbeddingCollection(Schema([FeatureSpec("C1", 10, 4)]), optimizer=RowwiseAdagrad(lr=0.1))
    >>> model = torch.nn.Sequential(coll, torch.nn.Flatten(), torch.nn.Linear(4, 1))
    >>> optimizer = fused_optimizer(model, torch.optim.Adam(model.parameters(), lr=1e-3))
    >>> for ids in torch.tensor([[[3]], [[5]]]):
    ...     (model(ids).sum() / 2).backward()
    >>> optimizer.step()
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.001, 0.1]
    """
    return FusedTableOptimizer(model, dense, process_group)


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def _settings(rule: FusedOptimizer) -> dict[str, Any]:
    """What a param group may change of a rule."""
    return {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in ("rows", "state_precision")}


class FusedTableOptimizer(Optimizer):
    """See :func:`fused_optimizer`, which makes it.

    A param group holds the tables of all modules with one rule. Its ``lr``, ``weight_decay`` and other settings of the
    rule may change at any time.
    """

    def __init__(
        self, model: nn.Module, dense: Optimizer | None = None, process_group: ProcessGroup | None = None
    ) -> None:
        tables = fused_tables(model)
        if not tables:
            raise ConfigError(
                "no module of the model has a fused optimizer: build its EmbeddingCollection with optimizer=, e.g. "
                "RowwiseAdagrad(lr=0.01), or give all parameters to a torch optimizer; tables of compress_ and of "
                "make_embedding have ordinary gradients, for your own optimizer"
            )
        if dense is not None and not isinstance(dense, Optimizer):
            raise ConfigError(
                f"`dense` must be a torch optimizer, e.g. Adam(model.parameters()), or None; got {dense!r:.80}"
            )
        if dense is not None and _needs_closure(dense):
            raise ConfigError(
                f"{type(dense).__name__} evaluates the model several times in a step, which fused tables cannot; give "
                "`dense` another optimizer, or build the collection with optimizer=None and give "
                f"{type(dense).__name__} all parameters"
            )
        if dense is not None:
            refuse_maximize(dense.param_groups, "`dense`")
        by_rule: dict[tuple[FusedOptimizer, float], list[str]] = {}
        for path, module in tables.items():
            by_rule.setdefault(module.begin_anew(), []).append(path)
        self._begin(model, dense, process_group, [(rule, lr, paths) for (rule, lr), paths in by_rule.items()])

    def _begin(
        self,
        model: nn.Module,
        dense: Optimizer | None,
        process_group: ProcessGroup | None,
        by_rule: Sequence[tuple[FusedOptimizer, float, list[str]]],
    ) -> None:
        self._model, self._modules, self._process_group = model, (tables := fused_tables(model)), process_group
        self._rules = [rule for rule, _, _ in by_rule]
        groups = [
            {
                "params": [p for path in paths for p in _tables_of(tables[path])],
                **_settings(rule),
                "lr": lr,
                _OWN: paths,
            }
            for rule, lr, paths in by_rule
        ]
        self._complete, self.dense = False, dense
        self._fused_groups: list[JSON] = []
        super().__init__(groups, _settings(self._rules[0]))
        if dense is not None:
            fused = {id(p) for group in groups for p in cast("list[nn.Parameter]", group["params"])}
            for group in dense.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in fused]
            self.defaults = {**self.defaults, **dense.defaults}
            if "momentum" in dense.defaults and "betas" not in dense.defaults:
                # Schedules of momentum are those of the dense optimizer; they take betas first.
                self.defaults.pop("betas", None)
        self._complete = True
        self.adopt_parameters()
        self._fill_groups()
        self._replicas = Replicas(model, cast("Any", tables), process_group)
        for module in tables.values():
            module.leave_steps_to(ref(self), self._replicas)

    @property
    def param_groups(self) -> list[JSON]:
        """The groups of the dense optimizer as they are now, and those of the tables; the list refuses changes."""
        if not self._complete:
            return self._fused_groups
        return ParamGroups([*(self.dense.param_groups if self.dense is not None else ()), *self._fused_groups])

    @param_groups.setter
    def param_groups(self, groups: list[JSON]) -> None:
        own = len(self._fused_groups) if self._complete else len(groups)
        if self._complete and self.dense is not None:
            self.dense.param_groups = groups[: len(groups) - own]
        self._fused_groups = groups[len(groups) - own :]

    def _fill_groups(self) -> None:
        """Give all groups what schedules of momentum change; rules without it leave it be."""
        for key in ("betas", "momentum"):
            if key in self.defaults:
                for group in self.param_groups:
                    group.setdefault(key, self.defaults[key])

    def lr_of(self, module: object) -> float:
        """The learning rate of a module's tables."""
        return next(
            float(group["lr"]) for group in self._fused_groups for path in group[_OWN] if self._modules[path] is module
        )

    def __getstate__(self) -> JSON:
        if self._process_group is not None:
            raise ConfigError(
                "an optimizer with a process_group cannot be copied or pickled; save its state_dict(), and load it "
                "into one that fused_optimizer makes"
            )
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._fused_groups]
        return {"model": self._model, "dense": self.dense, "rules": self._rules, "groups": groups}

    def __setstate__(self, state: JSON) -> None:
        if "model" not in state:  # load_state_dict of torch
            super().__setstate__(state)
            return
        groups = state["groups"]
        by_rule = [(rule, rule.lr, group[_OWN]) for rule, group in zip(state["rules"], groups, strict=True)]
        self._begin(state["model"], state["dense"], None, by_rule)
        for own, group in zip(self._fused_groups, groups, strict=True):
            own.update(group)

    def adopt_parameters(self) -> None:
        """Tables have new parameters, of ``load_state_dict(assign=True)`` or ``to_empty``; param groups hold those."""
        for group in self._fused_groups:
            modules = [self._modules[path] for path in group[_OWN]]
            tables = [p for module in modules for p in _tables_of(module)]
            group["params"] = GroupTables(tables, partial(_catch_up, modules))

    def add_param_group(self, param_group: JSON) -> None:
        """Add parameters of the dense optimizer.

        Raises:
            ConfigError: there is none, or they hold tables that this optimizer steps already.
        """
        if not getattr(self, "_complete", False):
            super().add_param_group(param_group)
            return
        if self.dense is None:
            raise ConfigError(
                "add_param_group: this optimizer steps tables with a fused rule alone; make it with "
                "fused_optimizer(model, dense_optimizer), or add the group to the optimizer of the other parameters"
            )
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("`params` must be in order, in a list; got a set, whose order changes from run to run")
        params = [params] if isinstance(params, Tensor) else list(params)
        fused = {id(p) for group in self._fused_groups for p in group["params"]}
        if any(id(p[1] if isinstance(p, tuple) else p) in fused for p in params):
            raise ConfigError("add_param_group: a fused rule steps these tables already; leave them out of the group")
        self.dense.add_param_group({**param_group, "params": params})
        self._fill_groups()

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float | None:  # type: ignore[override]
        """One step of the tables and of the dense optimizer by the gradients in ``.grad``.

        Raises:
            ConfigError: another optimizer was made of the tables since, or a setting is out of range.
        """
        loss: Tensor | float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for path, module in self._modules.items():
            if not module.is_stepped_by(self):
                raise ConfigError(f"another optimizer has been made of the tables of {path!r} since; call its step()")
        # Settings and gradients of all groups are checked before any table changes.
        refuse_maximize(self.param_groups, "a param group")
        todo = [(group, *self._rule_of(i, group)) for i, group in enumerate(self._fused_groups)]
        for group, rule, _ in todo:
            for path in group[_OWN]:
                self._modules[path].check_gradients(rule)
        # What the dense optimizer refuses is refused before any table changes.
        if self.dense is not None:
            self.dense.step()
        for group, rule, lr in todo:
            for path in group[_OWN]:
                self._modules[path].apply_gradients(rule, lr)
        return loss

    def _rule_of(self, number: int, group: Mapping[str, Any]) -> tuple[FusedOptimizer, float]:
        """The rule with the settings of a group, and its learning rate."""
        rule, lr = self._rules[number], float(group["lr"])
        if not is_rate(lr):
            raise ConfigError(f"`lr` must be a finite number >= 0; got {lr!r}")
        now = {name: group[name] for name in _settings(rule) if name != "lr"}
        if any(now[name] != getattr(rule, name) for name in now):
            now = {name: tuple(v) if isinstance(v, list) else v for name, v in now.items()}
            rule = self._rules[number] = replace(rule, **now)
        return rule, lr

    @property
    def state(self) -> defaultdict[Tensor, JSON]:
        """By parameter, the tensors of the tables and of the dense optimizer themselves; the dict refuses changes."""
        state: defaultdict[Tensor, JSON] = defaultdict(dict)
        if not self._complete:
            return state
        state.update(self.dense.state if self.dense is not None else {})
        for module in self._modules.values():
            module.catch_up_()
            steps, buffers = module.steps_taken(), cast("nn.Module", module)._buffers
            for name, parameter in zip(module.storages, _tables_of(module), strict=True):
                tensors = cast("FusedOptimizer", module.optimizer).tensors
                state[parameter] = {"step": torch.tensor(float(steps[name]))}
                state[parameter].update({key: buffers[f"{name}_{key}"] for key in tensors})
        return OptimizerState(state, self._change_state)

    @state.setter
    def state(self, value: Mapping[Tensor, JSON]) -> None:
        if value:
            raise ConfigError("`state` is that of the tables and of the dense optimizer; change it by load_state_dict")
        if self._complete:  # starts anew
            for module in self._modules.values():
                module.reset_optimizer_()
            if self.dense is not None:
                self.dense.state.clear()

    def _change_state(self, parameter: Tensor, given: JSON) -> None:
        held = self.state[parameter]
        owner = next((m for m in self._modules.values() if any(parameter is t for t in _tables_of(m))), None)
        if not any(parameter is p for group in self._fused_groups for p in group["params"]):
            if self.dense is not None:
                self.dense.state[parameter] = given
            return
        if given.keys() != held.keys() or any(torch.as_tensor(given[k]).shape != t.shape for k, t in held.items()):
            raise ConfigError(f"the state of a table holds {sorted(held)}; got {sorted(given)}, or other shapes")
        if int(given["step"]) != int(held["step"]):
            raise ConfigError("the steps of a table change by load_state_dict()")
        with torch.no_grad():
            for key, tensor in held.items():
                if key != "step" and given[key] is not tensor:
                    copy_state(cast("FusedOptimizer", cast("SteppedTables", owner).optimizer), key, tensor, given[key])

    def state_dict(self) -> JSON:
        """As torch's: each table's tensors ``[rows, width]`` or ``[rows, 1]`` and its steps, and the param groups."""
        return super().state_dict()

    def load_state_dict(self, state_dict: JSON) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: the state of a table is missing, or of another shape.
            ValueError: torch's, where the groups hold other numbers of parameters.
        """
        groups, own = self.param_groups, {id(p): s for p, s in self.state.items()}
        order = [p for group in groups for p in group["params"]]
        numbers = [n for group in state_dict.get("param_groups", ()) for n in group.get("params", ())]
        given = {id(p): state_dict["state"].get(n, {}) for n, p in zip(numbers, order, strict=False)}
        wrong = []
        for path, module in self._modules.items():
            for name, parameter in zip(module.storages, _tables_of(module), strict=True):
                found = given.get(id(parameter), {})
                wrong += [
                    f"{name} of {path or 'the collection'} lacks {key!r} of shape {list(have.shape)}"
                    for key, have in own[id(parameter)].items()
                    if key not in found or torch.as_tensor(found[key]).shape != have.shape
                ]
                if all(key in found for key in own[id(parameter)]):
                    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
                    rule = cast("FusedOptimizer", module.optimizer)
                    wrong += [f"{name}: {fault}" for fault in rule.state_faults(tensors, int(found["step"]))]
        if len(numbers) == len(order):
            raise_faults(wrong, "an optimizer's state dict that does not fit the tables", CheckpointError)
        super().load_state_dict(state_dict)
        loaded, found = self.__dict__.pop("state"), self.__dict__.pop("param_groups")
        for old, new in zip(groups, found, strict=True):
            old.update({k: v for k, v in new.items() if k not in ("params", _OWN)})
        for module in self._modules.values():
            for parameter in _tables_of(module):
                for key, tensor in own[id(parameter)].items():
                    saved = torch.as_tensor(given[id(parameter)][key])
                    if key == "step":
                        tensor.copy_(saved)
                    else:
                        copy_state(cast("FusedOptimizer", module.optimizer), key, tensor, saved)
                loaded.pop(parameter, None)
            steps = {n: int(own[id(p)]["step"]) for n, p in zip(module.storages, _tables_of(module), strict=True)}
            module.steps_taken(steps)
        if self.dense is not None:
            self.dense.state.clear()
            self.dense.state.update(loaded)
