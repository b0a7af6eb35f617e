"""The environment of a result: versions, commit, command line and device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from recsys_embed.errors import ConfigError
from recsys_embed.utils.versions import installed_versions


def environment() -> dict[str, Any]:
    """Versions, commit and command line."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    versions = {k: v for k, v in installed_versions().items() if v is not None} | {"torch": str(torch.__version__)}
    return {"python": sys.version.split()[0], "versions": versions, "commit": commit, "command": sys.argv}


def check_device(device: torch.device | str) -> None:
    """Raise ConfigError, with torch's reason, unless tensors can be made on ``device``."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {reason}; see 'recsys-embed doctor'") from e
