"""``--model-factory package.module:function``: what is named is called; what is wrong, one clear line."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest

from recsys_embed.cli._target import load_target
from recsys_embed.errors import BudgetError, ConfigError

pytest.importorskip("typer")
_NAMES = count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a module into the working directory and return its name; interpreter state is put back after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write(text: str, package: str = "") -> str:
        name = f"target_{next(_NAMES)}"
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        return f"{package}.{name}" if package else name

    yield write
    for name in set(sys.modules) - known:
        del sys.modules[name]


MODEL = "import torch\ndef make():\n    return torch.nn.Embedding(10, 4)\n"


def test_function_of_the_working_directory_is_called(module) -> None:
    model = load_target(f"{module(MODEL)}:make")
    assert tuple(model.weight.shape) == (10, 4)
    assert str(Path.cwd()) in sys.path


def test_packages_and_dotted_attributes(module) -> None:
    text = "import torch\nclass Net(torch.nn.Module):\n    @classmethod\n    def small(cls):\n        return cls()\n"
    name = module(text, package="deep_target")
    assert type(load_target(f"{name}:Net.small")).__name__ == "Net"
    assert type(load_target(f"{name}:Net")).__name__ == "Net"


@pytest.mark.parametrize(
    "text", ["", "make", ":make", "a:", "a:b:c", "a b:make", "../x:make", "a..b:make", "a:make()", "a:1x"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--model-factory takes package\.module:function"):
        load_target(text)


def test_absent_modules_and_attributes_are_named(module) -> None:
    name = module(MODEL)
    with pytest.raises(ConfigError, match=r"there is no module 'no_such_thing' in .* or among the installed"):
        load_target("no_such_thing:make")
    with pytest.raises(ConfigError, match=rf"there is no module '{name}\.sub'"):
        load_target(f"{name}.sub:make")
    with pytest.raises(ConfigError, match=r"there is no module 'torch\.nnn'"):
        load_target("torch.nnn:make")
    with pytest.raises(ConfigError, match=rf"{name} has no 'mak'; did you mean 'make'\?"):
        load_target(f"{name}:mak")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import absent_library", "No module named 'absent_library'"),
        ("def make(:", "SyntaxError"),
        ("raise ValueError('first\\nsecond')", "ValueError: first$"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_what_fails_at_import_says_why(module, body: str, reason: str) -> None:
    name = module(body)
    with pytest.raises(ConfigError, match=f"importing '{name}' failed: .*{reason}"):
        load_target(f"{name}:make")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("make = 3", "is no function but of type int"),
        ("import torch; make = torch.nn.Identity()", "is no function but a model already"),
        ("def make(): return 3", r"make\(\) returned a int"),
        ("def make(): return None", r"make\(\) returned a NoneType"),
        ("def make(): return 1 / 0", r"make\(\) failed: ZeroDivisionError: division by zero"),
        ("def make(x): return x", r"make\(\) failed: TypeError: make\(\) missing 1 required"),
        ("def make(): raise SystemExit", r"make\(\) failed: SystemExit$"),
        ("def make(): raise KeyError", r"make\(\) failed: KeyError$"),
    ],
)
def test_what_is_no_model_is_refused(module, body: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load_target(f"{module(body)}:make")
    assert len(str(caught.value).splitlines()) == 1


def test_errors_of_the_library_itself_stay_what_they_are(module) -> None:
    name = module("import recsys_embed as r\ndef make(): return r.make_embedding('full', 10, 4, budget=1)\n")
    with pytest.raises(BudgetError):
        load_target(f"{name}:make")
