"""Exchange modules and parameters everywhere at once: in the module tree, other containers and optimizers."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from recsys_embed.compress.references import (
    CONTAINERS,
    SHARED,
    TORCH_OWN,
    Place,
    attributes_of,
    class_variables,
    hooks_of,
    is_closed,
    places,
    referent,
)
from recsys_embed.discover import join_path
from recsys_embed.kernels.pointers import memory_of

# How deep and how far references are followed from one attribute of the model.
_DEPTH = 50
_OBJECTS = 100_000
_ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None)})


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


def _put(put: Callable[[Any], None], old: Any, new: Any) -> ReversibleChange:
    return ReversibleChange(lambda: put(new), lambda: put(old))


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
        # Ids of old parameters that code may read as before once they are exchanged.
        self.interchangeable: set[int] = set()
        # Attributes of which only a part was searched.
        self.unsearched: list[str] = []
        self._left, self._root = _OBJECTS, ""
        self._storages: dict[int, str] = {}

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

    def in_containers(
        self, model: nn.Module, carried: Callable[[nn.Module, str], Iterable[Place]] = hooks_of
    ) -> list[ReversibleChange]:
        """Changes to references beside the module tree; those that cannot be changed are added to ``faults``.

        Attributes of all modules and their hooks are followed through lists, tuples, dictionaries, closures,
        ``functools.partial``, bound methods, plain objects and modules outside the tree. ``carried`` gives those of a
        replaced module that its replacement takes over. Variables of classes and files are searched and not changed.
        """
        changes: list[ReversibleChange] = []
        seen = {id(module) for module in model.modules()}
        gone = [p for p in model.parameters() if id(p) in self.parameters]
        self._storages = {address: self.names[id(p)] for p in gone if (address := _storage_address(p))}
        for path, module in model.named_modules():
            for place in (carried if id(module) in self.modules else attributes_of)(module, path):
                self._from(place, changes, seen)
        classes: dict[type, str] = {}
        for path, module in model.named_modules():
            for cls in type(module).__mro__:
                classes.setdefault(cls, path)
        for cls, path in classes.items():
            for place in class_variables(cls, path):
                self._from(place, changes, seen)
        return changes

    def _from(self, place: Place, changes: list[ReversibleChange], seen: set[int]) -> None:
        self._left, self._root = _OBJECTS, place.where
        self._rewrite_place(place, changes, seen, 0)

    def part_searched(self) -> list[str]:
        """One sentence per attribute that is too large or too deep to be searched."""
        return [
            f"{where} leads to more than {_OBJECTS} objects or deeper than {_DEPTH}, of which a part was searched; "
            "what holds a replaced table beyond that goes on reading the old one"
            for where in self.unsearched
        ]

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
        target = referent(value)
        if id(target) in self.modules:
            return [ref(self.modules[id(target)])]
        if type(value) in _ATOMS or id(value) in seen:
            return [value]
        if isinstance(value, list | tuple) and all(type(x) in _ATOMS for x in value):
            return [value]  # rows of data, say
        if (depth >= _DEPTH or self._left <= 0) and not is_closed(value):
            if self._root not in self.unsearched:
                self.unsearched.append(self._root)
            return [value]
        self._left -= 1
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and (table := self._storages.get(_storage_address(value))):
                self.faults.append(f"{where} holds a view of the replaced {table}; remove it first")
            return [value]
        if isinstance(value, tuple):
            return self._rewrite_tuple(value, where, changes, seen, depth)
        seen.add(id(value))
        if isinstance(value, CONTAINERS):
            self._rewrite_container(value, where, changes, seen, depth)
        for place in places(value, where):
            self._rewrite_place(place, changes, seen, depth + 1)
        return [value]

    def _rewrite_place(self, place: Place, changes: list[ReversibleChange], seen: set[int], depth: int) -> None:
        """Exchange what an attribute, a variable or an argument holds."""
        if type(place.value) in _ATOMS:
            return
        if id(place.value) in self.parameters and id(place.value) not in self.interchangeable:
            self._refuse(place.where, place.value, "and would go on reading the rows of the old table")
            return
        inner: list[ReversibleChange] = []
        new = self._rewrite(place.value, place.where, inner, seen, depth)
        if inner and place.put in SHARED:
            return self._refuse_place(place)
        changes += inner
        if len(new) != 1:
            self._refuse(place.where, place.value, "which several parameters cannot replace")
        elif new[0] is not place.value:
            if isinstance(place.put, str):
                self._refuse_place(place)
            else:
                changes.append(_put(place.put, place.value, new[0]))

    def _refuse_place(self, place: Place) -> None:
        self._refuse(place.where, place.value, f"{place.put}, which would keep reading the old table")

    def _rewrite_container(
        self, value: Any, where: str, changes: list[ReversibleChange], seen: set[int], depth: int
    ) -> None:
        if isinstance(value, set | frozenset | deque):
            for item in value:
                if id(item) in self.modules or id(item) in self.parameters:
                    self._refuse(where, item, f"in a {type(value).__name__}")
                else:
                    self._rewrite(item, where, changes, seen, depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                if id(key) in self.modules or id(key) in self.parameters:
                    self._refuse(where, key, "as a key")
                if type(item) in _ATOMS:
                    continue
                inner = f"{where}[{key!r}]" if type(key) in _ATOMS else f"{where}[{type(key).__name__}]"
                new = self._rewrite(item, inner, changes, seen, depth + 1)
                if len(new) != 1:
                    self._refuse(inner, item, f"which is {len(new)} parameters now")
                elif new[0] is not item:
                    changes.append(_item(value, key, item, new[0]))
        else:
            parts = [self._rewrite(x, f"{where}[{i}]", changes, seen, depth + 1) for i, x in enumerate(value)]
            flat = _distinct([x for part in parts for x in part], self.parameters.values())
            if len(flat) != len(value) or any(a is not b for a, b in zip(flat, value, strict=True)):
                changes.append(_content(value, flat))

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
        """Names of the tables whose replaced parameters an optimizer holds, each once."""
        params = [p for g in optimizer.param_groups for p in g["params"]]
        return list(dict.fromkeys(self.names[id(p)] for p in params if id(p) in self.parameters))


def _storage_address(tensor: Tensor) -> int:
    try:
        return memory_of(getattr(tensor, "stored", tensor).untyped_storage())  # of rows that train in few bits
    except (NotImplementedError, RuntimeError):  # sparse, or without a storage of its own
        return 0


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
        id(value): join_path(path, name)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in TORCH_OWN
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
                f"optimizer {type(found).__name__}{where} still holds the replaced parameters of {some}: pass it as "
                "`optimizer=` to have them exchanged, or build it anew afterwards"
            )
