"""Build the model of a run and the optimizer of its tables from its settings."""

from __future__ import annotations

import torch

from recsys_embed.core.footprint import Footprint
from recsys_embed.data.data_source import DataSource
from recsys_embed.errors import ConfigError
from recsys_embed.features import Schema
from recsys_embed.models import CTRModel, build_model
from recsys_embed.optim import FusedOptimizer, make_rule, unfused_parameters
from recsys_embed.train.catalogue import learn_items
from recsys_embed.train.config import DENSE_ADAM, TrainConfig
from recsys_embed.train.plans import Plans, plans_for


def make_optimizer(config: TrainConfig) -> FusedOptimizer | None:
    """The fused optimizer of the tables, or None for ``dense_adam``."""
    if config.embedding_optimizer == DENSE_ADAM:
        return None
    lr = config.embedding_learning_rate or config.learning_rate
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in config.embedding_optimizer_args.items()}
    if config.embedding_weight_decay:
        args = {"weight_decay": config.embedding_weight_decay, "rows": "all", **args}
    if "lr" in args:
        raise ConfigError("the tables' rate is `embedding_learning_rate`, not an `lr` in `embedding_optimizer_args`")
    try:
        return make_rule(config.embedding_optimizer, lr=lr, **args)
    except ConfigError as e:
        raise ConfigError(f"`embedding_optimizer_args`: {e}") from e


def model_from_config(
    config: TrainConfig,
    schema: Schema,
    num_dense: int,
    device: torch.device | str | None = None,
    plans: Plans | None = None,
) -> CTRModel:
    """Build the model of a run; ``schema`` has the width ``config.embedding_dim``, ``plans`` are by default the
    settings'."""
    plans = plans_for(schema, config) if plans is None else plans
    return build_model(
        config.model,
        schema,
        plans.vectors,
        plans.linear,
        num_dense=num_dense,
        optimizer=make_optimizer(config),
        seed=config.seed,
        backend=config.backend,
        device=device,
        **config.model_args,
    )


def standardise(model: CTRModel, config: TrainConfig, data: DataSource) -> CTRModel:
    """The model with its numeric columns standardised by the training rows, if the settings say so; one that finds
    items also has learned which there are."""
    if config.standardise and data.num_dense:
        model.standardise(*data.numeric_moments())
    learn_items(model, data)
    return model


def trained_footprint(model: CTRModel) -> Footprint:
    """Bytes of the embedding part in a run: the trainer's Adam keeps two moments of what no fused optimizer holds."""
    ordinary = {p for c in model.collections().values() for p in unfused_parameters(c)}
    return model.footprint() + Footprint(optimizer=2 * sum(p.nbytes for p in ordinary))
