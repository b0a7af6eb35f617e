"""Files that are whole or absent: two writers, dead writers, full disks, and who writes that way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recsys_embed.data.folder import StorageError, write_bytes, write_file
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.utils.files import atomic_write, drop_leftovers, final_name, replacing, write_json, write_text

PACKAGE = Path(__file__).resolve().parents[1] / "recsys_embed"


def test_two_writers_of_one_path_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path) as (one, first), replacing(path) as (two, second):
        assert first != second
        one.write(b"one")
        two.write(b"two, longer")
    assert path.read_bytes() == b"one", "the outer block ends last"
    assert os.listdir(tmp_path) == ["a"]


def test_what_dead_writers_left_goes_and_what_live_ones_write_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    code = (
        "import os, sys; from recsys_embed.utils.files import replacing\n"
        "with replacing(sys.argv[1]) as (f, _): f.write(b'x'); f.flush(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    (dead,) = os.listdir(tmp_path)
    assert final_name(dead) == "a"
    (tmp_path / ".b.12.tmp").touch()
    with replacing(tmp_path / "b"):
        assert dead in os.listdir(tmp_path), "it is another file's"
        with replacing(path) as (f, _):
            f.write(b"y")
            assert dead not in os.listdir(tmp_path)
        drop_leftovers(tmp_path, age=3600)
        assert (tmp_path / ".b.12.tmp").exists()
        drop_leftovers(tmp_path)
        assert not (tmp_path / ".b.12.tmp").exists()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    drop_leftovers(tmp_path / "to come")  # holds none


def full(*args: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_names_the_file_in_the_error_of_the_room(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(path, "x")
    assert (type(caught.value), caught.value.filename) == (OSError, str(path))
    for act in (lambda: write_bytes(path, b"x"), lambda: write_file(path, lambda p: p.touch())):
        with pytest.raises(StorageError, match=r"a: cannot be written \(No space left on device\)"):
            act()

    def as_checkpoint() -> None:
        with replacing(path, failed=lambda p, e: CheckpointError(f"{p.name}: {e.strerror}")):
            pass

    with pytest.raises(CheckpointError, match=r"^a: No space left"):
        as_checkpoint()
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"before", ["a"])


def test_errors_of_the_block_are_told_as_they_are(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise StorageError("said already")

    with pytest.raises(StorageError, match=r"^said already$"):
        write_file(tmp_path / "a", broken)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a", float("nan"))
    for wrong in (tmp_path, tmp_path / "a\0b", "/dev/null"):
        with pytest.raises(ConfigError, match=r"folder|NUL"):
            atomic_write(wrong, lambda f: None)
    assert os.listdir(tmp_path) == []


def test_nothing_in_the_package_writes_a_file_in_another_way() -> None:
    """Names are replaced in one place; what else opens files to write does so under a name it was given for that."""
    writes = re.compile(r"os\.(replace|rename)|\.write_(text|bytes)\(|(?<!\w)open\([^)]*\"[wax]b?\+?\"|savefig")
    found = {
        str(p.relative_to(PACKAGE)): len(writes.findall(p.read_text()))
        for p in PACKAGE.rglob("*.py")
        if writes.search(p.read_text())
    }
    assert found == {
        "data/criteo/encode.py": 1,  # in a block of write_file, as are the others of data
        "data/criteo/ingest.py": 1,
        "data/criteo/parts.py": 1,
        "data/criteo/synthetic.py": 1,
        "data/publish.py": 1,
        "kernels/kinds.py": 1,  # the header of the C++ sources, by hand in a checkout
        "report/figures.py": 1,
        "data/folder.py": 1,  # the lock
        "train/run_log.py": 1,  # appends
        "utils/files.py": 2,  # one file, and several from a folder beside them
    }
