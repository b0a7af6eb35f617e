"""Example inputs, to trace a module and to compare its graph with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.collection.lookup_bundle import LookupBundle
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError
from recsys_embed.models import CTRModel
from recsys_embed.utils.types import BagIds

Inputs = tuple[Any, ...]

# Where arithmetic on 64 bits goes wrong first.
_EDGES = (0, -1, 1, 2**63 - 1, -(2**63), 2**32, -(2**32), 2**53 + 1)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested containers, in order.

    >>> [t.item() for t in tensors((torch.tensor(1), {"a": [torch.tensor(2), None]}))]
    [1, 2]
    """
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def plain_bags(inputs: Inputs) -> Inputs:
    """Inputs with bags as pairs ``(values, offsets)``, which programs of torch alone can name."""
    return tuple((given.values, given.offsets) if isinstance(given, BagIds) else given for given in inputs)


def random_inputs(model: nn.Module, batch: int, seed: int = 0) -> Inputs | None:
    """Arguments for a module of the library: ids over the whole range it takes, its ends included; None for others.

    Args:
        batch: samples; of a drop-in with a mode, bags, some of them empty.

    >>> import recsys_embed as rse
    >>> (ids,) = random_inputs(rse.make_embedding("full", 10, 4), 100)
    >>> ids.shape, int(ids.min()), int(ids.max())
    (torch.Size([100]), 0, 9)
    """
    rng = torch.Generator().manual_seed(seed)
    if isinstance(model, CTRModel):
        colls = list(model.collections().values())
        # A feature takes the ids that all collections take.
        limits = [max(column) for column in zip(*(_limits(c.bundle) for c in colls), strict=True)]
        sizes = [spec.num_embeddings for spec in colls[0].schema]
        lists = 0 if model.scorer is None else len(model.scorer.lists)
        dense = torch.randn(batch, model.num_dense, generator=rng)
        if lists:
            bags = _bags(batch, limits, sizes, lists, rng)
            return dense.to(_device(model)), BagIds(*(t.to(_device(model)) for t in bags))
        found: Inputs = (dense, _columns(batch, limits, sizes, rng))
    elif isinstance(model, EmbeddingCollection):
        sizes = [spec.num_embeddings for spec in model.schema]
        found = (_columns(batch, _limits(model.bundle), sizes, rng),)
    elif isinstance(model, CompressedEmbedding):
        (limit,) = _limits(model)
        if model.mode is None:
            found = (_ids(batch, limit, model.num_embeddings, rng),)
        else:
            lengths = torch.randint(0, 4, (batch,), generator=rng)
            lengths[0] = 2
            ends = lengths.cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends])[: batch + int(model.include_last_offset)]
            found = (_ids(int(ends[-1]), limit, model.num_embeddings, rng), offsets)
    else:
        return None
    return tuple(t.to(_device(model)) for t in found)


def _device(model: nn.Module) -> torch.device:
    return next(chain(model.parameters(), model.buffers())).device


def _bags(batch: int, limits: Sequence[int], sizes: Sequence[int], lists: int, rng: torch.Generator) -> BagIds:
    """Ids of all features as bags, those of the last features with any number of ids."""
    lengths = torch.ones(len(sizes), batch, dtype=torch.int64)
    lengths[-lists:] = torch.randint(0, 4, (lists, batch), generator=rng)
    values = [_ids(int(n.sum()), limit, size, rng) for n, limit, size in zip(lengths, limits, sizes, strict=True)]
    return BagIds(torch.cat(values), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)]))


def _limits(module: LookupBundle | CompressedEmbedding) -> list[int]:
    """Per feature, the number of ids it takes; -1 where it takes any."""
    limits = cast("list[int]", module.unseen.integers_of("limits"))
    return limits


def _columns(batch: int, limits: Sequence[int], sizes: Sequence[int], rng: torch.Generator) -> Tensor:
    columns = [_ids(batch, limit, size, rng) for limit, size in zip(limits, sizes, strict=True)]
    return torch.stack(columns, 1)


def _ids(count: int, limit: int, size: int, rng: torch.Generator) -> Tensor:
    """Ids ``[count]`` below ``limit``, or any int64 where it is -1; the first ones are the ends of the range."""
    known = torch.randint(size, (count,), generator=rng)
    edges = torch.tensor([0, size - 1] if limit >= 0 else _EDGES)
    if limit < 0:
        wild = torch.randint(-(2**63), 2**63 - 1, (count,), generator=rng)
        known = torch.where(torch.rand(count, generator=rng) < 0.5, known, wild)
    # Shuffled, so that a batch of one is not always the first edge.
    edges = edges[torch.randperm(len(edges), generator=rng)][:count]
    known[: len(edges)] = edges
    return known


def example_inputs(model: nn.Module, given: Any) -> Inputs:
    """The example inputs as a tuple; generated if none are given.

    Raises:
        ConfigError: none given for a module of somebody else's, or nothing in them is a tensor.
    """
    if given is None:
        made = random_inputs(model, 4)
        if made is None:
            raise ConfigError(
                f"give example `inputs` of {type(model).__name__}: a tuple of the arguments of its forward, with two "
                "or more samples"
            )
        return made
    inputs = given if isinstance(given, tuple) else (given,)
    if not tensors(inputs):
        raise ConfigError(f"example `inputs` must hold at least one tensor; got {inputs!r:.80}")
    return inputs


def batches(model: nn.Module, inputs: Inputs, made_up: bool, vary: bool) -> Iterator[Inputs]:
    """Inputs to compare a graph on, in several batch sizes: generated, or the given ones truncated and repeated.

    Args:
        made_up: the module is the library's own and takes what :func:`random_inputs` returns.
        vary: the first dimension of every input is the batch.
    """
    if made_up:
        for seed, batch in enumerate((1, 5, 300)):
            made = random_inputs(model, batch, seed)
            if made is not None:
                yield made
        return
    yield inputs
    if vary and isinstance(model, CTRModel) and len(inputs) == 2 and isinstance(inputs[1], BagIds):
        features, (dense, bags) = len(next(iter(model.collections().values())).schema), inputs
        if bags.offsets.numel() == features * len(dense) + 1:
            yield _repeated(dense, bags, features)
        return
    if vary and len({t.shape[0] for t in tensors(inputs) if t.dim()}) == 1:
        yield _resized(inputs, lambda t: t[:1])
        if not any(_may_be_offsets(t) for t in tensors(inputs)):
            yield _resized(inputs, lambda t: torch.cat([t.flip(0), t, t]))


def _repeated(dense: Tensor, bags: BagIds, features: int) -> Inputs:
    """Rows in the opposite order and twice more, of numeric values and of bags feature after feature."""
    order = torch.arange(len(dense), device=dense.device)
    rows = torch.cat([order.flip(0), order, order])
    starts = bags.offsets[:-1].view(features, -1)[:, rows].flatten()
    lengths = bags.offsets.diff().view(features, -1)[:, rows].flatten()
    ends = lengths.cumsum(0)
    places = torch.arange(int(ends[-1]), device=dense.device) + (starts - ends + lengths).repeat_interleave(lengths)
    return dense[rows], BagIds(bags.values[places], torch.cat([ends.new_zeros(1), ends]))


def _may_be_offsets(t: Tensor) -> bool:
    """Whether a tensor looks like offsets of bags, which cannot be repeated."""
    whole = t.dim() == 1 and not t.is_floating_point() and t.dtype is not torch.bool
    return whole and int(t[0]) == 0 and bool((t.diff() >= 0).all())


def _resized(inputs: Inputs, change: Any) -> Inputs:
    out: Inputs = pytree.tree_map(lambda t: change(t) if isinstance(t, Tensor) and t.dim() else t, inputs)
    return out
