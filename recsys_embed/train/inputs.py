"""Inputs of a run: the data's schema for its settings, and a fingerprint of schema and rows."""

from __future__ import annotations

import hashlib
import json

from recsys_embed.data.data_source import TRAINING, DataSource, need_members
from recsys_embed.features import Schema
from recsys_embed.train.config import TrainConfig


def check_data(data: DataSource, config: TrainConfig, purpose: str, *also: str) -> None:
    """Refuse data that lacks members of :class:`DataSource` that a run with these settings needs.

    Raises:
        ConfigError: names them.
    """
    members = (*TRAINING, *also)
    need_members(data, purpose, members)
    if config.standardise and data.num_dense:
        need_members(data, purpose, (*members, "numeric_moments"))


def schema_of(data: DataSource, config: TrainConfig) -> Schema:
    """The data's features at the width and with the initial distribution and the unseen ids' policy of ``config``."""
    schema: Schema = data.schema(config.embedding_dim)
    return schema.with_init(config.embedding_init).with_unseen(config.unseen)


def fingerprint(schema: Schema, data: DataSource) -> str:
    """Short hash of the features and rows a run was trained on."""
    return hashlib.sha256(json.dumps([schema.to_dict(), data.digest], sort_keys=True).encode()).hexdigest()[:16]
