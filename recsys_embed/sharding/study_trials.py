"""Searches whose trials train on several processes: one of them talks to the study, all of them train.

Any number of workers may share one study, as Optuna's storages allow; each is a process, or a group that torchrun
started. Within a group the first process alone asks for parameters and reports results, so the study sees one worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.sharding.process_group import job, local_device, share
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.result import DivergedError

SHARED = (BudgetError, ConfigError, DivergedError)
"""Faults that all processes meet in a trial, so that a search may go on to the next one."""
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
        share({"trial": config.to_dict()}, place)
        return train(config)

    with job(place):
        if dist.get_rank() == 0:
            # Where a fault ends the search, the others learn of it by losing this process.
            lead(run)
            share({"trial": None}, place)
            return
        while (told := share(None, place)["trial"]) is not None:
            try:
                train(TrainConfig.from_dict(told))
            except SHARED:
                continue  # the first process met it too, and told the study
