"""A conversion stopped anywhere goes on where it was and ends with the same bytes; memory stays bounded."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import contents, random_rows, write

from recsys_embed.data import CriteoOptions, StorageError, convert_criteo, make_synthetic
from recsys_embed.data import folder as folder_module
from recsys_embed.data import text_blocks as source
from recsys_embed.data.conversion import MIN_MEMORY
from recsys_embed.data.criteo import convert, ingest
from recsys_embed.errors import DataError
from tests.tiers import slow_but

OPTIONS = CriteoOptions(workers=1)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(ingest, "part_blocks", lambda options: 2)


@pytest.mark.parametrize("suffix", slow_but([".tsv", ".gz"], ".gz"))
def test_stopped_before_any_rename(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    text = write(tmp_path / "a.tsv", random_rows(400, 3))
    lines = text.read_bytes().splitlines(keepends=True)
    lines[50::90] = [b"broken\n"] * len(lines[50::90])
    lines[200] = b"endless" * 20_000 + b"\n"
    text = tmp_path / ("b" + suffix)
    text.write_bytes(gzip.compress(b"".join(lines)) if suffix == ".gz" else b"".join(lines))
    options = CriteoOptions(workers=1, on_bad_row="quarantine")
    assert convert_criteo(text, tmp_path / "whole", options).quarantined == 5
    wanted = contents(tmp_path / "whole")
    bad = [json.loads(record)["line"] for record in wanted["quarantine.jsonl"].splitlines()]
    assert bad == [51, 141, 201, 231, 321]
    assert sum(name.startswith("train-") for name in wanted) > 1
    real = os.replace
    left = 0

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    stops = 0
    for step in (5, 6, 7, 11, 23):
        # Every run dies a few files after the last one did, each time from another state.
        out = tmp_path / f"out{step}"
        for _ in range(400):
            left = step
            try:
                convert_criteo(text, out, options)
                break
            except Killed:
                stops += 1
        assert contents(out) == wanted, f"stopping every {step} files"
    assert stops > 40


@pytest.mark.slow  # as in data/table, whose kills are in the fast tier
def test_killed_process(tmp_path: Path) -> None:
    made = make_synthetic(tmp_path / "text", 30_000, 1, text_only=True)
    text = made.out / "synthetic.tsv"
    script = tmp_path / "convert.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from recsys_embed.data import CriteoOptions, convert_criteo, text_blocks
            from recsys_embed.data.criteo import ingest
            text_blocks.BLOCK_BYTES = 200_000
            ingest.part_blocks = lambda options: 2
            print("ready", flush=True)
            convert_criteo(sys.argv[1], sys.argv[2], CriteoOptions(workers=2))
            """
        )
    )
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, script, text, out], env=env, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    whole = start(tmp_path / "whole")
    begun = time.perf_counter()
    with whole:
        assert whole.wait(60) == 0
    took = time.perf_counter() - begun
    kills = 0
    for share in (0.3, 0.3, 1000):
        with start(tmp_path / "out") as process:
            try:
                process.wait(share * took)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
    assert process.returncode == 0
    assert kills
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_changed_settings_discard_unfinished_work(tmp_path: Path, small_parts: None) -> None:
    text = write(tmp_path / "a.tsv", random_rows(400, 3))
    text.write_bytes(text.read_bytes() + b"broken\n")
    with pytest.raises(DataError, match="line 401"):
        convert_criteo(text, tmp_path / "out", OPTIONS)
    write(text, random_rows(300, 3))
    report = convert_criteo(text, tmp_path / "out", OPTIONS)
    assert sum(report.rows.values()) == 300
    assert "unfinished work with other settings or inputs" in report.notices[0]


def test_work_from_before_a_restart_is_not_trusted(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write(tmp_path / "a.tsv", random_rows(400, 3))
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "boot_id", lambda: "before")
        patch.setattr(convert, "encode_fields", lambda *a: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            convert_criteo(text, tmp_path / "out", OPTIONS)
    for part in (tmp_path / "out" / ".work" / "parts").glob("*.bin"):
        part.write_bytes(bytes(part.stat().st_size))  # what a power cut can leave of a file that was not flushed
    assert "machine_start: before" in convert_criteo(text, tmp_path / "out", OPTIONS).notices[0]
    convert_criteo(text, tmp_path / "whole", OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_full_disk_says_so_and_can_be_continued(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write(tmp_path / "a.tsv", random_rows(400, 3))
    with monkeypatch.context() as patch:
        calls = iter(range(10**6))

        def fsync(fd: int) -> None:
            if next(calls) == 5:
                raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(folder_module.os, "fsync", fsync)
        with pytest.raises(StorageError, match=r"No space left on device.*continues where it stopped"):
            convert_criteo(text, tmp_path / "out", OPTIONS)
    convert_criteo(text, tmp_path / "out", OPTIONS)
    convert_criteo(text, tmp_path / "whole", OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    text = write(tmp_path / "a.tsv", random_rows(5, 3))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(StorageError, match="Permission denied"):
        convert_criteo(text, locked / "out")


def test_file_size_limit_is_a_clear_error(tmp_path: Path) -> None:
    """A limit on file size stands in for a disk that fills while columns are written."""
    made = make_synthetic(tmp_path / "text", 20_000, 1, text_only=True)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "from recsys_embed.cli import main; sys.exit(main(['data', 'criteo', *sys.argv[1:]]))"
    )
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code, made.out / "synthetic.tsv", tmp_path / "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be written (File too large)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """The smallest bound holds for a file of several parts; a second one, twice as large, adds next to nothing."""
    code = (
        "import pathlib, resource, sys\n"
        "from recsys_embed.data import CriteoOptions, convert_criteo\n"
        "from recsys_embed.data.conversion import MIN_MEMORY\n"
        "convert_criteo(sys.argv[1:-1], sys.argv[-1], CriteoOptions(max_memory=MIN_MEMORY, workers=1))\n"
        # Where there is /proc: ru_maxrss starts at the peak of the process that forked this one, VmHWM does not.
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = [x.split()[1] for x in status.read_text().splitlines() if 'VmHWM' in x] if status.exists() else []\n"
        "print(*peak or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])"
    )
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    made = make_synthetic(tmp_path / "text", 80_000, 1, scale=0.01, text_only=True)
    text = made.out / "synthetic.tsv"
    peaks = []
    for copies in (1, 3):
        longer = tmp_path / f"text{copies}.tsv"
        longer.write_bytes(text.read_bytes() * copies)
        command = [sys.executable, "-c", code, longer, tmp_path / f"out{copies}"]
        peaks.append(int(subprocess.run(command, env=env, capture_output=True, check=True).stdout) / 1024)
    scale = 1024 if sys.platform == "darwin" else 1
    assert peaks[1] / scale < MIN_MEMORY >> 20
    assert peaks[1] - peaks[0] < 80 * scale
