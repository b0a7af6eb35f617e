"""Modules are still found under the names they had in version 0.1."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import recsys_embed
from recsys_embed._moved import MOVED, RENAMED


def is_a_module(name: str) -> bool:
    place = Path(recsys_embed.__file__).parent / name.replace(".", "/")
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


@pytest.mark.parametrize("room", sorted({old.rpartition(".")[0] for old in MOVED}))
def test_an_old_name_warns_and_is_the_module_of_today(room: str) -> None:
    for old, new in MOVED.items():
        if old.rpartition(".")[0] != room:
            continue
        sys.modules.pop(f"recsys_embed.{old}", None)
        with pytest.warns(DeprecationWarning, match=f"recsys_embed.{old} is now recsys_embed.{new}"):
            module = importlib.import_module(f"recsys_embed.{old}")
        assert module is importlib.import_module(f"recsys_embed.{new}")


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_a_name_that_changed_is_found_and_its_warning_says_where_it_stands_and_who_used_it(old: str) -> None:
    sys.modules.pop(f"recsys_embed.{old}", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"recsys_embed.{old}")
    for name, today in RENAMED[old].items():
        home, _, current = today.rpartition(".")
        text = f"{name} is no longer in recsys_embed.{old}; import it from recsys_embed.{home}"
        with pytest.warns(DeprecationWarning, match=text + (f" as {current}" if current != name else "$")) as caught:
            found = getattr(module, name)
        assert found is getattr(importlib.import_module(f"recsys_embed.{home}"), current)
        assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


def test_names_of_modules_that_stay_are_found_where_they_were() -> None:
    for user in ("from recsys_embed.train.run import goes_on", "from recsys_embed.search import Space"):
        with pytest.warns(DeprecationWarning, match=r"import it from recsys_embed\.\S+ as \w+$") as caught:
            exec(compile(user, "their_file.py", "exec"), {"__name__": "theirs"})
        assert {w.filename for w in caught} == {"their_file.py"}


def test_old_names_work_in_every_form_of_import_and_unknown_ones_do_not() -> None:
    code = """
import warnings
warnings.simplefilter("ignore")
import recsys_embed.shipping.read
from recsys_embed.shipping import export, load
from recsys_embed import program
from recsys_embed.report.memory_values import MemoryReport
import recsys_embed as rse
from recsys_embed.exports import read
from recsys_embed.core.program import LookupProgram
from recsys_embed import members
from recsys_embed.program import *
assert Probe is program.RowLookup and Table is program.Table
assert members.Index.smallest('a', 9, 0, 3).count == 3 and program.Member is program.RankInSet
assert program.Probe is program.RowLookup and program.Digit(mod=3).mod == 3
assert rse.shipping.read is read and program.LookupProgram is LookupProgram and export is rse.export
assert read.__name__ == "recsys_embed.exports.read" == read.__spec__.name
try:
    import recsys_embed.programm
except ModuleNotFoundError as error:
    assert "recsys_embed.programm" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", code], check=True)


def test_nothing_of_the_package_uses_an_old_name() -> None:
    code = "import recsys_embed as rse; rse.export, rse.plan_for_budget, rse.memory_report, rse.compress_"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:recsys_embed", "-c", code], check=True)
    assert [old for old in {**MOVED, **RENAMED} if is_a_module(old)] == []
