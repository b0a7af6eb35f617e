"""Exchange modules and parameters everywhere at once: in the module tree, other containers and optimizers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

_TORCH_OWN = frozenset(vars(nn.Module()))
_DEPTH = 8


class ReversibleChange(NamedTuple):
    """One change and the function that undoes it."""

    do: Callable[[], None]
    undo: Callable[[], None]


def apply_all(changes: Sequence[ReversibleChange]) -> None:
    """Make all changes; if one fails, undo them all."""
    done: list[ReversibleChange] = []
    try:
        for change in changes:
            done.append(change)
            change.do()
    except BaseException:
        for change in reversed(done):
            change.undo()
        raise


def _item(container: Any, key: Any, old: Any, new: Any) -> ReversibleChange:
    return ReversibleChange(lambda: container.__setitem__(key, new), lambda: container.__setitem__(key, old))


def _content(items: list[Any], new: list[Any]) -> ReversibleChange:
    # In place: other objects (a closure of an optimizer) may hold the same list.
    old = list(items)
    return ReversibleChange(lambda: items.__setitem__(slice(None), new), lambda: items.__setitem__(slice(None), old))


class ModuleExchange:
    """New modules and parameters for old ones.

    Args:
        modules: new module by the id of the old one.
        parameters: new parameters by the id of the old one.
        names: dotted name of each old parameter and of its table, for messages.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        parameters: Mapping[int, Sequence[nn.Parameter]],
        names: Mapping[int, str],
    ) -> None:
        self.modules, self.parameters, self.names = modules, parameters, names
        self.faults: list[str] = []

    # -- module tree ----------------------------------------------------------------------------------------------

    def in_modules(self, model: nn.Module) -> list[ReversibleChange]:
        """Changes to the child slots that hold a replaced module."""
        return [
            _item(parent._modules, key, child, self.modules[id(child)])
            for parent in model.modules()
            if id(parent) not in self.modules
            for key, child in parent._modules.items()
            if child is not None and id(child) in self.modules
        ]

    # -- other containers -----------------------------------------------------------------------------------------

    def in_containers(self, model: nn.Module) -> list[ReversibleChange]:
        """Changes to references in attributes, lists, tuples and dictionaries; others are added to ``faults``."""
        changes: list[ReversibleChange] = []
        seen: set[int] = set()
        for path, module in model.named_modules():
            if id(module) in self.modules:
                continue
            for name, value in vars(module).items():
                if name not in _TORCH_OWN:
                    where = f"{path}.{name}" if path else name
                    new = self._rewrite(value, where, changes, seen, 0)
                    if len(new) == 1 and new[0] is not value:
                        changes.append(_item(vars(module), name, value, new[0]))
                    elif len(new) != 1:
                        self._refuse(where, value, "which several parameters cannot replace")
        return changes

    def _refuse(self, where: str, value: Any, why: str) -> None:
        self.faults.append(f"{where} holds the replaced {self.names.get(id(value), 'table')}, {why}; remove it first")

    def _rewrite(
        self, value: Any, where: str, changes: list[ReversibleChange], seen: set[int], depth: int
    ) -> list[Any]:
        """The items that replace ``value`` in a list: itself, or new modules or parameters."""
        if id(value) in self.modules:
            return [self.modules[id(value)]]
        if id(value) in self.parameters:
            return list(self.parameters[id(value)])
        if isinstance(value, MethodType) and id(value.__self__) in self.modules:
            self._refuse(where, value.__self__, "as a bound method, which would keep reading the old table")
        if depth >= _DEPTH or isinstance(value, nn.Module) or not isinstance(value, list | tuple | dict | set):
            return [value]
        if isinstance(value, tuple):
            return self._rewrite_tuple(value, where, changes, seen, depth)
        if id(value) in seen:
            return [value]
        seen.add(id(value))
        if isinstance(value, set):
            for item in value:
                if id(item) in self.modules or id(item) in self.parameters:
                    self._refuse(where, item, "in a set")
        elif isinstance(value, dict):
            for key, item in value.items():
                new = self._rewrite(item, f"{where}[{key!r}]", changes, seen, depth + 1)
                if len(new) != 1:
                    self._refuse(f"{where}[{key!r}]", item, f"which is {len(new)} parameters now")
                elif new[0] is not item:
                    changes.append(_item(value, key, item, new[0]))
        else:
            parts = [self._rewrite(x, f"{where}[{i}]", changes, seen, depth + 1) for i, x in enumerate(value)]
            flat = _distinct([x for part in parts for x in part], self.parameters.values())
            if len(flat) != len(value) or any(a is not b for a, b in zip(flat, value, strict=True)):
                changes.append(_content(value, flat))
        return [value]

    def _rewrite_tuple(
        self, value: tuple[Any, ...], where: str, changes: list[ReversibleChange], seen: set[int], depth: int
    ) -> list[Any]:
        parts = [self._rewrite(x, f"{where}[{i}]", changes, seen, depth + 1) for i, x in enumerate(value)]
        if all(len(part) == 1 and part[0] is x for part, x in zip(parts, value, strict=True)):
            return [value]

        def made(items: list[Any]) -> Any:
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

        several = [i for i, part in enumerate(parts) if len(part) != 1]
        if not several:
            return [made([part[0] for part in parts])]
        # A pair such as (name, parameter) becomes one pair per new parameter, a tuple of parameters grows.
        if len(several) == 1 and any(isinstance(x, str) for x in value):
            at = several[0]
            return [made([*(p[0] for p in parts[:at]), new, *(p[0] for p in parts[at + 1 :])]) for new in parts[at]]
        return [made([x for part in parts for x in part])]

    # -- optimizers -----------------------------------------------------------------------------------------------

    def in_optimizer(self, optimizer: Optimizer) -> list[ReversibleChange]:
        """Changes that put new parameters in the groups of the old ones, whose state is dropped."""
        changes: list[ReversibleChange] = []
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        for group in optimizer.param_groups:
            params: list[Any] = []
            names: list[str] = []
            old_names = group.get("param_names") or [""] * len(group["params"])
            for p, name in zip(group["params"], old_names, strict=True):
                if id(p) not in self.parameters:
                    params.append(p)
                    names.append(name)
                    continue
                fresh = [q for q in self.parameters[id(p)] if id(q) not in held]
                held.update(map(id, fresh))
                params += fresh
                names += [name if len(fresh) == 1 else f"{name}.{i}" for i in range(len(fresh))]
            changes.append(_content(group["params"], params))
            if group.get("param_names"):
                changes.append(_content(group["param_names"], names))
        for p in [p for g in optimizer.param_groups for p in g["params"] if id(p) in self.parameters]:
            if p in optimizer.state:
                changes.append(_dropped(optimizer.state, p))
        return changes

    def held_by(self, optimizer: Optimizer) -> list[str]:
        """Names of the replaced parameters that an optimizer holds."""
        params = [p for g in optimizer.param_groups for p in g["params"]]
        return [self.names[id(p)] for p in params if id(p) in self.parameters]


def _dropped(state: Any, key: Any) -> ReversibleChange:
    value = state[key]
    return ReversibleChange(lambda: state.pop(key, None), lambda: state.__setitem__(key, value))


def _distinct(items: list[Any], new: Iterable[Sequence[nn.Parameter]]) -> list[Any]:
    """``items`` with every new parameter once: several old ones may have been replaced by a shared one."""
    fresh = {id(p) for group in new for p in group}
    seen: set[int] = set()
    out = []
    for item in items:
        if id(item) in fresh:
            if id(item) in seen:
                continue
            seen.add(id(item))
        out.append(item)
    return out


def _subclasses(cls: type[Any]) -> set[type[Any]]:
    return {cls}.union(*(_subclasses(c) for c in cls.__subclasses__()))


def live_optimizers(model: nn.Module, exchange: ModuleExchange, given: Sequence[Optimizer]) -> Iterator[str]:
    """One sentence per optimizer of the process that holds a replaced parameter and is not ``given``."""
    attributes = {
        id(value): f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _TORCH_OWN
    }
    mine = {id(o) for o in given}
    kinds = _subclasses(Optimizer)
    for found in [o for o in gc.get_objects() if type(o) in kinds]:
        if id(found) in mine or not hasattr(found, "param_groups"):
            continue
        held = exchange.held_by(found)
        if held:
            where = f" (attribute {attributes[id(found)]!r} of the model)" if id(found) in attributes else ""
            some = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
            yield (
                f"optimizer {type(found).__name__}{where} still holds the replaced parameters {some}: pass it as "
                "`optimizer=` to have them exchanged, or build it anew afterwards"
            )
