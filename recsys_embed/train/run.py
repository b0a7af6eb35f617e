"""One training run from settings and a data set to a run folder with results."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from recsys_embed.data.data_source import DataSource
from recsys_embed.data.folder import lock
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.driver import Run, RunOutcome
from recsys_embed.train.environment import check_device
from recsys_embed.train.inputs import check_data
from recsys_embed.utils.deprecated import earlier_names


def run_training(
    config: TrainConfig,
    data: DataSource,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    start_from: str | Path | None = None,
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
        start_from: folder of a finished run, or its ``model.pt``: train its model on, with the weights, the moments of
            numeric columns and the catalogue that it has, instead of a fresh one. Optimizers and schedule begin anew.
            The data must be encoded as that of the earlier run (``convert_table(..., like=OLD)``), and the settings of
            model and method must be its own.
        device: e.g. ``"cuda"``; None: CPU.
        tensorboard: also write TensorBoard events.
        save_model: write ``model.pt`` at the end.
        show_progress: see :class:`Trainer`.
        label: text beside the progress bar.

    Raises:
        ConfigError: the data lacks members of a data set; the folder already holds a run and ``resume`` is False, or
            one under torchrun; the device cannot be used; the weights to start from are of other settings, features or
            vocabularies.
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
            start_from=start_from,
            device=device,
            save_model=save_model,
            tensorboard=tensorboard,
            show_progress=show_progress,
            label=label,
        ).run()


__getattr__ = earlier_names(
    __name__,
    {
        "CHECKPOINTS": "train.driver.CHECKPOINTS",
        "LINEAR_METHOD": "train.plans.LINEAR_METHOD",
        "Plans": "train.plans.Plans",
        "environment": "train.environment.environment",
        "fingerprint": "train.inputs.fingerprint",
        "footprint_dict": "train.json_values.footprint_dict",
        "goes_on": "train.driver.should_resume",
        "make_optimizer": "train.build.make_optimizer",
        "model_from_config": "train.build.model_from_config",
        "plain": "train.json_values.json_ready",
        "plans_for": "train.plans.plans_for",
        "resolve": "train.plans.resolve",
        "schema_of": "train.inputs.schema_of",
        "trained_footprint": "train.build.trained_footprint",
    },
)
