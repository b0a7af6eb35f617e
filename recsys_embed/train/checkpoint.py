"""Checkpoints: one file with everything that a bit-exact resumption needs, and the settings that it belongs to."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import nn

from recsys_embed.collection.optimizer_state import weights_alone
from recsys_embed.errors import CheckpointError
from recsys_embed.registry import with_current_names
from recsys_embed.utils.files import atomic_write, check_packing

# What zipfile and torch raise of damaged files.
_UNREADABLE = (
    RuntimeError, ValueError, EOFError, OSError, BadZipFile, pickle.UnpicklingError, LookupError, TypeError,
    AttributeError, OverflowError, MemoryError, AssertionError,
)  # fmt: skip
FORMAT = "recsys-embed-checkpoint"
VERSION = 1
# Automatic checkpoints are at least this many seconds apart, and this many times the time to write one. They therefore
# take at most about a twentieth of the training time, and do not wear the disk where writing is quick.
CHECKPOINT_SECONDS, CHECKPOINT_TIMES = 1.0, 20.0
# What a disk is taken to write in a second before anything was written: 200 MB take 0.7 s on a virtual machine's.
_GUESS = 300e6


class CheckpointTimer:
    """When the next checkpoint is due, by the clock.

    Args:
        size: bytes of the first, to guess how long it will take.

    >>> CheckpointTimer().due()
    False
    """

    def __init__(self, size: int = 0) -> None:
        self._written, self._took = time.perf_counter(), size / _GUESS

    def due(self) -> bool:
        """Whether a checkpoint is due."""
        return time.perf_counter() - self._written > max(CHECKPOINT_SECONDS, CHECKPOINT_TIMES * self._took)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Measure the time to write a checkpoint."""
        begin = time.perf_counter()
        yield
        self._written = time.perf_counter()
        self._took = self._written - begin


def save_checkpoint(path: str | Path, config: dict[str, Any], **parts: Any) -> None:
    """Write ``parts`` (tensors, numbers, texts and containers of them) with their settings, atomically."""
    payload = {"format": FORMAT, "version": VERSION, "config": config, **parts}
    try:
        atomic_write(path, lambda f: torch.save(payload, f))
    except (RuntimeError, OSError) as e:
        # Torch's writer puts a failed write (a full disk) into an error of its own, with the cause in its context.
        cause = e if isinstance(e, OSError) else e.__context__
        reason = (cause.strerror or cause) if isinstance(cause, OSError) else str(e).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {path} cannot be written ({reason}); free some space, or make the folder one to write to, "
            "then go on from the one before"
        ) from e


def load_checkpoint(path: str | Path, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed (``weights_only``).

    Args:
        path: file of :func:`save_checkpoint`.
        config: settings of the run that wants to go on; None accepts any.

    Raises:
        CheckpointError: absent, damaged, of another format version, or made with other settings (all named).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        check_packing(path)
        # torch.load does not compare checksums; a flipped bit in a table would go unseen.
        with ZipFile(path) as archive:
            broken = archive.testzip()
        payload = torch.load(path, map_location="cpu", weights_only=True) if broken is None else None
    except _UNREADABLE as e:
        raise CheckpointError(f"checkpoint {path} is damaged: {type(e).__name__} {str(e)[:200]}".rstrip()) from e
    if broken is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: wrong checksum of {broken}")
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a training run")
    version, saved = payload.get("version"), payload.get("config")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(f"checkpoint {path} has format version {version!r}; this is version {VERSION}")
    if not isinstance(saved, dict) or not all(isinstance(k, str) for k in saved):
        raise CheckpointError(f"checkpoint {path} is damaged: it does not hold the settings it was made with")
    if config is not None:
        saved, config = with_current_names(saved), with_current_names(config)
        differing = [k for k in sorted({*saved, *config}) if saved.get(k) != config.get(k)]
        if differing:
            lines = [f"  - {k}: checkpoint {saved.get(k)!r}, this run {config.get(k)!r}" for k in differing]
            raise CheckpointError(
                f"checkpoint {path} was made with other settings; use those, or start in another folder:\n"
                + "\n".join(lines)
            )
    return payload


def load_weights(model: nn.Module, state: dict[str, Any], path: str | Path) -> None:
    """Load what :func:`weights_of` returned; a mismatch of names or shapes is a CheckpointError that lists it."""
    try:
        with weights_alone():
            model.load_state_dict(state)
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"weights of {path} do not fit the model: {e}") from e


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of the random generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Inverse of :func:`rng_state`; the generator of a device the run was not on keeps its state."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
