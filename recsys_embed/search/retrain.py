"""Build the model to retrain: from the initial weights of the search, or from those that it trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, TypedDict

import torch
from torch import Tensor

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.features import Schema
from recsys_embed.models.base import CTRModel
from recsys_embed.plan import Plan, table_key
from recsys_embed.search.extract import initial_table, take_rows
from recsys_embed.search.supernet import LAYER
from recsys_embed.train.build import model_from_config
from recsys_embed.train.config import PLANNED, TrainConfig

Start = Literal["init", "supernet"]


class StartWeights(TypedDict, total=False):
    """What a retraining starts from, see :func:`build_retrained`."""

    hashes: Mapping[str, str] | None
    tables: Mapping[str, Tensor] | None
    shared: Mapping[str, Tensor] | None
    dense: Mapping[str, Tensor] | None
    linear: Mapping[str, tuple[Tensor, Tensor]] | None


def planned(config: TrainConfig, plan: Plan, budget: int | None = None) -> TrainConfig:
    """``config`` for training ``plan``; ``budget`` bytes for vectors and first-order weights together."""
    return config.replace(method=PLANNED, method_args={}, plan=plan.to_dict(), ratio=None, budget=budget)


def weights_hash(values: Tensor) -> str:
    """Short hash of a tensor's bytes."""
    flat = values.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(flat.data if flat.size else b"").hexdigest()[:16]


def dense_weights(model: CTRModel) -> dict[str, Tensor]:
    """A model's state outside its collections: the network, numeric vectors, buffers."""
    inside = tuple(f"{key}." for key in model.collections())
    # A retrieval model holds the layer that a search put before it.
    inside = (*inside, f"{LAYER}.")
    return {k: v for k, v in model.state_dict().items() if not k.startswith(inside) and isinstance(v, Tensor)}


def drawn_weights(model: CTRModel) -> dict[str, Tensor]:
    """Parameters outside the collections: what a seed draws, whatever the plan."""
    inside = tuple(f"{key}." for key in model.collections())
    return {k: p for k, p in model.named_parameters() if not k.startswith(inside)}


def initial_hashes(model: CTRModel) -> dict[str, str]:
    """Hash of every full table of vectors and of every dense weight of a model that has not been trained."""
    vectors = model.vectors
    tables = {
        f"table {s.name}": weights_hash(vectors.table(f"{s.table_name}.weight")) for s in vectors.schema.first_readers
    }
    return {**tables, **{f"weight {k}": weights_hash(v) for k, v in drawn_weights(model).items()}}


def build_retrained(
    config: TrainConfig,
    schema: Schema,
    num_dense: int,
    *,
    hashes: Mapping[str, str] | None = None,
    tables: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, Tensor] | None = None,
    dense: Mapping[str, Tensor] | None = None,
    linear: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    device: torch.device | str | None = None,
) -> CTRModel:
    """The model of a plan, with the kept rows and columns of full tables.

    Args:
        config: of :func:`planned`; its seed is that of the search.
        schema: of the search.
        num_dense: numeric columns.
        hashes: :func:`initial_hashes` of the search; the weights drawn must be the same.
        tables: by the first feature of each, full tables to take from; by default the initial ones, drawn again.
        shared: by feature, the vector ``[D]`` that pruned ids begin with, by default a fresh one.
        dense: weights outside the tables, by default the initial ones.
        linear: by feature, trained first-order weights ``[num_ids, 1]`` and how often each id occurs, by default fresh
            ones.

    Raises:
        CheckpointError: the initial weights are not those that the search began with.
    """
    model = model_from_config(config, schema, num_dense, device)
    differing = []
    for spec in schema.first_readers:
        table = initial_table(spec, config.seed) if tables is None else tables[spec.name]
        if tables is None and hashes is not None and weights_hash(table) != hashes.get(f"table {spec.name}"):
            differing.append(f"table {spec.name}")
        take_rows(model.vectors, spec.name, table, None if shared is None else shared[spec.name])
    if linear is not None and model.linear is not None:
        share_rows(model.linear, linear)
    if dense is not None:
        model.load_state_dict(dict(dense), strict=False)
    elif hashes is not None:
        found = {f"weight {k}": weights_hash(v) for k, v in drawn_weights(model).items()}
        differing += [k for k, v in found.items() if hashes.get(k) != v]
    if differing:
        raise CheckpointError(
            f"initial weights are not those the search began with: {', '.join(differing)}; retrain with the versions "
            "of the libraries that searched, or from the supernet's weights"
        )
    return model


@torch.no_grad()
def share_rows(collection: EmbeddingCollection, tables: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Set rows that many ids share to the mean of theirs in full tables, weighted by counts (least squares).

    Args:
        collection: every id of which reads one row, as it is.
        tables: by feature, ``[num_ids, width]`` and counts ``[num_ids]``.

    Raises:
        ConfigError: ids that read several rows, or rows with signs or weights.
    """
    sums = {key: torch.zeros(t.rows, t.width) for key, t in collection.tables.items()}
    mass = {key: torch.zeros(t.rows, 1) for key, t in collection.tables.items()}
    for name, (values, counts) in tables.items():
        spec, program = collection.schema[name], collection.bundle.programs[name]
        row_lookup = program.row_lookups[0]
        if (
            len(program.row_lookups) > 1
            or row_lookup.sign is not None
            or row_lookup.weight is not None
            or program.indexes
        ):
            raise ConfigError(f"first-order weights of {name!r} are not of one row per id; retrain from 'init'")
        key = table_key(spec, program.table(row_lookup.table))
        rows = row_lookup.transform.rows(torch.arange(spec.num_ids))
        # Ids that never occur get a tiny weight, which matters only for rows that no other id shares.
        share = counts.float().clamp_min(1e-6).unsqueeze(1)
        sums[key].index_add_(0, rows, values.cpu() * share)
        mass[key].index_add_(0, rows, share)
    for key, total in sums.items():
        read = mass[key].squeeze(1) > 0
        collection.table(key)[read.to(collection.table(key).device)] = (total[read] / mass[key][read]).to(
            collection.table(key).device
        )
