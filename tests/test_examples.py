"""Every script of examples/ runs as a person would start it, in its shortest form."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import slow_but

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p.name for p in (ROOT / "examples").glob("*.py"))
THEIRS = ("deepctr_torch", "torchfm", "torchrec")


@pytest.mark.parametrize("script", slow_but(SCRIPTS, "drop_in.py"))
def test_an_example_runs(script: str, tmp_path: Path) -> None:
    source = (ROOT / "examples" / script).read_text()
    for library in THEIRS:
        if re.search(rf"\b(from|import) {library}\b", source):
            pytest.importorskip(library, exc_type=ImportError)
    command = [sys.executable, str(ROOT / "examples" / script), "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout.lower()
