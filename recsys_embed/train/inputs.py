"""Inputs of a run: the data's schema for its settings, and a fingerprint of schema and rows."""

from __future__ import annotations

import hashlib
import json
from typing import cast

from recsys_embed.data.batch import as_batch
from recsys_embed.data.data_source import TRAINING, BatchSource, DataSource, need_members
from recsys_embed.data.rows import RowSource
from recsys_embed.errors import ConfigError
from recsys_embed.features import Schema
from recsys_embed.models import RetrievalModel, get_model
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.losses import LOSSES, check_model
from recsys_embed.train.retrieval_metrics import USER


def check_data(data: DataSource, config: TrainConfig, purpose: str, *also: str) -> None:
    """Refuse data that lacks members of :class:`DataSource` that a run with these settings needs.

    Raises:
        ConfigError: names them.
    """
    members = (*TRAINING, *also)
    need_members(data, purpose, members)
    if config.standardise and data.num_dense:
        need_members(data, purpose, (*members, "numeric_moments"))


def check_rows(data: BatchSource, config: TrainConfig) -> bool:
    """Refuse rows that cannot be trained on, see :meth:`RowSource.check_values`; whether every row was looked at.

    Raises:
        ConfigError: the loss does not train the model.
        DataError: names split, row and what is wrong.
    """
    check_model(config.loss, config.model)
    if config.exclude_seen and issubclass(get_model(config.model), RetrievalModel):
        _need_users(data)
    if not isinstance(data, RowSource):
        return False
    loss = LOSSES[config.loss]
    data.check_values(real_labels=loss.real_labels, needs_labels=loss.needs_labels)
    return data.fits("train")


def _need_users(data: BatchSource) -> None:
    """Refuse to leave out what users have seen where rows do not say whose they are.

    Raises:
        ConfigError: says what would.
    """
    batch = next(iter(data.batches("train", 1, shuffle=False)), None)
    names = cast("DataSource", data).schema(1).names if hasattr(data, "schema") else []
    if batch is not None and "group" not in as_batch(batch).extra and USER not in names:
        raise ConfigError(
            "`exclude_seen` needs rows that say whose they are: a `group` column in the data, or a feature named "
            f"{USER!r}; got features {', '.join(names)}"
        )


def schema_of(data: DataSource, config: TrainConfig) -> Schema:
    """The data's features at the width and with the initial distribution and the unseen ids' policy of ``config``."""
    schema: object = data.schema(config.embedding_dim)
    if not isinstance(schema, Schema):
        raise ConfigError(
            f"`schema` of {type(data).__name__} must return a recsys_embed.Schema of its features; got "
            f"{type(schema).__name__}"
        )
    return schema.with_init(config.embedding_init).with_unseen(config.unseen)


def fingerprint(schema: Schema, data: DataSource) -> str:
    """Short hash of the features and rows a run was trained on."""
    if not isinstance(data.digest, str):
        raise ConfigError(
            f"`digest` of {type(data).__name__} must be a text that changes with the rows, such as a hash of files; "
            f"got {type(data.digest).__name__}"
        )
    return hashlib.sha256(json.dumps([schema.to_dict(), data.digest], sort_keys=True).encode()).hexdigest()[:16]
