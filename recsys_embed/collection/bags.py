"""Converts every input form of multi-valued features to one: values, feature after feature, with offsets."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_embed.errors import ConfigError
from recsys_embed.features import Schema
from recsys_embed.kernels.id_checks import check_id_dtype, check_offsets
from recsys_embed.utils.types import BagIds, FeatureIds, Ids, JaggedIds


class Bags(NamedTuple):
    """Bags of all features: bag ``f * batch + b`` holds the ids of feature f of sample b.

    ``values`` int64 ``[n]``, ``offsets`` int64 ``[features * batch + 1]``, ``weights`` floats ``[n]`` or None.
    """

    values: Tensor
    offsets: Tensor
    weights: Tensor | None
    batch: int

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()


def _one(feature: FeatureIds, where: str) -> tuple[Tensor, Tensor]:
    """Values and offsets of one feature given as ``(values, offsets)`` or as ids ``[B, L]`` or ``[B]``."""
    if isinstance(feature, Tensor) and feature.is_nested:
        raise ConfigError(
            f"a nested tensor is no form of ids here; give (ids.values(), ids.offsets()) of a jagged one "
            f"(feature {where!r})"
        )
    if isinstance(feature, Tensor):
        if feature.dim() not in (1, 2):
            raise ConfigError(f"ids of one feature are [B] or [B, L]; got {tuple(feature.shape)} (feature {where!r})")
        length = feature.shape[1] if feature.dim() == 2 else 1
        return feature.reshape(-1), torch.arange(feature.shape[0] + 1, device=feature.device) * length
    if not (isinstance(feature, tuple) and len(feature) == 2):
        raise ConfigError(
            f"a feature is a tensor or (values, offsets); got {type(feature).__name__} (feature {where!r})"
        )
    values = check_id_dtype(feature[0], where)
    return values, check_offsets(feature[1], values.numel(), f"feature {where!r}", closed=True)


def _check_present(schema: Schema, names: Container[str]) -> None:
    missing = [n for n in schema.names if n not in names]
    if missing:
        raise ConfigError(f"ids of {len(missing)} features are missing: {', '.join(missing[:8])}")


def _of_jagged(schema: Schema, ids: JaggedIds) -> Bags:
    """Bags of a KeyedJaggedTensor, whose features are brought to the schema's order all at once."""
    keys = list(ids.keys())
    _check_present(schema, keys)
    twice = sorted({k for k in keys if keys.count(k) > 1})
    if twice:
        raise ConfigError(f"keys of a KeyedJaggedTensor must be unique; got {', '.join(twice)} more than once")
    if ids.variable_stride_per_key():
        raise ConfigError("features must have one batch size; the KeyedJaggedTensor has one per feature")
    values, weights = ids.values(), ids.weights_or_none()
    check_id_dtype(values, "")
    offsets = check_offsets(ids.offsets(), values.numel(), "KeyedJaggedTensor", closed=True)
    batch = (offsets.numel() - 1) // len(keys)
    if keys != list(schema.names):
        order = [keys.index(n) for n in schema.names]
        lengths = offsets.diff().view(len(keys), batch)
        sizes = lengths.sum(1)
        starts, sizes = (sizes.cumsum(0) - sizes)[order], sizes[order]
        offsets = F.pad(lengths[order].reshape(-1).cumsum(0), (1, 0))
        moved = torch.repeat_interleave(starts - (sizes.cumsum(0) - sizes), sizes)
        at = moved + torch.arange(moved.numel(), device=moved.device)
        values, weights = values[at], None if weights is None else weights[at]
    return Bags(values.long(), offsets, weights, batch)


def to_bags(schema: Schema, ids: Ids, offsets: Tensor | None, weights: Tensor | None) -> Bags:
    """Bring any accepted form to :class:`Bags`; see :meth:`EmbeddingCollection.forward`.

    Raises:
        ConfigError: the form, its shapes or its feature names do not fit the schema, or weights not its poolings.
    """
    bags = _to_bags(schema, ids, offsets, weights)
    if bags.weights is not None and not bags.weights.is_floating_point():
        raise ConfigError(f"per_sample_weights must be floats; got {bags.weights.dtype}")
    if bags.weights is not None and any(s.pooling != "sum" for s in schema):
        raise ConfigError("per_sample_weights need pooling 'sum' for every feature")
    return bags


def _to_bags(schema: Schema, ids: Ids, offsets: Tensor | None, weights: Tensor | None) -> Bags:
    count = len(schema)
    if isinstance(ids, Tensor):
        check_id_dtype(ids, "")
        if ids.dim() != 1 or offsets is None:
            raise ConfigError(f"ids are [B, {count}], or 1-D with offsets [{count} * B + 1]; got {tuple(ids.shape)}")
        offsets = check_offsets(offsets, ids.numel(), "collection", closed=True)
        if (offsets.numel() - 1) % count:
            raise ConfigError(f"offsets must have {count} * B + 1 entries; got {offsets.numel()}")
        if weights is not None and weights.shape != ids.shape:
            raise ConfigError(
                f"per_sample_weights must have the shape of ids, {tuple(ids.shape)}; got {tuple(weights.shape)}"
            )
        return Bags(ids.long(), offsets, weights, (offsets.numel() - 1) // count)
    if weights is not None or offsets is not None:
        raise ConfigError("offsets and per_sample_weights go with 1-D ids")
    if isinstance(ids, BagIds):
        return _to_bags(schema, ids.values, ids.offsets, None)
    if not isinstance(ids, Mapping):
        if not (hasattr(ids, "keys") and hasattr(ids, "weights_or_none")):
            raise ConfigError(f"ids must be a tensor, a dict or a KeyedJaggedTensor; got {type(ids).__name__}")
        return _of_jagged(schema, ids)
    _check_present(schema, ids)
    parts = [_one(ids[name], name) for name in schema.names]
    batches = {name: o.numel() - 1 for name, (_, o) in zip(schema.names, parts, strict=True)}
    # Compared, not put into a set: the sizes of a program that is being exported have no hash.
    if any(batch != batches[schema.names[0]] for batch in batches.values()):
        raise ConfigError(f"features must have one batch size; got {batches}")
    for name, (values, _) in zip(schema.names, parts, strict=True):
        check_id_dtype(values, name)
    lengths = torch.cat([o.diff() for _, o in parts])
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Bags(torch.cat([v for v, _ in parts]).long(), starts, None, batches[schema.names[0]])


def pick(part: tuple[int, ...], feature: Tensor, count: int) -> tuple[Tensor | None, Tensor]:
    """Positions of the ids of some features, None for all of them, and each one's place among these features.

    Args:
        part: positions of the features in the schema.
        feature: of each id, int64 ``[n]``.
        count: features of the schema.
    """
    if part == tuple(range(count)):
        return None, feature
    place = torch.full((count,), -1, device=feature.device)
    place[list(part)] = torch.arange(len(part), device=feature.device)
    local = place[feature]
    at = (local >= 0).nonzero().squeeze(1)
    return at, local[at]
