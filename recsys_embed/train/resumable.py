"""Files of a training run: checkpoints for bit-exact resumption, and the best weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys_embed.collection.optimizer_state import weights_alone, weights_of
from recsys_embed.errors import CheckpointError, RecsysEmbedError
from recsys_embed.models.base import CTRModel
from recsys_embed.train.checkpoint import (
    CheckpointTimer,
    load_checkpoint,
    load_weights,
    rng_state,
    save_checkpoint,
)
from recsys_embed.train.run_log import RunLog
from recsys_embed.train.run_state import RunState
from recsys_embed.train.schedule import Schedule

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"


class Resumable:
    """Checkpointing part of :class:`recsys_embed.train.Trainer`, which sets these attributes."""

    model: CTRModel
    folder: Path | None
    device: torch.device
    identity: dict[str, Any]
    optimizer: torch.optim.Adam
    fused: bool
    schedule: Schedule
    state: RunState
    log: RunLog
    best_weights: dict[str, Any] | None
    _cadence: CheckpointTimer
    _resumed_rng: dict[str, Tensor] | None

    def _keep_best(self) -> None:
        if self.folder is None:
            self.best_weights = copy.deepcopy(weights_of(self.model))
        else:
            save_checkpoint(self.folder / BEST, self.identity, model=weights_of(self.model))

    def _load_best(self) -> None:
        if self.best_weights is not None:
            with weights_alone():
                self.model.load_state_dict(self.best_weights)
        elif self.folder is not None:
            saved = load_checkpoint(self.folder / BEST, self.identity)
            load_weights(self.model, saved["model"], self.folder / BEST)

    def _checkpoint(self) -> None:
        if self.folder is None:
            return
        with self._cadence.writing():
            self.state.log_bytes = self.log.flush()
            save_checkpoint(
                self.folder / CHECKPOINT,
                self.identity,
                state=self.state.to_dict(),
                schedule=self.schedule.state_dict(),
                model=weights_of(self.model),
                dense_optimizer=self.optimizer.state_dict(),
                embedding_optimizer={k: c.optimizer_state_dict() for k, c in self._fused_collections()},
                rng=rng_state(self.device),
            )

    def _restore(self) -> None:
        if self.folder is None:
            raise RecsysEmbedError("resuming needs a run folder")
        path = self.folder / CHECKPOINT
        saved = load_checkpoint(path, self.identity)
        load_weights(self.model, saved["model"], path)
        try:
            self.optimizer.load_state_dict(saved["dense_optimizer"])
        except ValueError as e:
            raise CheckpointError(
                f"the optimizer's state in {path} is of other parameters than this version trains by it: {e}. Go on "
                "with the version that began the run, or train anew in another folder"
            ) from e
        for key, coll in self._fused_collections():
            coll.load_optimizer_state_dict(saved["embedding_optimizer"][key])
        self.schedule.load_state_dict(saved["schedule"])
        self.state = RunState.from_dict(saved["state"])
        self._resumed_rng = saved["rng"]

    def _fused_collections(self) -> list[tuple[str, Any]]:
        return list(self.model.collections().items()) if self.fused else []
