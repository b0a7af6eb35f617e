"""Conversion between distributed checkpoints and models of a single process."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.sharding.checkpoint import check, describe, find, read, write
from recsys_embed.sharding.checkpoint_tensors import collections_in, unsharded_state_tensors, weight_tensors
from recsys_embed.utils.types import JSON


def to_single(folder: str | Path, model: nn.Module, *, states: bool = True) -> JSON:
    """Load a distributed checkpoint into an unsharded model, without a process group.

    The model can then be trained, saved and exported like any other.

    Args:
        folder: of :func:`recsys_embed.sharding.save`.
        model: the model that was sharded, with ``EmbeddingCollection`` in place of its shardable collections.
        states: also load the state of the collections' fused optimizers.

    Returns:
        ``extra`` of the save.

    Raises:
        CheckpointError: see :func:`recsys_embed.sharding.load`.
    """
    at, meta = find(folder)
    plain = _plain(model) if states else {}
    check(at, meta, model, bool(plain))
    held = {path: coll.optimizer_state_dict() for path, coll in plain.items()}
    tensors = list(weight_tensors(model))
    for path, coll in plain.items():
        tensors += unsharded_state_tensors(path, coll, held[path])
    read(at, tensors, alone=True)
    for path, coll in plain.items():
        held[path]["steps"] = dict.fromkeys(held[path]["steps"], meta["steps"])
        coll.load_optimizer_state_dict(held[path])
    return dict(meta["extra"])


def from_single(folder: str | Path, model: nn.Module, *, extra: JSON | None = None) -> Path:
    """Write an unsharded model, with the state of its fused optimizers, as a distributed checkpoint.

    The dense optimizer's state is not saved: after :func:`recsys_embed.sharding.load` it starts from its initial value.
    """
    plain = _plain(model)
    held = {path: coll.optimizer_state_dict() for path, coll in plain.items()}
    tensors = list(weight_tensors(model))
    for path, coll in plain.items():
        tensors += unsharded_state_tensors(path, coll, held[path])
    steps = max((n for saved in held.values() for n in saved["steps"].values()), default=0)
    return write(folder, tensors, {**describe(model, steps, bool(plain)), "extra": extra or {}}, alone=True)


def _plain(model: nn.Module) -> dict[str, EmbeddingCollection]:
    """Unsharded collections with a fused optimizer, by path."""
    found = collections_in(model)
    return {p: c for p, c in found.items() if isinstance(c, EmbeddingCollection) and c.optimizer is not None}
