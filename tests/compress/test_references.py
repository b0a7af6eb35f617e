"""Whatever a model reads its table through reads the new table afterwards, or nothing is changed."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import recsys_embed as rse
from recsys_embed.compress import model_replacement
from recsys_embed.compress.exchange import ReversibleChange, apply_all
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.exports import export, load

IDS = torch.randint(0, 300, (16,), generator=torch.Generator().manual_seed(0))
HASH = {"e": rse.HashConfig(num_buckets=50)}


@dataclass(frozen=True)
class Helper:
    """Not a module."""

    held: Any

    def __call__(self, ids: Tensor) -> Any:
        return self.held(ids)


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("empty", "held")

    def __init__(self, held: Any) -> None:
        self.held = held

    def read(self, ids: Tensor) -> Any:
        return self.held(ids)


class Outside(nn.Module):
    """A module that its model does not register."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.inner = table

    def forward(self, ids: Tensor) -> Any:
        return self.inner(ids)


def _with_default(table: Any) -> Callable[..., Any]:
    return lambda ids, first=0, read=table: read(ids)


def _with_keyword(table: Any) -> Callable[..., Any]:
    def read(ids: Tensor, *, table: Any = table) -> Any:
        return table(ids)

    return read


def _wrapped(table: Any) -> Callable[..., Any]:
    def inner(ids: Tensor) -> Any:
        return table(ids)

    @functools.wraps(inner)
    def outer(ids: Tensor) -> Any:
        return inner(ids)

    return functools.lru_cache(outer)


def _attribute(table: Any) -> Callable[..., Any]:
    def read(ids: Tensor) -> Any:
        return read.table(ids)  # type: ignore[attr-defined]

    read.table = table  # type: ignore[attr-defined]
    return read


def _weak(table: Any) -> Callable[..., Any]:
    reference = weakref.ref(table)
    return lambda ids: reference()(ids)


EXCHANGED: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "closure": lambda table: lambda ids: table(ids),
    "default": _with_default,
    "keyword default": _with_keyword,
    "decorated": _wrapped,
    "attribute of a function": _attribute,
    "list in a closure": lambda table: [lambda ids, some=[table]: some[0](ids)][0],
    "argument": lambda table: functools.partial(lambda table, ids: table(ids), table),
    "called by partial": lambda table: functools.partial(table),
    "partial of a method": lambda table: functools.partial(Slotted(table).read),
    "frozen object": Helper,
    "object in an object": lambda table: Helper(Helper(table)),
    "slots": lambda table: Slotted(table).read,
    "module outside the tree": lambda table: Helper(Outside(table)),
    "weak reference": _weak,
}
REFUSED: dict[str, tuple[Callable[[Any], Callable[[Tensor], Any]], str]] = {
    "weight in a partial": (
        lambda table: functools.partial(functional.embedding, weight=table.weight),
        r"look\.keywords\['weight'\] holds",
    ),
    "weight in a closure": (
        lambda table: [lambda ids, weight=table.weight: weight[ids]][0],
        r"look\.__defaults__\[0\] holds",
    ),
    "weight in an object": (lambda table: Helper(table.weight.__getitem__), r"look\.held holds"),
    "bound method": (lambda table: Helper(table.forward), r"look\.held holds the replaced .*bound method"),
    "view in an object": (
        lambda table: Helper(table.weight.detach()[:].__getitem__),
        r"look\.held holds a view of the",
    ),
    "deque": (lambda table: [lambda ids, some=deque([table]): some[0](ids)][0], r"in a deque"),
    "frozen set": (lambda table: [lambda ids, some=frozenset([table]): next(iter(some))(ids)][0], r"in a frozenset"),
    "key": (lambda table: [lambda ids, some={table: 1}: next(iter(some))(ids)][0], r"as a key"),
}


class Model(nn.Module):
    """Reads its table through something else."""

    def __init__(self, look: Callable[[Any], Callable[[Tensor], Any]]) -> None:
        super().__init__()
        self.e = nn.Embedding(300, 8)
        self.look: Any = None
        object.__setattr__(self, "look", look(self.e))

    def forward(self, ids: Tensor) -> Any:
        return self.look(ids)


@pytest.mark.parametrize("name", EXCHANGED)
def test_what_holds_the_table_reads_the_new_one(name: str, tmp_path: Path) -> None:
    model = Model(EXCHANGED[name])
    rse.compress_(model, HASH)
    assert torch.equal(model(IDS), model.e(IDS))
    model(IDS).sum().backward()
    assert model.e.table("weight").grad is not None
    wanted = model(IDS).detach()
    export(model, tmp_path / "m", "int8")
    served = load(tmp_path / "m", into=Model(EXCHANGED[name]))
    torch.testing.assert_close(served(IDS), wanted, atol=0.05, rtol=0)
    assert torch.equal(served(IDS), served.e(IDS))
    rse.materialize_(model)
    assert type(model.e) is nn.Embedding
    with torch.no_grad():
        model.e.weight.zero_()
    if name != "decorated":  # which remembers its results
        assert not model(IDS).any()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exchanged_is_named_before_anything_changes(name: str, tmp_path: Path) -> None:
    look, sentence = REFUSED[name]
    model = Model(look)
    before = model(IDS).clone()
    with pytest.raises(ConfigError, match=sentence):
        rse.compress_(model, HASH)
    assert type(model.e) is nn.Embedding
    assert torch.equal(model(IDS), before)
    export(model, tmp_path / "m", "int8")
    fresh = Model(look)
    before = fresh(IDS).clone()
    with pytest.raises(CheckpointError, match=sentence):
        load(tmp_path / "m", into=fresh)
    assert torch.equal(fresh(IDS), before)


def test_a_weight_that_stays_one_is_that_of_the_file(tmp_path: Path) -> None:
    look = REFUSED["weight in a partial"][0]
    model = Model(look)
    export(model, tmp_path / "m")
    served = load(tmp_path / "m", into=Model(look))
    assert torch.equal(served(IDS), model(IDS))


TABLE: Any = None


def _look(ids: Tensor) -> Any:
    return TABLE["held"][0](ids)


def test_variables_that_others_read_too_are_refused() -> None:
    global TABLE
    model = Model(lambda table: lambda ids: TABLE(ids))
    TABLE = model.e
    with pytest.raises(ConfigError, match=r"look\.<globals>\.TABLE holds the replaced .* global variable"):
        rse.compress_(model, HASH)
    table = nn.Embedding(300, 8)

    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = table

        def forward(self, ids: Tensor) -> Tensor:
            return table(ids)

    with pytest.raises(ConfigError, match=r"forward\.<closure>\.table holds the replaced table e, as a variable"):
        rse.compress_(Method(), HASH)
    # Another function of the file may be what reads the variable.
    TABLE = {"held": [table]}
    reads: dict[str, Any] = {
        "function": lambda self, ids: _look(ids),
        "static": staticmethod(lambda ids: TABLE["held"][0](ids)),
        "class": classmethod(lambda cls, ids: TABLE["held"][0](ids)),
        "property": property(lambda self: TABLE["held"][0]),
        "cached": functools.cached_property(lambda self: TABLE["held"][0]),
        "variable": {"held": table},
        "itself": Helper(table),
    }
    for name, member in reads.items():
        model = nn.ModuleDict({"e": table})
        model.__class__ = type("Reader", (nn.ModuleDict,), {name: member, "__module__": __name__})
        with pytest.raises(ConfigError, match=rf"{name}.* holds the replaced table.*, as a .*variable"):
            rse.compress_(model, HASH)
        assert model["e"] is table
    # An attribute of the same name as a global variable is another thing.
    TABLE = nn.ModuleDict({"e": nn.Embedding(300, 8)})
    model = Model(lambda table: lambda ids: model.TABLE(ids))
    model.TABLE = model.e
    TABLE = model.e
    rse.compress_(model, HASH)
    assert torch.equal(model(IDS), model.e(IDS))
    TABLE = None


@pytest.mark.parametrize("where", ["", "e"])
def test_hooks_read_the_new_table(where: str) -> None:
    model = Model(EXCHANGED["closure"])
    read: list[nn.Module] = []

    def add(table: nn.Module) -> Callable[..., None]:
        return lambda module, args: read.append(table)

    model.get_submodule(where).register_forward_pre_hook(add(model.e))
    rse.compress_(model, HASH)
    model(IDS)
    assert read == [model.e]


def test_a_failed_change_puts_references_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("stop")

    def fails(changes: list[ReversibleChange]) -> None:
        apply_all([*changes, ReversibleChange(fail, lambda: None)])

    monkeypatch.setattr(model_replacement, "apply_all", fails)
    looks = {name: Model(look) for name, look in EXCHANGED.items()}
    for name, model in looks.items():
        before = model(IDS).clone()
        with pytest.raises(RuntimeError, match="stop"):
            rse.compress_(model, HASH)
        assert torch.equal(model(IDS), before), name
        assert model.e.weight.shape == (300, 8)


def test_the_search_ends_in_large_and_cyclic_objects() -> None:
    class Node:
        def __init__(self, other: Any) -> None:
            self.other = other

    model = Model(EXCHANGED["closure"])
    model.ring = Node(None)
    model.ring.other = Node(model.ring)
    model.many = [*[Node(i) for i in range(20_000)], Node(model.e)]
    model.rows = [(i, 0.5) for i in range(101_000)]
    model.helper = Node(model.e)
    nested: Any = [model.e]
    for _ in range(14):
        nested = [nested]
    model.nested = nested
    rse.compress_(model, HASH)
    assert model.helper.other is model.many[-1].other is model.e
    for _ in range(15):
        nested = nested[0]
    assert nested is model.e
    model.rows = model.many = None
    for _ in range(60):
        nested = [nested]
    model.nested = nested
    with pytest.warns(UserWarning, match=r"nested leads to .* a part was searched"):
        rse.materialize_(model)
    with pytest.warns(UserWarning, match=r"nested leads to .* a part was searched"):
        rse.compress_(model, HASH)


def test_attributes_of_the_table_itself_follow() -> None:
    model = Model(EXCHANGED["closure"])
    model.e.helper = {"read": EXCHANGED["closure"](model.e)}
    rse.compress_(model, HASH)
    assert torch.equal(model.e.helper["read"](IDS), model.e(IDS))
    model.e.pair = ("table", weakref.ref(model.e))
    with pytest.raises(ConfigError, match=r"e\.pair holds the replaced .* as an attribute of the table itself"):
        rse.materialize_(model)


def test_names_inside_a_compiled_model_are_those_of_the_model() -> None:
    compiled: Any = torch.compile(nn.Sequential(nn.Embedding(30, 4)), backend="eager")
    rse.compress_(compiled, {"_orig_mod.0": rse.HashConfig(num_buckets=9)})
    assert isinstance(compiled._orig_mod[0], rse.HashEmbedding)
    with pytest.raises(ConfigError, match=r"names '_orig_mod\.1', which is no table"):
        rse.compress_(compiled, {"_orig_mod.1": rse.HashConfig(num_buckets=9)})
