"""What type checkers of users see: public signatures say what they take, and lookups are typed all the way."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, get_args, get_origin

import numpy as np
import pytest
from torch import Tensor

import recsys_embed
from recsys_embed.typing import JSON, JSONMapping

PACKAGE = Path(recsys_embed.__file__).parent
ROOMS = (
    "", "collection", "compress", "data", "embedding", "exports", "extend", "models", "optim", "planning",
    "report.memory", "search", "sharding", "testing", "train",
)  # fmt: skip

# Aliases that stand for anything, and why.
ANYTHING = {
    "JSON": "values of a JSON object",
    "JSONMapping": "values of a JSON object",
    "Option": "an option's type stands where it is declared",
    "Signature": "a transform alone reads the items of its signature",
    "DynamicShapes": "nested as the inputs of a user's model are",
    "Inputs": "what a user's model takes",
}

# Functions of the lookup that take anything, and why.
UNTYPED = {
    "_load_from_state_dict": "torch's hook",
    "_save_to_state_dict": "torch's hook",
    "__reduce__": "pickle's protocol",
    "__getattr__": "Python's protocol",
    "__setattr__": "Python's protocol: any value",
    "__torch_dispatch__": "torch's protocol: any operation with any arguments",
    "__torch_function__": "torch's protocol: any function with any arguments",
    "__setstate__": "pickle's protocol",
    "_guarded": "results of any function",
    "_identity": "JSON values",
    "_check_identity": "JSON values",
    "_show_extra_state": "JSON values",
    "_upgraded": "JSON values of a state dict",
}
HOT = (
    *(f"collection/{p.name}" for p in (PACKAGE / "collection").glob("*.py") if "state" not in p.name),
    "embedding/compressed_embedding.py",
    "embedding/module_tables.py",
    "embedding/shared_tables.py",
    "kernels/fused_gather.py",
    "kernels/id_checks.py",
    "kernels/reference.py",
    "kernels/stored_tables.py",
    "kernels/unseen_ids.py",
    "kernels/vectorised.py",
    *(f"kernels/native/{name}.py" for name in ("autograd", "handles", "lookup", "masks", "ops", "records")),
)


def hides_any(annotation: object, scope: dict[str, Any]) -> bool:
    """Whether an annotation, or an alias in it, says Any without a reason in ``ANYTHING``."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    names = [name for name in re.findall(r"\w+", text) if name not in ANYTHING]
    return "Any" in names or any(is_open(scope.get(name)) for name in names)


def is_open(alias: object) -> bool:
    """Whether an alias says Any, but in objects of JSON."""
    if alias in (JSON, JSONMapping):
        return False
    inner = alias if isinstance(alias, list) else get_args(alias)
    if get_origin(alias) is np.ndarray:
        inner = inner[1:]  # a shape of any kind
    return alias is Any or any(is_open(one) for one in inner)


def signatures(thing: Any) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Names, annotations and globals of a function, or of the public members of a class."""
    if isinstance(thing, FunctionType):
        function = inspect.unwrap(thing)
        yield f"{function.__module__}.{function.__qualname__}", function.__annotations__, function.__globals__
    elif inspect.isclass(thing):
        fields = {k: v for k, v in inspect.get_annotations(thing).items() if not k.startswith("_")}
        yield f"{thing.__module__}.{thing.__qualname__}", fields, vars(sys.modules[thing.__module__])
        for name in dir(thing):
            if name.startswith("_") and name not in ("__init__", "__call__"):
                continue
            member = inspect.getattr_static(thing, name)
            member = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
            if isinstance(member, FunctionType) and member.__module__.startswith("recsys_embed."):
                yield from signatures(member)


@pytest.mark.parametrize("room", ROOMS)
def test_public_signatures_name_their_types(room: str) -> None:
    if room == "sharding":
        pytest.importorskip("torchrec")
    module = importlib.import_module(f"recsys_embed.{room}".rstrip("."))
    found = {
        f"{where}: {name}"
        for public in module.__all__
        for where, annotations, scope in signatures(getattr(module, public))
        for name, annotation in annotations.items()
        if hides_any(annotation, scope)
    }
    assert found == set()


def test_any_is_found_wherever_it_hides() -> None:
    scope = {"Hidden": Mapping[str, list[Any]], "Values": Any, "Rows": list[JSON], "Option": Any, "Tensor": Tensor}
    found = ["Any", "dict[str, list[Any]]", "Hidden | None", "list[Values]"]
    assert all(hides_any(annotation, scope) for annotation in (*found, Any, dict[str, Any] | None))
    assert not any(hides_any(annotation, scope) for annotation in ("Rows | Tensor", "Option", "Mapping[str, Tensor]"))


@pytest.mark.parametrize("file", HOT)
def test_lookups_are_typed_all_the_way(file: str) -> None:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    passed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in UNTYPED
        for inner in ast.walk(node)
    }
    lines = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "Any" and id(n) not in passed]
    assert lines == []
