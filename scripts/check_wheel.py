"""Build the wheel, install it beside torch and numpy alone, and run scripts/wheel_smoke.py there.

    .venv/bin/python scripts/check_wheel.py

The environment borrows torch, numpy and what torch requires from the running interpreter through links, so nothing is
downloaded and nothing else is importable.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def closure(*roots: str) -> dict[str, metadata.Distribution]:
    """The installed distributions among ``roots`` and all that they require, extras left out."""
    found: dict[str, metadata.Distribution] = {}
    queue = list(roots)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # A requirement of another platform; what torch needs here was installed with it.
            continue
        queue += [
            match[0]
            for requirement in found[name].requires or []
            if "extra ==" not in requirement and (match := re.match(r"[\w.-]+", requirement))
        ]
    return found


def borrow(site: Path, *roots: str) -> None:
    """Link the top-level files of ``roots`` and of what they require into ``site``."""
    site.mkdir(parents=True)
    for name, dist in closure(*roots).items():
        tops = {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}
        if not tops:
            raise SystemExit(f"{name} {dist.version} lists no files, so it cannot be borrowed")
        for top in tops:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(dist.locate_file(top))).resolve())


def call(*command: object) -> None:
    """Run a command quietly; stop with its output when it fails."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    print(done.stdout, end="")


def main() -> int:
    """Build, install and run in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        # A copy, because setuptools leaves build/ behind and packs what an older build/ still holds.
        leave = shutil.ignore_patterns("__pycache__", "*.so")
        for folder_name in ("recsys_embed", "ops"):
            shutil.copytree(ROOT / folder_name, work / "src" / folder_name, ignore=leave)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, work / "src")
        call(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", work / "dist", work / "src")
        (wheel,) = (work / "dist").glob("*.whl")
        if shutil.which("c++") and "-abi3-" not in wheel.name:
            raise SystemExit(f"{wheel.name} holds no kernels, or for one version of Python alone")
        call(sys.executable, "-m", "venv", "--without-pip", work / "venv")
        python = work / "venv/bin/python"
        call(*pip, "--python", python, "install", "--no-deps", wheel)
        borrow(work / "borrowed", "torch", "numpy")
        (site,) = (work / "venv/lib").glob("python*/site-packages")
        (site / "borrowed.pth").write_text(f"{work / 'borrowed'}\n")
        call(python, "-I", ROOT / "scripts/wheel_smoke.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
