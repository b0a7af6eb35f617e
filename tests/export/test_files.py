"""A file is there whole or not at all, whatever happens while it is written; and writing takes little memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed import memory_report
from recsys_embed.errors import CheckpointError, ConfigError, RecsysEmbedError
from recsys_embed.exports import export, load, verify
from recsys_embed.exports.graph import to_torch_export
from recsys_embed.utils.files import atomic_write, replacing

ROOT = Path(__file__).resolve().parents[2]


def emb(value: float, rows: int = 500) -> nn.Module:
    module = rse.make_embedding("full", rows, 8)
    with torch.no_grad():
        module.table("weight").fill_(value)
    return module


def value_of(path: Path) -> float:
    return float(load(path)(torch.tensor([3]))[0, 0])


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    export(emb(1.0), path)
    before = path.read_bytes()

    def interrupted() -> None:
        with replacing(path) as (f, temporary):
            f.write(b"half")
            assert temporary.exists()
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        interrupted()
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []

    def evaluate(module: nn.Module) -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        export(emb(2.0), path, evaluate=evaluate)
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []


def test_a_folder_and_an_impossible_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        export(emb(1.0), tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not be written"):
        export(emb(1.0), tmp_path / "file" / "f")
    export(emb(1.0), tmp_path / "new" / "folders" / "f")
    assert value_of(tmp_path / "new" / "folders" / "f") == 1.0


@pytest.mark.skipif(os.name != "posix", reason="pipes have names on POSIX only")
def test_a_device_is_no_place_for_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="a device or a pipe"):
        export(emb(1.0), pipe)
    with pytest.raises(ConfigError, match="a device or a pipe"):
        atomic_write(pipe, lambda file: None)
    assert pipe.is_fifo()


@pytest.mark.parametrize("path", [None, 5])
def test_what_is_no_path_is_refused(path: Any) -> None:
    for act in (lambda: export(emb(1.0), path), lambda: load(path), lambda: verify(path)):
        with pytest.raises(ConfigError, match=f"`path` must be .*; got {type(path).__name__}"):
            act()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    path, model = tmp_path / name, emb(1.0)
    acts = (
        lambda: export(model, path),
        lambda: export(path, tmp_path / "f"),
        lambda: load(path),
        lambda: verify(path),
        lambda: to_torch_export(model, f"{path}.pt2"),
        lambda: memory_report(path),
    )
    for act in acts:
        with pytest.raises(RecsysEmbedError):
            act()
    assert list(tmp_path.iterdir()) == []


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "f"
    export(emb(1.0), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"f could not be written: File too large; what was there before"):
            export(emb(2.0, 50_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []


def test_many_writers_of_one_path(tmp_path: Path) -> None:
    """Readers meet a whole file at any time, and in the end it is that of one writer."""
    path = tmp_path / "f"
    export(emb(0.0), path)
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            verify(path)
            seen.append(value_of(path))

    def write(value: float) -> None:
        for _ in range(5):
            export(emb(value, 500 + int(value)), path)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(float(v),)) for v in (1, 2, 3)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert set(seen) <= {0.0, 1.0, 2.0, 3.0}
    assert value_of(path) in (1.0, 2.0, 3.0)
    assert leftovers(tmp_path) == []


@pytest.mark.distributed
def test_a_killed_export_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "f"
    export(emb(1.0), path)
    done = run(
        """
        import os, signal, sys
        import recsys_embed as rse
        from recsys_embed.exports import export
        source = rse.make_embedding("full", 500, 8)
        def evaluate(module):
            return 0.0 if module is source else os.kill(os.getpid(), signal.SIGKILL)
        export(source, sys.argv[1], evaluate=evaluate)
        """,
        path,
    )
    assert done.returncode == -9
    assert value_of(path) == 1.0
    assert len(leftovers(tmp_path)) == 1
    export(emb(4.0), tmp_path / "g")
    assert len(leftovers(tmp_path)) == 1, "it is none of that file's"
    (tmp_path / ".f.notes.tmp").touch()

    source = emb(3.0)

    def while_another_exports(module: Any) -> float:
        if module is source:  # is measured before anything is written
            return 0.0
        (mine,) = set(leftovers(tmp_path)) - {".f.notes.tmp"}
        export(emb(2.0), path)
        assert set(leftovers(tmp_path)) == {mine, ".f.notes.tmp"}
        return 0.0

    export(source, path, evaluate=while_another_exports)
    assert value_of(path) == 3.0
    assert set(leftovers(tmp_path)) == {".f.notes.tmp"}


def test_a_served_module_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    export(emb(1.0), path)
    served = load(path)
    export(emb(2.0), path)
    assert float(served(torch.tensor([7]))[0, 0]) == 1.0
    path.unlink()
    assert float(served(torch.tensor([8]))[0, 0]) == 1.0


def test_a_served_module_can_be_exported_to_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    source = rse.make_embedding("hash", 1000, 8, num_buckets=100)
    export(source, path, "int8")
    ids = torch.arange(1000)
    before = load(path)(ids)
    export(load(path), path, "int8")
    assert (load(path)(ids) - before).abs().max() < 1e-3
    export(load(path), path)
    assert torch.equal(load(path)(ids), load(path, backend="torch")(ids))


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        export(rse.make_embedding("robe", 1000, 8, budget="8KiB", seed=0), tmp_path / name, "int4")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from the kernel")
def test_export_and_load_take_memory_of_chunks_not_of_tables(tmp_path: Path) -> None:
    done = run(
        """
        import re, sys, torch
        import recsys_embed as rse
        from recsys_embed.exports import export, load
        def peak():
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
        def high():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
        emb = rse.make_embedding("full", 1_000_000, 16)  # 61 MiB
        for precision in ("fp32", "int8"):
            export(rse.make_embedding("full", 100, 16), sys.argv[1] + "small", precision)
            peak(); before = high()
            export(emb, sys.argv[1] + precision, precision)
            print(high() - before)
        del emb
        def own():  # pages of the file belong to the kernel, which takes them back
            return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
        for precision in ("fp32", "int8"):
            before = own()
            served = load(sys.argv[1] + precision, verify=False, backend="torch")
            served(torch.randint(0, 1_000_000, (100,)))
            print(own() - before)
        """,
        tmp_path / "f",
    )
    assert done.returncode == 0, done.stderr
    grown = [int(n) for n in done.stdout.split()]
    assert len(grown) == 4
    assert max(grown) < 20, grown


ALONE = """
import sys
import numpy, torch

there = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) | {"recsys_embed"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in there:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import recsys_embed as rse

for path in sys.argv[1:]:
    torch.save(rse.load(path)(torch.arange(3000)), path + ".out")
"""


def test_graphs_are_offered_and_loaded_at_first_use() -> None:
    done = run(
        """
        import sys
        from recsys_embed import shipping
        assert {"to_onnx", "to_torch_export"} <= set(shipping.__all__)
        assert "recsys_embed.exports.graph" not in sys.modules
        assert all(getattr(shipping, name).__name__ == name for name in shipping.__all__)
        assert not hasattr(shipping, "to_onx")
        """
    )
    assert done.returncode == 0, done.stderr


def test_loading_needs_torch_and_numpy_only(tmp_path: Path) -> None:
    wanted = {}
    for method in rse.list_methods():
        options = {} if method.name == "full" else {"budget": "64KiB"}
        for precision in ("fp32", "int4"):
            path = tmp_path / f"{method.name}-{precision}"
            export(rse.make_embedding(method.name, 3000, 8, **options), path, precision=precision)
            wanted[path] = load(path, backend="torch")(torch.arange(3000))
    subprocess.run([sys.executable, "-c", ALONE, *map(str, wanted)], cwd=ROOT, check=True)
    for path, vectors in wanted.items():
        assert torch.equal(torch.load(f"{path}.out"), vectors), path
