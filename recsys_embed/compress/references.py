"""What functions, ``functools.partial``, bound methods, weak references and plain objects hold, one place at a time."""

from __future__ import annotations

import dis
import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import (
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from recsys_embed.discover import join_path

TORCH_OWN = frozenset(vars(nn.Module()))
# The dictionaries of hooks that functions of users are in.
HOOKS = tuple(sorted(name for name in TORCH_OWN if name.endswith("_hooks")))
# What of a class or a file is not one model's to change: other models may read it too.
SHARED = ("as a class variable", "as a variable of the method", "as a global variable")
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_BOUND = (MethodType, BuiltinMethodType, MethodWrapperType)
# Objects that are not searched: optimizers have a way of their own, and the rest leads out of the model.
_CLOSED = (Optimizer, torch.Tensor, ModuleType, type, CodeType)
_CLOSED_PACKAGES = frozenset({"torch", "numpy", "pandas", "pyarrow", "logging", "threading", "recsys_embed"})


class Place(NamedTuple):
    """A place that holds ``value``; ``put`` exchanges it there, and says in words why where it cannot be exchanged."""

    where: str
    value: Any
    put: Callable[[Any], None] | str


def places(value: Any, where: str) -> Iterator[Place]:
    """The places inside ``value`` that hold other objects; lists, tuples, sets and items of dictionaries are not it."""
    if isinstance(value, FunctionType):
        yield from _of_function(value, where)
    elif isinstance(value, functools.partial):
        yield from _of_partial(value, where)
    elif isinstance(value, _BOUND):
        yield Place(where, value.__self__, "as a bound method")
        if isinstance(value, MethodType):
            yield Place(where, value.__func__, "as a bound method")
    elif isinstance(value, nn.Module):
        yield from _of_module(value, where)
    elif not is_closed(value):
        yield from _of_object(value, where)


def is_closed(value: Any) -> bool:
    """Whether an object is not searched."""
    return isinstance(value, _CLOSED) or type(value).__module__.partition(".")[0] in _CLOSED_PACKAGES


def referent(value: Any) -> Any:
    """What a weak reference refers to; None for other objects and for references that watch its end."""
    return value() if type(value) is weakref.ref and value.__callback__ is None else None


def _of_function(function: FunctionType, where: str) -> Iterator[Place]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        yield Place(f"{where}.<closure>.{name}", content, functools.partial(setattr, cell, "cell_contents"))
    for i, item in enumerate(function.__defaults__ or ()):
        yield Place(f"{where}.__defaults__[{i}]", item, functools.partial(_put_default, function, i))
    keywords = function.__kwdefaults__ or {}
    for name, item in keywords.items():
        yield Place(f"{where}.__kwdefaults__[{name!r}]", item, functools.partial(keywords.__setitem__, name))
    yield from _of_dictionary(vars(function), where)
    for name in _globals_read(function):
        # A variable of the user's file is not the model's to change.
        yield Place(f"{where}.<globals>.{name}", function.__globals__[name], "as a global variable")


def _put_default(function: FunctionType, i: int, new: Any) -> None:
    held = list(function.__defaults__ or ())
    held[i] = new
    function.__defaults__ = tuple(held)


def _globals_read(function: FunctionType) -> Iterator[str]:
    """Names of the global variables that a function reads and that may lead to tables."""
    known = function.__globals__
    if str(known.get("__name__")).partition(".")[0] in _CLOSED_PACKAGES:
        return
    codes = [function.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
        # Names of attributes are in `co_names` as well, so the instructions decide.
        some = {n for n in code.co_names if n in known and _may_lead_to_tables(known[n], known)}
        if some:
            yield from {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"} & some


def _may_lead_to_tables(value: Any, known: dict[str, Any]) -> bool:
    """Of a global variable: functions of other files are their own, and lead too far."""
    if isinstance(value, FunctionType):
        return value.__globals__ is known
    return isinstance(value, (nn.Module, nn.Parameter, *CONTAINERS)) or not is_closed(value)


def _of_partial(value: functools.partial[Any], where: str) -> Iterator[Place]:
    yield Place(f"{where}.func", value.func, functools.partial(_put_argument, value, -1))
    for i, item in enumerate(value.args):
        yield Place(f"{where}.args[{i}]", item, functools.partial(_put_argument, value, i))
    for name, item in list(value.keywords.items()):
        yield Place(f"{where}.keywords[{name!r}]", item, functools.partial(value.keywords.__setitem__, name))
    yield from _of_dictionary(vars(value), where)


def _put_argument(value: functools.partial[Any], i: int, new: Any) -> None:
    state: Any = value.__reduce__()[2]
    function, args, keywords, attributes = state
    held = [function, *args]
    held[i + 1] = new
    value.__setstate__((held[0], tuple(held[1:]), keywords, attributes))  # type: ignore[attr-defined]


def _of_module(module: nn.Module, where: str) -> Iterator[Place]:
    for name, child in module._modules.items():
        yield Place(f"{where}.{name}", child, functools.partial(module._modules.__setitem__, name))
    for name, parameter in module._parameters.items():
        yield Place(f"{where}.{name}", parameter, "as its parameter")
    yield from attributes_of(module, where)


def attributes_of(module: nn.Module, path: str) -> Iterator[Place]:
    """The attributes of a module beside torch's own, and its hooks."""
    for name, item in list(vars(module).items()):
        if name not in TORCH_OWN:
            where = join_path(path, name)
            yield Place(where, item, functools.partial(vars(module).__setitem__, name))
    yield from hooks_of(module, path)


def class_variables(cls: type, path: str) -> Iterator[Place]:
    """What the methods of a class read beside their arguments, and what its variables hold."""
    if cls.__module__.partition(".")[0] in _CLOSED_PACKAGES:
        return
    for name, value in list(vars(cls).items()):
        where = join_path(path, name)
        functions = _functions_of(value)
        for function in functions:
            if name != "__init__":
                for place in _of_function(function, where):
                    yield place._replace(put="as a variable of the method")
        if not functions and not name.startswith("__"):
            yield Place(where, value, "as a class variable")


def _functions_of(value: Any) -> list[FunctionType]:
    """The functions that a name of a class stands for; none where it is a variable."""
    if isinstance(value, property):
        found = [value.fget, value.fset, value.fdel]
    else:
        found = [value.func if isinstance(value, functools.cached_property) else getattr(value, "__func__", value)]
    return [f for f in found if isinstance(f, FunctionType)]


def hooks_of(module: nn.Module, path: str) -> Iterator[Place]:
    """The hooks of a module."""
    for kind in HOOKS:
        hooks: dict[Any, Any] = vars(module).get(kind) or {}
        for key, hook in list(hooks.items()):
            where = join_path(path, f"{kind}[{key}]")
            yield Place(where, hook, functools.partial(hooks.__setitem__, key))


def _of_object(value: Any, where: str) -> Iterator[Place]:
    try:
        # Past what the class makes of attributes: proxies answer for others.
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        held = None
    if isinstance(held, dict):
        yield from _of_dictionary(held, where)
    for cls in type(value).__mro__:
        for name, slot in vars(cls).items() if "__slots__" in vars(cls) else ():
            if isinstance(slot, MemberDescriptorType):
                try:
                    item = slot.__get__(value)
                except AttributeError:  # not assigned yet
                    continue
                yield Place(f"{where}.{name}", item, functools.partial(slot.__set__, value))


def _of_dictionary(held: dict[str, Any], where: str) -> Iterator[Place]:
    for name, item in list(held.items()):
        yield Place(f"{where}.{name}", item, functools.partial(held.__setitem__, name))
