"""Version pairs from faked metadata, the set-up script with a fake interpreter, and what an import pulls in."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.errors import MissingDependencyError
from recsys_embed.utils.optional import require
from recsys_embed.utils.versions import (
    Installed,
    installed_versions,
    pair_faults,
    pair_notes,
    read_installed,
    require_pair,
)

ROOT = Path(__file__).resolve().parents[1]

# fbgemm's own compatibility table, as published in its 1.9.0 wheel: torch, fbgemm.
PUBLISHED_PAIRS = [("2.9.1", "1.4.2"), ("2.10.0", "1.5.0"), ("2.11.0", "1.6.0"), ("2.12.1", "1.7.0")]
PUBLISHED_PAIRS += [("2.13.0+cpu", "1.8.0"), ("2.14.0", "1.9.0")]


def trio(torch: str | None, fbgemm: str | None, torchrec: str | None, name: str = "fbgemm-gpu-cpu"):
    versions = {"torch": torch, name: fbgemm, "torchrec": torchrec}
    return {k: Installed(v) for k, v in versions.items() if v is not None}.get


def included_by(file: Path) -> set[str]:
    """A C++ file and what it includes, directly or not, as names relative to the project."""
    found = {file.relative_to(ROOT).as_posix()}
    for name in re.findall(r'^#include "(.+)"', file.read_text(), re.M):
        found |= included_by(file.parent / name)
    return found


def test_every_file_of_the_kernels_is_packed_and_watched():
    """What is not listed would be missing from a source distribution, and an edit of it would compile nothing."""
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    listed = {*extension["sources"], *extension["depends"]}
    assert listed == set().union(*(included_by(ROOT / source) for source in extension["sources"]))


@pytest.mark.parametrize(("torch", "fbgemm"), PUBLISHED_PAIRS)
@pytest.mark.parametrize("with_torchrec", [False, True])
def test_published_pairs_fit(torch, fbgemm, with_torchrec):
    torchrec = ".".join(fbgemm.split(".")[:2]) + ".9" if with_torchrec else None
    assert pair_faults(trio(torch, fbgemm, torchrec)) == []


@given(t=st.integers(0, 40), f=st.integers(0, 40), r=st.integers(0, 40))
def test_only_the_rule_fits(t, f, r):
    faults = pair_faults(trio(f"2.{t}.0", f"1.{f}.0", f"1.{r}.0"))
    fits = t == f + 5 and f == r and f >= 4
    assert (faults == []) == fits
    if faults:
        assert len(faults) == 1, "one sentence for the trio, not one per pair"
        assert all(v in faults[0] for v in (f"torch 2.{t}.0", f"fbgemm-gpu-cpu 1.{f}.0", f"torchrec 1.{r}.0"))


@given(t=st.integers(9, 40), f=st.integers(4, 40), r=st.integers(4, 40))
def test_the_pins_that_a_fault_names_mend_it(t, f, r):
    for fault in pair_faults(trio(f"2.{t}.0", f"1.{f}.0", f"1.{r}.0")):
        pins = dict(re.findall(r"([a-z-]+)==([0-9.]+)", fault))
        assert pair_faults(trio(f"2.{t}.0", pins["fbgemm-gpu-cpu"], pins["torchrec"])) == []


def test_nothing_optional_installed_is_fine():
    assert pair_faults(trio("2.11.0", None, None)) == []


@pytest.mark.parametrize("torch", ["3.0.0", "main", "2.8.0"])
def test_torch_outside_the_rule_names_a_torch(torch):
    (fault,) = pair_faults(trio(torch, "1.8.0", None))
    assert "torch==2.13.0" in fault


def test_missing_torch():
    assert pair_faults(trio(None, None, None)) == ["torch is not installed; install torch>=2.11,<2.14"]


def test_both_builds_of_fbgemm_together():
    both = {"torch": Installed("2.13.0"), "fbgemm-gpu": Installed("1.8.0"), "fbgemm-gpu-cpu": Installed("1.8.0")}
    (fault,) = pair_faults(both.get)
    assert "fbgemm-gpu 1.8.0 and fbgemm-gpu-cpu 1.8.0 are both installed" in fault


def test_the_stand_in_counts_for_nothing():
    shim = {"torch": Installed("2.13.0+cpu"), "fbgemm-gpu": Installed("1.8.0+cpu.shim", owns_files=False)}
    with_cpu = {**shim, "fbgemm-gpu-cpu": Installed("1.8.0"), "torchrec": Installed("1.8.0")}
    assert pair_faults(with_cpu.get, torch_cuda=None) == []
    alone = {**shim, "torchrec": Installed("1.8.0")}
    assert any("without fbgemm" in f for f in pair_faults(alone.get))


def test_cuda_fbgemm_on_a_cpu_torch():
    cuda = trio("2.13.0+cpu", "1.8.0", None, name="fbgemm-gpu")
    (fault,) = pair_faults(cuda, torch_cuda=None)
    assert "fbgemm-gpu-cpu" in fault
    assert pair_faults(cuda, torch_cuda="13.0") == []
    assert pair_faults(cuda) == [], "unchecked unless the kind of torch is told"


def test_cpu_fbgemm_on_a_cuda_torch_is_a_note():
    cpu = trio("2.13.0", "1.8.0", None)
    assert pair_faults(cpu, torch_cuda="13.0") == []
    assert len(pair_notes(cpu, torch_cuda="13.0")) == 1
    assert pair_notes(cpu, torch_cuda=None) == []


def test_require_pair_raises_before_any_import(monkeypatch):
    require_pair.cache_clear()
    monkeypatch.setattr("recsys_embed.utils.versions.pair_faults", lambda: ["a", "b"])
    with pytest.raises(MissingDependencyError, match="a; b"):
        require_pair()
    require_pair.cache_clear()


def test_a_pair_is_checked_before_torchrec_is_imported(monkeypatch):
    require_pair.cache_clear()
    monkeypatch.setattr("recsys_embed.utils.versions.pair_faults", lambda: ["they do not belong together"])
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(MissingDependencyError, match="do not belong together"):
        require("torchrec.sparse", extra="torchrec")
    require_pair.cache_clear()


def fake_dist(folder: Path, name: str, version: str, files: list[str]) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    (info / "RECORD").write_text("".join(f"{f},,\n" for f in [*files, f"{info.name}/METADATA"]))


def test_metadata_tells_who_owns_files(tmp_path, monkeypatch):
    fake_dist(tmp_path, "zz-real", "1.2.3", ["zz/__init__.py"])
    fake_dist(tmp_path, "zz-shim", "1.2.3+cpu.shim", [])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_installed("zz-real") == Installed("1.2.3", owns_files=True)
    assert read_installed("zz-shim") == Installed("1.2.3+cpu.shim", owns_files=False)
    assert installed_versions(["zz-real", "zz-none"]) == {"zz-real": "1.2.3", "zz-none": None}


def test_this_environment_fits():
    import torch

    assert pair_faults(torch_cuda=torch.version.cuda) == []


def test_pins_agree_with_each_other():
    main = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    shim = tomllib.loads((ROOT / "packaging/fbgemm-gpu-cpu-shim/pyproject.toml").read_text())["project"]
    pins = dict(
        re.findall(r"^([\w-]+)==([\d.]+?)(?:\.\*)? ;", "\n".join(main["optional-dependencies"]["torchrec"]), re.M)
    )
    assert pair_faults(trio(pins["torch"], pins["fbgemm-gpu"], pins["torchrec"])) == []
    assert shim["name"] == "fbgemm-gpu"
    assert shim["version"].partition("+")[0] == pins["fbgemm-gpu"]
    assert shim["dependencies"] == [f"fbgemm-gpu-cpu=={pins['fbgemm-gpu']}"]
    (script_pin,) = re.findall(r'"torch==([\d.]+)"', (ROOT / "scripts/setup.sh").read_text())
    assert script_pin.startswith(pins["torch"] + ".")
    assert {d.partition(">")[0] for d in main["dependencies"]} == {"numpy", "torch"}


# What plain `import recsys_embed` may not load: every optional library, installed or not.
OPTIONAL = (
    "polars optuna torchrec fbgemm_gpu triton typer rich tqdm matplotlib tensorboard safetensors plotly scipy sklearn"
)


def test_import_needs_torch_and_numpy_only():
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {OPTIONAL.split()!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
before = set(sys.modules)
import torch
sys.meta_path.insert(0, Refuse())
loaded = set(sys.modules)
import recsys_embed
extra = {{m.partition('.')[0] for m in set(sys.modules) - loaded}} & set({OPTIONAL.split()!r})
print(sorted(extra))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def required_by_name() -> list[tuple[str, str, str | None]]:
    """Module, library and extra of every ``require(...)`` of the package; import-linter cannot see them."""
    found = []
    for path in sorted((ROOT / "recsys_embed").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "id", None)
            if name == "require" and isinstance(node.args[0], ast.Constant):
                extra = next((k.value.value for k in node.keywords if k.arg == "extra"), None)
                found.append((module, node.args[0].value.partition(".")[0], extra))
    return found


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_libraries_loaded_by_name_are_in_one_package_each_too():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (contract,) = [c for c in contracts if "Optional libraries" in c["name"]]
    allowed = [line.split(" -> ") for line in contract["ignore_imports"]]
    for module, library, _ in required_by_name():
        if library in contract["forbidden_modules"]:
            places = [place.removesuffix(".**") for place, lib in allowed if lib == library]
            assert any(f"{module}.".startswith(f"{place}.") for place in places), f"{module} loads {library}"


def test_the_extra_that_an_error_names_installs_the_library():
    extras = PROJECT["project"]["optional-dependencies"]

    def contents(extra: str) -> set[str]:
        names: set[str] = set()
        for line in extras[extra]:
            own = re.match(r"recsys-embed\[(.*)\]", line)
            names |= set().union(*map(contents, own[1].split(","))) if own else {re.match(r"[\w-]+", line)[0]}
        return names

    for module, library, extra in required_by_name():
        if library not in ("math", "torch"):
            assert library.replace("_", "-") in contents(extra), f"{module}: extra {extra} lacks {library}"


# ---- scripts/setup.sh, run for real with a fake interpreter that records what it is asked to do

FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" >>"$FAKE_LOG"
case "$*" in
  *version_info*) exit ${FAKE_RANGE:-0} ;;
  *"import venv"*) exit ${FAKE_VENV:-0} ;;
  "-m venv "*) mkdir -p "$3/bin"; : >"$3/pyvenv.cfg"; cp "$0" "$3/bin/python" ;;
  *urllib*) exit ${FAKE_PROBE:-1} ;;
  *"pip"*" install "*)
    if [ -n "${FAKE_PIP_SAYS:-}" ]; then
      while [ "$1" != --log ]; do shift; done; echo "$FAKE_PIP_SAYS" >"$2"; exit 1
    fi
    [ -z "${FAKE_PIP_DIES:-}" ] || kill -9 $PPID ;;
  *"pip"*" check") printf "${FAKE_CHECK:-}"; [ -z "${FAKE_CHECK:-}" ] || exit 1 ;;
esac
"""


class Sandbox:
    """A copy of what setup.sh reads, a fake python3.11 and a PATH that holds little else."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        for name in ("pyproject.toml", "scripts/setup.sh", "packaging/fbgemm-gpu-cpu-shim/pyproject.toml"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("sh", "cat", "cksum", "rm", "mkdir", "cp", "df", "awk", "grep", "dirname", "kill"):
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)
        self.log = folder / "calls.txt"
        self.venv = self.root / ".venv"

    def add(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, **env: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        base = {"PATH": str(self.bin), "FAKE_LOG": str(self.log)}
        return subprocess.run(
            ["sh", "scripts/setup.sh"], cwd=self.root, env=base | env, capture_output=True, text=True, check=False
        )

    def installs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if " install " in line]


@pytest.fixture
def sandbox(tmp_path):
    if os.name != "posix":
        pytest.skip("setup.sh is a POSIX shell script")
    box = Sandbox(tmp_path)
    box.add("python3.11", FAKE_PYTHON)
    box.add("uname", "#!/bin/sh\necho Linux x86_64\n")
    return box


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, (done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("setup: ")
    return lines[0]


def test_setup_installs_once(sandbox):
    first = sandbox.run()
    assert first.returncode == 0, first.stderr
    (command,) = sandbox.installs()
    assert "torch==2.13.0 " in command
    assert command.endswith("-e .[all,dev]")
    assert "./packaging/fbgemm-gpu-cpu-shim" in command
    assert "--extra-index-url" not in command, "the probe failed, so the index is left out"
    assert sandbox.run().returncode == 0
    assert sandbox.installs() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/setup.sh", "packaging/fbgemm-gpu-cpu-shim/pyproject.toml"])
def test_setup_repeats_when_its_inputs_change(sandbox, name):
    sandbox.run()
    with (sandbox.root / name).open("a") as f:
        f.write("# changed\n")
    assert sandbox.run().returncode == 0
    assert len(sandbox.installs()) == 1


def test_setup_repeats_for_another_device(sandbox):
    sandbox.run()
    assert sandbox.run(RECSYS_EMBED_DEVICE="cuda").returncode == 0
    (command,) = sandbox.installs()
    assert "shim" not in command


def test_setup_adds_the_models_of_other_people_and_does_without_them(sandbox):
    peers = sandbox.root / "tests/requirements-peers.txt"
    peers.parent.mkdir()
    peers.write_text("deepctr-torch\n")
    assert sandbox.run().returncode == 0
    _, command = sandbox.installs()
    assert command.endswith("install --no-deps -r tests/requirements-peers.txt")
    peers.write_text("deepctr-torch\ntorchfm\n")
    fails = FAKE_PYTHON.replace('case "$*" in', 'case "$*" in\n  *--no-deps*) exit 1 ;;', 1)
    (sandbox.venv / "bin/python").write_text(fails)
    done = sandbox.run()
    assert done.returncode == 0, done.stderr
    assert "did not install; what compresses their models will be skipped" in done.stdout
    assert sandbox.run().returncode == 0
    assert sandbox.installs() == []


def test_setup_uses_the_cpu_index_when_it_answers(sandbox):
    sandbox.run(FAKE_PROBE="0", RECSYS_EMBED_CPU_INDEX="https://example.invalid/cpu")
    assert "--extra-index-url https://example.invalid/cpu" in sandbox.installs()[0]


def test_setup_chooses_cuda_where_a_gpu_answers(sandbox):
    sandbox.add("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    sandbox.run()
    assert "shim" not in sandbox.installs()[0]
    sandbox.run(RECSYS_EMBED_DEVICE="cpu")
    assert "shim" in sandbox.installs()[0]


def test_setup_ignores_a_driver_without_a_gpu(sandbox):
    sandbox.add("nvidia-smi", "#!/bin/sh\necho 'No devices were found'; exit 6\n")
    sandbox.run()
    assert "shim" in sandbox.installs()[0]


def test_setup_leaves_the_stand_in_out_where_torchrec_has_no_wheels(sandbox):
    sandbox.add("uname", "#!/bin/sh\necho Darwin arm64\n")
    sandbox.run()
    assert "shim" not in sandbox.installs()[0]


def test_setup_keeps_an_environment_made_by_hand(sandbox):
    sandbox.run()
    (sandbox.venv / ".setup-done").unlink()
    (sandbox.venv / "mine").write_text("")
    assert sandbox.run().returncode == 0
    assert (sandbox.venv / "mine").exists()
    assert len(sandbox.installs()) == 1


def test_setup_starts_over_after_an_interruption(sandbox):
    killed = sandbox.run(FAKE_PIP_DIES="1")
    assert killed.returncode != 0
    (sandbox.venv / "half").write_text("")
    assert sandbox.run().returncode == 0
    assert not (sandbox.venv / "half").exists()
    assert len(sandbox.installs()) == 1


def test_setup_does_not_trust_the_stamp_of_before_an_interruption(sandbox):
    sandbox.run()
    pyproject = sandbox.root / "pyproject.toml"
    before = pyproject.read_text()
    pyproject.write_text(before + "# changed\n")
    sandbox.run(FAKE_PIP_DIES="1")
    pyproject.write_text(before)
    assert sandbox.run().returncode == 0
    assert len(sandbox.installs()) == 1


def test_setup_starts_over_when_the_interpreter_is_gone(sandbox):
    sandbox.run()
    (sandbox.venv / "bin/python").unlink()
    assert sandbox.run().returncode == 0
    assert len(sandbox.installs()) == 1


def test_setup_without_a_python_in_range(sandbox):
    assert "needs Python 3.11, 3.12 or 3.13" in one_line(sandbox.run(FAKE_RANGE="1"))
    assert not sandbox.venv.exists()
    assert "PYTHON=python9" in one_line(sandbox.run(PYTHON="python9"))


def test_setup_without_the_venv_module(sandbox):
    assert "cannot make virtual environments" in one_line(sandbox.run(FAKE_VENV="1"))


def test_setup_refuses_an_unknown_device(sandbox):
    assert "must be cpu or cuda; got 'tpu'" in one_line(sandbox.run(RECSYS_EMBED_DEVICE="tpu"))


def test_setup_without_space(sandbox):
    (sandbox.bin / "df").unlink()
    sandbox.add("df", "#!/bin/sh\nprintf 'h h h h\\n/dev/x 9 9 1048576 9%% /\\n'\n")
    assert "no space: the cpu install needs 3 GiB, 1 GiB" in one_line(sandbox.run())
    assert not sandbox.venv.exists()


@pytest.mark.parametrize(
    ("pip_says", "told"),
    [
        ("OSError: [Errno 28] No space left on device", "No space left on device"),
        ("NewConnectionError('x: Failed to establish a new connection", "no network"),
        ("ERROR: No matching distribution found for torch==2.13.0", "No matching distribution found for torch==2.13.0"),
        (
            "ERROR: x (from versions: none)\nERROR: No matching distribution found for setuptools>=77",
            "no package index answers, or none has this for the Python used: No matching distribution found",
        ),
        ("something else", "see the lines above"),
    ],
)
def test_setup_names_why_pip_failed(sandbox, pip_says, told):
    assert told in one_line(sandbox.run(FAKE_PIP_SAYS=pip_says))
    assert sandbox.run().returncode == 0, "and the next run starts over"


def test_setup_fails_when_packages_disagree(sandbox):
    assert "packages disagree" in one_line(sandbox.run(FAKE_CHECK="torchrec 1.8 requires polars, which is not here.\n"))
    assert sandbox.run().returncode == 0
    assert len(sandbox.installs()) == 1


def test_setup_lets_models_of_other_people_lack_what_they_ask_for(sandbox):
    peers = sandbox.root / "tests/requirements-peers.txt"
    peers.parent.mkdir()
    peers.write_text("# theirs\nfuxictr==2.3\nhuggingface-hub>=2\n")
    theirs = "fuxictr 2.3 requires ray, which is not installed.\nhuggingface-hub 2.4 has requirement x, but ...\n"
    assert sandbox.run(FAKE_CHECK=theirs).returncode == 0
    peers.write_text("fuxictr==2.3\n")
    failed = sandbox.run(FAKE_CHECK=theirs)
    assert "packages disagree" in one_line(failed)
    assert "huggingface-hub 2.4" in failed.stdout
    assert "fuxictr" not in failed.stdout


def test_a_library_that_does_not_load_is_named_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "zz_broken.py").write_text(
        "try:\n    raise OSError('libcuda.so.1: no such file')\n"
        "except OSError as e:\n    raise OSError('could not load zz.so') from e\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = r"zz_broken is installed but cannot be imported: could not load zz.so \(libcuda.so.1: no such file\)"
    with pytest.raises(MissingDependencyError, match=wanted):
        require("zz_broken", extra="torchrec")


def test_a_library_whose_own_needs_are_missing_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "zz_needy.py").write_text("import zz_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"zz_needy is installed .*: No module named 'zz_absent'"):
        require("zz_needy", extra="torchrec")
