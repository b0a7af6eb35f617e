"""Figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recsys_embed.utils.files import replacing


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib, atomically; the file's suffix picks the format."""
    with replacing(path) as (file, _):
        figure.savefig(file, dpi=150, format=path.suffix[1:] or "png")
