"""Modules are still found under the names they had in version 0.1."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import recsys_embed
from recsys_embed._moved import MOVED


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
    assert [old for old in MOVED if is_a_module(old)] == []
