"""Which versions are installed and whether they fit together, read from metadata only, before anything is imported.

fbgemm-gpu and torchrec are linked to one minor version of torch but declare no dependency on it; a mismatch shows only
as an ``OSError`` about a shared library at import. The pairs follow a rule: fbgemm 1.k belongs to torch 2.(k+5), and
torchrec 1.k to fbgemm 1.k (fbgemm's own compatibility table).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from recsys_embed.errors import MissingDependencyError

PACKAGES = (
    "recsys-embed",
    "torch",
    "numpy",
    "polars",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "triton",
    "optuna",
    "typer",
    "rich",
    "tqdm",
    "safetensors",
    "tensorboard",
    "matplotlib",
)
FBGEMM_NAMES = ("fbgemm-gpu", "fbgemm-gpu-cpu")
_FIRST_PAIRED_MINOR = 4


@dataclass(frozen=True)
class Installed:
    """One installed distribution: its version text and whether it owns any file besides its own metadata."""

    version: str
    owns_files: bool = True

    @property
    def minor(self) -> tuple[int, int] | None:
        """``(major, minor)``, or None where the version does not begin with two numbers.

        >>> Installed("2.13.0+cpu").minor
        (2, 13)
        """
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(found[1]), int(found[2])) if found else None


def read_installed(name: str) -> Installed | None:
    """Look one distribution up in the metadata of the running interpreter; None when it is not installed."""
    try:
        dist = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    files = dist.files
    # Without a file list (a distribution package of the system) assume that it owns what its name says.
    owns = files is None or any(".dist-info" not in str(f) and ".egg-info" not in str(f) for f in files)
    return Installed(dist.version, owns)


def installed_versions(names: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Map each distribution name to its version, or None when it is not installed."""
    return {name: (found.version if (found := read_installed(name)) else None) for name in names}


def pair_faults(
    look_up: Callable[[str], Installed | None] = read_installed,
    torch_cuda: str | bool | None = False,
) -> list[str]:
    """Everything that is wrong with the trio torch, fbgemm and torchrec: one sentence each, none when it fits.

    Args:
        look_up: returns what is installed under a distribution name.
        torch_cuda: ``torch.version.cuda`` (text, or None in a CPU build); False leaves the kind of build unchecked.

    >>> fake = {"torch": Installed("2.13.0"), "fbgemm-gpu": Installed("1.9.0"), "torchrec": Installed("1.8.0")}
    >>> for fault in pair_faults(fake.get): print(fault)
    torch 2.13.0, fbgemm-gpu 1.9.0 and torchrec 1.8.0 do not belong together: fbgemm 1.k needs torch 2.(k+5) and
    torchrec 1.k needs fbgemm 1.k; install fbgemm-gpu==1.8.0 and torchrec==1.8.0 beside this torch
    """
    found = {name: look_up(name) for name in ("torch", "torchrec", *FBGEMM_NAMES)}
    torch, torchrec = found["torch"], found["torchrec"]
    real = {name: dist for name in FBGEMM_NAMES if (dist := found[name]) and dist.owns_files}
    faults = []
    if len(real) == 2:
        both = " and ".join(f"{name} {dist.version}" for name, dist in real.items())
        faults.append(
            f"{both} are both installed and own the same files; uninstall both, then reinstall only the one that fits "
            "this machine"
        )
    if torch is None:
        return [*faults, "torch is not installed; install torch>=2.11,<2.14"]
    faults += _minor_faults(torch, real, torchrec)
    if torchrec and not real:
        faults.append(
            f"torchrec {torchrec.version} is installed without fbgemm; install fbgemm-gpu-cpu (no CUDA) or fbgemm-gpu "
            f"of the same minor version"
        )
    if torch_cuda is None and "fbgemm-gpu" in real:
        faults.append(
            f"fbgemm-gpu {real['fbgemm-gpu'].version} needs a CUDA build of torch, and torch {torch.version} is a CPU "
            "build; install fbgemm-gpu-cpu instead"
        )
    return faults


def pair_notes(look_up: Callable[[str], Installed | None] = read_installed, torch_cuda: str | None = None) -> list[str]:
    """What works but below what the machine could do: a CPU build of fbgemm beside a CUDA build of torch."""
    cpu, cuda = look_up("fbgemm-gpu-cpu"), look_up("fbgemm-gpu")
    if torch_cuda and cpu and cpu.owns_files and not (cuda and cuda.owns_files):
        return [f"fbgemm-gpu-cpu {cpu.version} runs on the CPU only; for CUDA {torch_cuda} install fbgemm-gpu instead"]
    return []


def _minor_faults(torch: Installed, real: dict[str, Installed], torchrec: Installed | None) -> list[str]:
    trio = [*real.items(), *([("torchrec", torchrec)] if torchrec else [])]
    if not trio:
        return []
    wanted = _paired_minor(torch)
    if wanted is not None and all(dist.minor == wanted for _, dist in trio):
        return []
    names = [f"torch {torch.version}", *(f"{name} {dist.version}" for name, dist in trio)]
    what = ", ".join(names[:-1]) + f" and {names[-1]}"
    rule = "fbgemm 1.k needs torch 2.(k+5) and torchrec 1.k needs fbgemm 1.k"
    if wanted is None:
        return [f"{what} do not belong together: {rule}; no fbgemm is known for this torch, install torch==2.13.0"]
    pins = " and ".join(f"{name}=={wanted[0]}.{wanted[1]}.0" for name, dist in trio)
    return [f"{what} do not belong together: {rule}; install {pins} beside this torch"]


def _paired_minor(torch: Installed) -> tuple[int, int] | None:
    """The minor version of fbgemm and torchrec that belongs to ``torch``; None where the rule does not reach."""
    if torch.minor is None or torch.minor[0] != 2 or torch.minor[1] - 5 < _FIRST_PAIRED_MINOR:
        return None
    return (1, torch.minor[1] - 5)


@cache
def require_pair() -> None:
    """Raise before the first import of fbgemm or torchrec when what is installed cannot work together.

    Raises:
        MissingDependencyError: with every fault found, each naming versions and fix.
    """
    faults = pair_faults()
    if faults:
        raise MissingDependencyError("; ".join(faults))
