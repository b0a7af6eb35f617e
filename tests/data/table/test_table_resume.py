"""A table's conversion that is stopped anywhere goes on where it was and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys_embed.data import TableSchema, convert_table
from recsys_embed.data.table.rows import TableOptions
from recsys_embed.errors import ConfigError

SCHEMA = {
    "columns": {
        "click": {"kind": "label"},
        "user": {"kind": "categorical"},
        "item": {"kind": "categorical", "vocab": "item"},
        "seen": {"kind": "sequence", "vocab": "item"},
        "price": {"kind": "numeric", "fill": "median"},
        "ts": {"kind": "time"},
    },
    "split": {"kind": "last", "column": "user"},
}


class Killed(BaseException):
    """Stands for the end of the process."""


def events(rows: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "click": rng.integers(0, 2, rows),
            "user": [f"u{i}" for i in rng.integers(0, rows // 8, rows)],
            "item": rng.integers(2**53, 2**53 + 50, rows),
            "seen": [rng.integers(2**53, 2**53 + 60, k).tolist() for k in rng.integers(0, 5, rows)],
            "price": rng.random(rows),
            "ts": rng.integers(0, 10**9, rows),
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("lazy", [False, True])
def test_stopped_before_any_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool) -> None:
    monkeypatch.setattr(TableOptions, "part_rows", lambda self, row_bytes: 40)
    frame = events(150)
    frame = frame.with_columns(click=pl.when(pl.int_range(pl.len()) % 40 == 7).then(5).otherwise("click"))

    def convert(out: Path) -> int:
        table = frame.lazy().filter(pl.col("ts") >= 0) if lazy else frame
        return convert_table(table, out, SCHEMA, on_bad_row="quarantine", workers=1).quarantined

    assert convert(tmp_path / "whole") == 4
    wanted = contents(tmp_path / "whole")
    real, left, stops = os.replace, 0, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for step in (6, 7, 13):
        out = tmp_path / f"out{step}"
        for _ in range(200):
            left = step
            try:
                convert(out)
                break
            except Killed:
                stops += 1
        assert contents(out) == wanted, f"stopping every {step} files"
    assert stops > 8


def test_killed_process(tmp_path: Path) -> None:
    frame = events(3000)
    for i in range(6):
        frame.write_parquet(tmp_path / f"{i}.parquet")
    TableSchema.from_dict(SCHEMA).write(tmp_path / "a.toml")
    inputs, out = str(tmp_path / "*.parquet"), tmp_path / "out"
    command = [sys.executable, "-m", "recsys_embed", "data", "table", inputs, str(out)]
    tail = ["--schema", str(tmp_path / "a.toml"), "--workers", "1"]
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *tail], env=env, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob(".work/shards/*.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    convert_table(inputs, out, tmp_path / "a.toml", workers=1)
    convert_table(inputs, tmp_path / "whole", tmp_path / "a.toml", workers=1)
    assert contents(out) == contents(tmp_path / "whole")


def test_the_same_again_is_done_and_anything_else_refused(tmp_path: Path) -> None:
    frame = events(100)
    convert_table(frame, tmp_path / "out", SCHEMA)
    before = contents(tmp_path / "out")
    assert convert_table(frame.clone(), tmp_path / "out", SCHEMA).already_done
    assert contents(tmp_path / "out") == before
    changed = frame.with_columns(price=pl.when(pl.int_range(pl.len()) == 3).then(0.5).otherwise("price"))
    with pytest.raises(ConfigError, match="made with other settings or inputs"):
        convert_table(changed, tmp_path / "out", SCHEMA)
    assert not convert_table(changed, tmp_path / "out", SCHEMA, overwrite=True).already_done
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no data set"):
        convert_table(frame, tmp_path / "full", SCHEMA)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from recsys_embed.data import convert_table\n"
        "from recsys_embed.data.conversion import MIN_MEMORY\n"
        "convert_table(sys.argv[1], sys.argv[3], sys.argv[2], max_memory=MIN_MEMORY)\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(*(x.split()[1] for x in status.splitlines() if 'VmHWM' in x))"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    from recsys_embed.data.conversion import MIN_MEMORY

    piece = events(60_000)
    schema = {**SCHEMA, "split": {"kind": "time"}}
    TableSchema.from_dict(schema).write(tmp_path / "a.toml")
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    peaks = []
    for copies in (4, 16):
        folder = tmp_path / f"in{copies}"
        folder.mkdir()
        for i in range(copies // 4):
            pl.concat([piece] * 4).write_parquet(folder / f"{i}.parquet")
        command = [sys.executable, "-c", code, folder, tmp_path / "a.toml", tmp_path / f"out{copies}"]
        peaks.append(int(subprocess.run(command, env=env, capture_output=True, check=True).stdout) / 1024)
    assert peaks[1] < MIN_MEMORY >> 20
    assert peaks[1] - peaks[0] < 80
