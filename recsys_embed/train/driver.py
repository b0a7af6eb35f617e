"""The steps of every training run, from settings and a data set to a run folder with results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recsys_embed.collection.optimizer_state import weights_of
from recsys_embed.core.footprint import Footprint
from recsys_embed.data.data_source import DataSource
from recsys_embed.data.manifest import Manifest
from recsys_embed.errors import ConfigError
from recsys_embed.models import CTRModel
from recsys_embed.train.build import model_from_config, trained_footprint
from recsys_embed.train.catalogue import learn_items
from recsys_embed.train.checkpoint import save_checkpoint
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.environment import environment
from recsys_embed.train.inputs import check_rows, fingerprint, schema_of
from recsys_embed.train.json_values import footprint_dict, json_ready
from recsys_embed.train.loop import Trainer
from recsys_embed.train.plans import plans_for, resolve
from recsys_embed.train.result import TrainResult
from recsys_embed.train.resumable import CHECKPOINT
from recsys_embed.train.warm_start import StartingWeights
from recsys_embed.utils.files import write_json

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints of a run under torchrun; the file ``latest`` there names the newest."""


@dataclass(frozen=True)
class RunOutcome:
    """A finished run: its metrics and the bytes of its embeddings."""

    result: TrainResult
    footprint: Footprint
    full_bytes: int
    model: CTRModel


class Run:
    """One training run on one device; a run on several processes overrides the steps that differ.

    Args:
        config: settings.
        data: the whole data set.
        folder: run folder; None keeps nothing.
        resume: go on from the folder's checkpoint.
        device: where the model is trained.
        save_model: write the model at the end.
        start_from: a finished run, or its ``model.pt``, whose weights this one begins with.
        **options: of the trainer: ``tensorboard``, ``show_progress`` and ``label``.
    """

    writes = True
    """Whether this process writes the files that all processes share."""

    def __init__(
        self,
        config: TrainConfig,
        data: DataSource,
        folder: Path | None,
        *,
        resume: bool,
        device: torch.device | str | None,
        save_model: bool,
        start_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.config, self.data, self.folder, self.resume = config, data, folder, resume
        self.device, self.save_model, self.options = device, save_model, options
        self.schema = schema_of(data, config)
        self.identity: dict[str, Any] = {"data": fingerprint(self.schema, data)}
        self.start = None if start_from is None else StartingWeights.read(start_from)
        if self.start is not None:
            self.config = self.start.settings(config)
            self.identity["start_from"] = self.start.digest

    def run(self) -> RunOutcome:
        """Train to the end."""
        check_rows(self.rows, self.config)
        self.config = self.resolved_config()
        going_on = self.should_resume()
        model = self.build()
        footprint = self.footprint(model)
        if self.config.standardise and self.data.num_dense:
            model.standardise(*self.moments())
        if self.start is None:
            learn_items(model, self.data)
        else:
            self.start.load_into(model, self.data)
        trained = self.placed(model)
        if self.writes and self.folder is not None:
            write_json(self.folder / "config.json", self.config.to_dict())
            begun = {} if self.start is None else {"start_from": str(self.start.path.resolve())}
            facts = {"seed": self.config.seed, **begun, **environment(), "footprint": footprint_dict(footprint)}
            write_json(self.folder / "run.json", {**facts, **data_folder(self.data), **self.facts(trained)})
        result = self.train(trained, going_on)
        if self.folder is not None:
            if self.save_model:
                self.save(self.folder, trained, footprint)
            if self.writes:
                write_json(self.folder / "result.json", json_ready(result.to_dict()))
        return RunOutcome(result, footprint, plans_for(self.schema, self.config).full_bytes, model)

    # -- what a run on several processes does otherwise -----------------------------------------------------------

    @property
    def rows(self) -> DataSource:
        """The rows that this process reads."""
        return self.data

    def resolved_config(self) -> TrainConfig:
        """The settings, with the planner's plan in place of method ``"planned"``."""
        return resolve(self.schema, self.config, self.data)

    def should_resume(self) -> bool:
        """Whether the folder holds a run to resume."""
        return should_resume(self.folder, self.resume)

    def build(self) -> CTRModel:
        """The model, untrained."""
        plans = None if self.start is None else self.start.plans(self.schema, self.data)
        return model_from_config(self.config, self.schema, self.data.num_dense, self.device, plans)

    def footprint(self, model: CTRModel) -> Footprint:
        """Bytes of its embedding part."""
        return trained_footprint(model)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the numeric columns."""
        return self.data.numeric_moments()

    def placed(self, model: CTRModel) -> Any:
        """The model on its training devices."""
        return model

    def facts(self, trained: Any) -> dict[str, Any]:
        """Further items of ``run.json``."""
        return {}

    def train(self, trained: Any, going_on: bool) -> TrainResult:
        """Train the model that :meth:`placed` gave."""
        return Trainer(
            trained,
            self.data,
            self.config,
            folder=self.folder,
            resume=going_on,
            device=self.device,
            identity=self.identity,
            **self.options,
        ).run()

    def save(self, folder: Path, trained: nn.Module, footprint: Footprint) -> None:
        """Write the trained model."""
        identity = {**self.config.to_dict(), **self.identity}
        save_checkpoint(folder / "model.pt", identity, model=weights_of(trained))


def data_folder(data: DataSource) -> dict[str, Any]:
    """Where a data folder is, and the fingerprint of its encoding; nothing of other data."""
    path, manifest = getattr(data, "path", None), getattr(data, "manifest", None)
    if not isinstance(path, Path) or not isinstance(manifest, Manifest):
        return {}
    return {"data": {"folder": str(path.resolve()), "encoding": manifest.fingerprint}}


def should_resume(folder: Path | None, resume: bool, *, torchrun: bool = False) -> bool:
    """Whether ``folder`` holds a run to resume.

    Raises:
        ConfigError: it holds one and ``resume`` is False, or one whose checkpoints the other command reads.
    """
    if folder is None:
        return False
    alone, many = (folder / CHECKPOINT).exists(), (folder / CHECKPOINTS / "latest").exists()
    if (alone or many) and not resume:
        raise ConfigError(f"{folder} already holds a run; go on with it (--resume) or choose another folder (--out)")
    if many and not torchrun:
        raise ConfigError(
            f"{folder} holds a run under torchrun; go on with it so, on any number of processes "
            "(torchrun --nproc-per-node 1 for one), or choose another folder (--out)"
        )
    if alone and torchrun:
        raise ConfigError(f"{folder} holds a run without torchrun; go on with it so, or choose another folder (--out)")
    return alone or many
