"""Studies whose trials train on several processes: rank 0 talks to the study, all ranks train.

Optuna's storages let any number of workers share one study. A worker is a process or a torchrun group; within a
group, rank 0 alone asks for parameters and reports results, so the study sees one worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.sharding.process_group import broadcast_json, job, local_device
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.result import DivergedError

SHARED = (BudgetError, ConfigError, DivergedError)
"""Errors that all processes raise alike in a trial, so that the study can continue with the next trial."""
T = TypeVar("T")
Train = Callable[[TrainConfig], T]


def search_together(lead: Callable[[Train[T]], None], train: Train[T], *, device: str = "cpu") -> None:
    """Run a search on the processes of a torchrun group.

    Args:
        lead: called in the first process with a function ``run(config) -> outcome``, to be called once per trial: by it
            a study's objective trains, e.g. ``lambda run: study.optimize(lambda trial: run(settings(trial)), 20)``.
        train: what every process does for a trial, e.g. ``lambda config: run_sharded(config, data)``. It must end
            alike in all of them: with an outcome, or with a fault of :data:`SHARED`, which ``lead`` may catch.
        device: of these processes.

    Raises:
        LostProcessError: a process is gone; whatever else ``lead`` or ``train`` raise.
    """
    place = local_device(device)

    def run(config: TrainConfig) -> T:
        broadcast_json({"trial": config.to_dict()}, place)
        return train(config)

    with job(place):
        if dist.get_rank() == 0:
            # If an error ends the study, the others notice because they lose this process.
            lead(run)
            broadcast_json({"trial": None}, place)
            return
        while (told := broadcast_json(None, place)["trial"]) is not None:
            try:
                train(TrainConfig.from_dict(told))
            except SHARED:
                continue  # rank 0 raised it too and reported it to the study
