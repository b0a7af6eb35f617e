"""The stable names for extensions, and extensions of other distributions."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from recsys_embed import extend


@pytest.mark.parametrize("name", extend.__all__)
def test_every_name_resolves_and_says_what_it_is(name: str) -> None:
    value = getattr(extend, name)
    assert inspect.getdoc(value)
    assert not name.startswith("_")


def test_the_names_that_load_late_are_those_a_type_checker_sees() -> None:
    tree = ast.parse(inspect.getsource(extend))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    seen = {a.asname or a.name: (str(n.module).removeprefix("recsys_embed."), a.name) for n in imports for a in n.names}
    assert seen == extend._LAZY
    assert sorted(extend.__all__) == sorted(set(extend.__all__))
    with pytest.raises(AttributeError, match="has no attribute 'never'"):
        extend.never  # noqa: B018


METHOD = """
from dataclasses import MISSING, dataclass
from typing import ClassVar

from recsys_embed.extend import *


@dataclass(frozen=True, kw_only=True)
class FoldConfig(MethodConfig):
    method: ClassVar[str] = "fold"
    num_rows: int = param(MISSING, "rows of the table", low=1)

    def build_program(self, spec):
        table = Table("weight", self.num_rows, spec.embedding_dim, Initializer.plain(spec))
        return LookupProgram((table,), (RowLookup("weight", MixedRadixDigit(mod=self.num_rows)),))

    @classmethod
    def sized(cls, spec, size, **params):
        return cls.from_params({**params, "num_rows": size})


class FoldEmbedding(CompressedEmbedding):
    config_cls = FoldConfig


register(FoldEmbedding, paper="a test")
"""

MODEL = """
from recsys_embed.extend import *
from recsys_embed.models.lr import LR


@register_model
class Logit(LR):
    key = "logit"
"""

RULE = """
from dataclasses import dataclass

from recsys_embed.extend import *
from recsys_embed.optim import SGD


@register_rule("signsgd")
@dataclass(frozen=True)
class SignSGD(SGD):
    def update(self, weight, grad, state, lr, step):
        return weight.sub(grad.sign(), alpha=lr)
"""

POINTS = """
[recsys_embed.methods]
fold = fold_plugin.method
broken = fold_plugin.broken
[recsys_embed.models]
logit = fold_plugin.model
[recsys_embed.rules]
signsgd = fold_plugin.rule
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip install`` leaves of a distribution with entry points."""
    site = tmp_path_factory.mktemp("site")
    package = site / "fold_plugin"
    package.mkdir()
    files = {"__init__": "", "method": METHOD, "model": MODEL, "rule": RULE, "broken": "import no_such_library"}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    info = site / "fold_plugin-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fold-plugin\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(POINTS)
    return site


def run(site: Path, script: str) -> subprocess.CompletedProcess[str]:
    path = [str(site), str(Path(extend.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {path!r}\n" + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=site)


@pytest.mark.slow
def test_plugins_are_imported_at_first_need(installed: Path) -> None:
    script = """
        import json, warnings
        import recsys_embed as rse
        from recsys_embed.models import get_model
        from recsys_embed.optim import make_rule
        assert not any(name.startswith("fold_plugin") for name in sys.modules), "the import of the library imports none"
        rse.get_method("hash"), rse.HashEmbedding
        assert not any(name.startswith("fold_plugin") for name in sys.modules), "nor do names that are known"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            emb = rse.make_embedding("fold", 1000, 4, num_rows=8)
            again = rse.list_methods()
        texts = [str(w.message) for w in caught]
        plan = rse.Plan.from_dict({"version": 1, "features": {"a": {"method": "fold", "num_rows": 8}}})
        schema = rse.Schema([rse.FeatureSpec("a", 1000, 4)])
        rse.export(rse.EmbeddingCollection(schema, plan), "fold.rse")
        print(json.dumps({
            "texts": texts, "methods": [m.name for m in again], "config": emb.config.to_dict(),
            "class": rse.FoldEmbedding is type(emb), "model": get_model("logit").key, "rule": str(make_rule("signsgd")),
        }))
    """
    done = run(installed, script)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["class"]
    assert found["config"] == {"method": "fold", "num_rows": 8, "seed": 0}
    assert "fold" in found["methods"]
    assert found["model"] == "logit"
    assert found["rule"].startswith("SignSGD(")
    assert found["texts"] == [
        "plugin 'broken' (fold_plugin.broken, from fold-plugin 1.2) cannot be imported: "
        "ModuleNotFoundError: No module named 'no_such_library'"
    ]
    # A file that was written with a plugin's method is read where nothing has named it; what is broken is told of.
    done = run(installed, "import recsys_embed as rse; print(rse.load('fold.rse')); rse.get_method('broken')")
    assert "EmbeddingCollection" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("recsys_embed.errors.UnknownNameError")]
    assert "unknown method 'broken'" in line
    assert "plugin 'broken' (fold_plugin.broken, from fold-plugin 1.2) cannot be imported" in line


@pytest.mark.slow
def test_the_command_line_knows_plugins(installed: Path) -> None:
    script = """
        from recsys_embed.cli import main
        for args in (["doctor", "--json"], ["doctor"], ["train", "--help"]):
            print(main(args), flush=True)
            print("-----")
    """
    done = run(installed, script)
    doctor, text, usage, _ = done.stdout.split("-----\n")
    report = json.loads(doctor.rstrip().removesuffix("1"))
    assert {p["name"]: p["on"] for p in report["plugins"]} == {
        "broken": False, "fold": True, "logit": True, "signsgd": True,
    }  # fmt: skip
    assert not report["ok"]
    assert any("plugin 'broken'" in fault for fault in report["faults"])
    assert "off  recsys_embed.methods: plugin 'broken'" in text
    assert text.rstrip().endswith("\n1")
    assert "logit" in usage
