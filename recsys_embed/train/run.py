"""One training run from settings and a data set to a run folder with results."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from recsys_embed.data.data_source import DataSource
from recsys_embed.data.folder import lock
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.driver import Run, RunOutcome
from recsys_embed.train.environment import check_device
from recsys_embed.train.inputs import check_data


def run_training(
    config: TrainConfig,
    data: DataSource,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    tensorboard: bool = False,
    save_model: bool = True,
    show_progress: bool | None = None,
    label: str = "train",
) -> RunOutcome:
    """Train by ``config`` on an opened data set; a run folder belongs to one process at a time.

    Args:
        config: settings.
        data: data set of :func:`recsys_embed.data.open_dataset`, or one of your own, see
            :class:`recsys_embed.data.DataSource`.
        folder: run folder; gets ``config.json``, ``run.json``, ``log.jsonl``, ``checkpoint.pt``, ``result.json`` and
            ``model.pt``. None keeps nothing.
        resume: go on from the folder's checkpoint; without one the run starts from the beginning.
        device: e.g. ``"cuda"``; None: CPU.
        tensorboard: also write TensorBoard events.
        save_model: write ``model.pt`` at the end.
        show_progress: see :class:`Trainer`.
        label: text beside the progress bar.

    Raises:
        ConfigError: the data lacks members of a data set; the folder already holds a run and ``resume`` is False, or
            one under torchrun; the device cannot be used.
    """
    check_data(data, config, "training")
    folder = None if folder is None else Path(folder)
    with nullcontext() if folder is None else lock(folder):
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if device is not None:
            check_device(device)
        return Run(
            config,
            data,
            folder,
            resume=resume,
            device=device,
            save_model=save_model,
            tensorboard=tensorboard,
            show_progress=show_progress,
            label=label,
        ).run()


_HOME = {
    "CHECKPOINTS": "driver",
    "LINEAR_METHOD": "plans",
    "Plans": "plans",
    "environment": "environment",
    "fingerprint": "inputs",
    "footprint_dict": "json_values",
    "goes_on": "driver",
    "make_optimizer": "build",
    "model_from_config": "build",
    "plain": "json_values",
    "plans_for": "plans",
    "resolve": "plans",
    "schema_of": "inputs",
    "trained_footprint": "build",
}
_RENAMED = {"goes_on": "should_resume"}


def __getattr__(name: str) -> Any:
    """Deprecated: aliases for names that moved to other modules."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"recsys_embed.train.{_HOME[name]}"
    today = _RENAMED.get(name, name)
    where = home if today == name else f"{home} as {today}"
    warnings.warn(f"{name} is no longer in {__name__}; import it from {where}", DeprecationWarning, stacklevel=2)
    return getattr(import_module(home), today)
