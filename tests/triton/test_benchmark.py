"""The benchmark of the GPU kernels can be walked through without a GPU, and measures nothing there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recsys_embed.kernels.triton import status

ROOT = Path(__file__).parents[2]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py"), *arguments]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    given = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


@pytest.mark.kernels
def test_it_runs_from_end_to_end() -> None:
    done = bench("--smoke")
    assert done.returncode == 0, done.stderr
    assert "nothing was measured" in done.stdout


@pytest.mark.skipif(status.why_not() is None and not status.interpreted(), reason="there is something to measure")
def test_it_says_why_it_measures_nothing(tmp_path: Path) -> None:
    done = bench("--out", str(tmp_path / "out.json"))
    assert done.returncode == 1
    assert "nothing to measure" in done.stderr
    assert not list(tmp_path.iterdir())
