"""Logs of a run: JSON lines, TensorBoard events, and a progress bar on terminals."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from recsys_embed.errors import MissingDependencyError
from recsys_embed.utils.optional import require

LOG_FILE = "log.jsonl"


class RunLog:
    """Writes events of a run to ``log.jsonl`` and, if asked and installed, to TensorBoard.

    Args:
        folder: run folder; None writes nothing.
        tensorboard: also write TensorBoard events.
        keep_bytes: length at which the JSON lines are cut before going on: what a resumed run's checkpoint saw.
        step: step from which a run resumes; later TensorBoard events are hidden.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool = False, keep_bytes: int = 0, step: int = 0) -> None:
        self._file, self._board = None, None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / LOG_FILE, "ab")  # noqa: SIM115 - closed by close()
        # A crash of the machine may have lost lines that the checkpoint saw; growing the file would add zero bytes.
        self._file.truncate(min(keep_bytes, self._file.seek(0, os.SEEK_END)))
        self._file.seek(0, os.SEEK_END)
        if tensorboard:
            try:
                module = require("torch.utils.tensorboard", extra="train", purpose="TensorBoard logging")
            except (MissingDependencyError, ImportError):
                return
            self._board = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Add one event; numbers go to TensorBoard as ``event/name``."""
        if self._file is not None:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self._file.write(json.dumps({"event": event, "step": step, **clean}).encode() + b"\n")
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{event}/{key}", value, step)

    def flush(self) -> int:
        """Flush lines to the file; returns its length so far."""
        if self._file is None:
            return 0
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def progress_bar(total: int, description: str, initial: int = 0, show: bool | None = None) -> Any:
    """A tqdm bar over steps, silent unless standard error is a terminal (or ``show`` says otherwise)."""
    visible = sys.stderr.isatty() if show is None else show
    if not visible:
        return _NoBar()
    tqdm = require("tqdm", extra="train", purpose="the progress bar").tqdm
    # A terminal that does not know its size reports 0, where tqdm draws nothing; this takes 80 x 24 instead.
    size = shutil.get_terminal_size()
    options = {"ncols": size.columns, "nrows": size.lines}
    return tqdm(total=total, initial=initial, desc=description, unit="step", leave=False, **options)


class _NoBar:
    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def close(self) -> None:
        pass
