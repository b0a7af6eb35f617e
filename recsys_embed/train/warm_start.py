"""Warm start: a run that begins with the weights of an earlier one, such as yesterday's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import CheckpointError, ConfigError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.models import CTRModel, RetrievalModel
from recsys_embed.plan import Plan
from recsys_embed.train.catalogue import learn_items
from recsys_embed.train.checkpoint import load_weights
from recsys_embed.train.config import PLANNED, TrainConfig
from recsys_embed.train.plans import Plans
from recsys_embed.train.run_folder import carried, check_run_data, read_weights
from recsys_embed.utils.types import JSON

_SAME = ("model", "model_args", "method", "method_args", "plan", "ratio", "budget", "embedding_dim")
"""Settings that decide which weights there are."""
_OF_FEATURES = ("name", "num_embeddings", "embedding_dim", "ids", "table")


@dataclass(frozen=True)
class StartingWeights:
    """The weights of a finished run, and what they are of.

    Args:
        path: of the ``model.pt``.
        config: settings of that run.
        state: of its model.
    """

    path: Path
    config: JSON
    state: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> StartingWeights:
        """From a run folder, or its ``model.pt``.

        Raises:
            ConfigError: no such file or folder.
            CheckpointError: not a finished run, or damaged.
        """
        return cls(*read_weights(path))

    @property
    def digest(self) -> str:
        """Short hash of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def settings(self, config: TrainConfig) -> TrainConfig:
        """The settings of a run with these weights: ``config``, with the plan that the planner came to back then.

        Raises:
            ConfigError: settings of other weights.
        """
        theirs = _settings(self.config)
        if config.method == theirs.method == PLANNED and config.plan is None:
            config = config.replace(plan=theirs.plan, method_args=theirs.method_args)
        # Lists and tuples are alike.
        mine, old = (json.loads(json.dumps({n: getattr(c, n) for n in _SAME})) for c in (config, theirs))
        wrong = [n for n in _SAME if mine[n] != old[n]]
        raise_faults(
            [f"`{n}` is {mine[n]!r:.200}; there it was {old[n]!r:.200}" for n in wrong],
            f"a run that starts from {self.path} keeps the settings of its weights: leave them out, or train from the "
            "beginning",
        )
        return config

    def plans(self, schema: Schema, data: DataSource) -> Plans:
        """The plans that the weights are stored by.

        Raises:
            ConfigError: the data has other features, or other vocabularies.
        """
        check_run_data(self.path, data)  # type: ignore[arg-type]  # data without a manifest is let through
        known = {
            name: carried(self.state, name) for name in ("embedding", "linear") if f"{name}._extra_state" in self.state
        }
        if not known:
            raise CheckpointError(f"{self.path} is damaged: it holds no embeddings")
        vectors = "embedding" if "embedding" in known else "linear"
        old = Schema.from_dict(known[vectors]["schema"])
        width = {"embedding_dim"} if vectors == "linear" else set()
        mine, theirs = ([{k: getattr(f, k) for k in _OF_FEATURES if k not in width} for f in s] for s in (schema, old))
        if mine != theirs:
            differ = [f"{a} here, {b} there" for a, b in zip(mine, theirs, strict=False) if a != b]
            told = differ[0] if differ else f"{len(mine)} features here, {len(theirs)} there"
            raise ConfigError(
                f"the weights of {self.path} are of other features or vocabularies than the data ({told}): make the "
                "new data by the encoders of the old (`recsys-embed data ... --like OLD`), or start without them"
            )
        made = {name: Plan.from_dict(entry["plan"]) for name, entry in known.items()}
        return Plans(made[vectors], made.get("linear") if vectors == "embedding" else None, 0)

    def load_into(self, model: CTRModel, data: DataSource) -> None:
        """Fill a model, and add the items of the data to its catalogue.

        Raises:
            CheckpointError: names or shapes differ.
        """
        load_weights(model, self.state, self.path)
        if isinstance(model, RetrievalModel):
            before = model.in_catalogue.clone()
            learn_items(model, data)
            with torch.no_grad():
                model.in_catalogue |= before


def settings_of_run(path: str | Path) -> JSON:
    """The settings of a finished run, as :class:`TrainConfig` takes them.

    Raises:
        ConfigError: no such file or folder.
        CheckpointError: not a finished run, or damaged.
    """
    return _settings(read_weights(path)[1]).to_dict()


def _settings(config: JSON) -> TrainConfig:
    """Those among what a checkpoint holds besides them."""
    names = {f.name for f in fields(TrainConfig)}
    return TrainConfig.from_dict({k: v for k, v in config.items() if k in names})
