"""Losses of users and items: softmax over the catalogue, over sampled items, and pairs (BPR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys_embed.models.retrieval import Queries, RetrievalModel
from recsys_embed.utils.settings import Settings, param


@dataclass(frozen=True)
class SoftmaxArgs(Settings):
    """Arguments of ``softmax``.

    Args:
        temperature: scores are divided by it.
    """

    noun = "argument of the loss"
    temperature: float = param(1.0, above=0)


@dataclass(frozen=True)
class SampledSoftmaxArgs(SoftmaxArgs):
    """Arguments of ``sampled_softmax``.

    Args:
        negatives: items drawn uniformly of all ids for each batch, besides the batch's own.
        logq: subtract from each negative's score the logarithm of how often it is expected among the negatives, so that
            frequent items are not pushed away for being frequent.
        correct_positive: subtract it from the positive's score too, as Yi et al. (RecSys 2019, equation 3) write it;
            without, the sampled sum of exponentials is an unbiased estimate of that over the catalogue.
    """

    negatives: int = param(0, low=0)
    logq: bool = True
    correct_positive: bool = False

    def conflicts(self) -> list[str]:
        return ["`correct_positive` needs `logq`"] if self.correct_positive and not self.logq else []


@dataclass(frozen=True)
class BPRArgs(Settings):
    """Arguments of ``bpr``.

    Args:
        negatives: items drawn uniformly for each positive.
    """

    noun = "argument of the loss"
    negatives: int = param(1, low=1)


def softmax(model: RetrievalModel, queries: Queries, args: SoftmaxArgs) -> Tensor:
    """Cross entropies ``[n]`` of the positives among all items of the catalogue."""
    items = model.items(torch.arange(len(model.in_catalogue), device=queries.targets.device))
    bias = items.new_zeros(len(items)).masked_fill_(~model.in_catalogue, float("-inf"))
    return cross_entropy(queries.vectors, items / args.temperature, queries.targets, bias, None)


def sampled_softmax(model: RetrievalModel, queries: Queries, args: SampledSoftmaxArgs) -> Tensor:
    """Cross entropies ``[n]`` of the positives among the batch's other positives and ``negatives`` uniform items.

    The positive itself among the negatives, an accidental hit, is left out.
    """
    targets, total = queries.targets, len(model.in_catalogue)
    drawn = torch.randint(total, (args.negatives,), device=targets.device)
    ids = torch.cat([targets, drawn])
    items = model.items(ids)
    bias = items.new_zeros(len(ids))
    if args.logq:
        bias -= expected_negatives(model, ids, len(targets), args.negatives).log().to(items.dtype)
    own = bias[: len(targets)] if args.correct_positive else bias.new_zeros(len(targets))
    absent = bias.masked_fill(~model.in_catalogue[ids], float("-inf"))
    rows = torch.arange(len(targets), device=targets.device)
    return cross_entropy(queries.vectors, items / args.temperature, rows, absent, Positives(targets, ids, own))


class Positives(NamedTuple):
    """Positives of rows that are among the items themselves.

    Args:
        targets: ids of the positives, ``[n]``.
        ids: of the items, the positives first: ``[m]``.
        bias: added to the positives' scores in place of the items', ``[n]``.
    """

    targets: Tensor
    ids: Tensor
    bias: Tensor


def cross_entropy(users: Tensor, items: Tensor, columns: Tensor, bias: Tensor, positives: Positives | None) -> Tensor:
    """Cross entropies ``[n]`` of one item per user among all.

    Args:
        users: ``[n, K]``.
        items: ``[m, K]``.
        columns: the item of each user, ``[n]``.
        bias: added to the items' scores, ``[m]``; minus infinity leaves an item out.
        positives: where items are those of other users too, which are left out where they are the user's own.
    """
    found: Tensor = _CrossEntropy.apply(users, items, columns, bias, positives)
    return found


class _CrossEntropy(torch.autograd.Function):
    """Keeps the probabilities as the one matrix of all users and items; torch's own functions make five."""

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, items: Tensor, columns: Tensor, bias: Tensor, positives: Positives | None
    ) -> Tensor:
        rows = torch.arange(len(users), device=users.device)
        scores = torch.addmm(bias, users, items.T)
        if positives is not None:
            own = (users * items.index_select(0, columns)).sum(1) + positives.bias
            scores[same_items(positives.targets, positives.ids)] = float("-inf")
            scores[rows, columns] = own
        top = scores.amax(1, keepdim=True)
        chosen = scores[rows, columns] - top.squeeze(1)
        total = scores.sub_(top).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(scores.div_(total), users, items, columns)
        return total.log_().squeeze(1) - chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        shares, users, items, columns = ctx.saved_tensors
        moved = shares * grad.unsqueeze(1)
        moved[torch.arange(len(users), device=users.device), columns] -= grad
        return moved @ items, moved.T @ users, None, None, None


def same_items(targets: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """Places ``(row, column)`` of equal ids of ``targets [n]`` and ``ids [m]``; few as a rule, so no matrix is made.

    >>> [part.tolist() for part in same_items(torch.tensor([5, 7]), torch.tensor([7, 5, 5]))]
    [[0, 0, 1], [1, 2, 0]]
    """
    values, order = ids.sort(stable=True)
    targets = targets.contiguous()
    first, last = torch.searchsorted(values, targets), torch.searchsorted(values, targets, right=True)
    counts = last - first
    ends = counts.cumsum(0)
    rows = torch.repeat_interleave(counts)
    if 4 * len(rows) > len(targets) * len(ids):
        return (targets.unsqueeze(1) == ids).nonzero(as_tuple=True)
    places = torch.arange(len(rows), device=ids.device) - (ends - counts - first)[rows]
    return rows, order[places]


def expected_negatives(model: RetrievalModel, ids: Tensor, batch: int, negatives: int) -> Tensor:
    """How often each of ``ids [n]`` is expected among a row's negatives: ``batch - 1`` items by the frequencies of
    training, and ``negatives`` uniform ones; float64 ``[n]``."""
    counts = model.item_counts
    # The loss leaves out rows whose item is not in the catalogue, so these are no negatives either.
    total = counts.masked_fill(~model.in_catalogue, 0).sum().clamp(min=1).double()
    expected = counts[ids].clamp(min=1) * (max(batch - 1, 0) / total) + negatives / len(counts)
    return expected.clamp(min=1e-30)


def bpr(model: RetrievalModel, queries: Queries, args: BPRArgs) -> Tensor:
    """``-ln sigmoid(s(positive) - s(negative))``, the mean over uniform negatives that are not the positive: ``[n]``.

    Source: Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, UAI 2009.
    """
    targets, total = queries.targets, len(model.in_catalogue)
    drawn = torch.randint(max(total - 1, 1), (len(targets), args.negatives), device=targets.device)
    drawn += drawn >= targets.unsqueeze(1)
    drawn.clamp_(max=total - 1)  # of a catalogue of one item
    items = model.items(torch.cat([targets, drawn.view(-1)]))
    positive, negative = items[: len(targets)], items[len(targets) :].view(*drawn.shape, -1)
    margins = ((positive.unsqueeze(1) - negative) @ queries.vectors.unsqueeze(2)).squeeze(2)
    counts = (model.in_catalogue[drawn] & (drawn != targets.unsqueeze(1))).to(margins.dtype)
    return (F.softplus(-margins) * counts).sum(1) / counts.sum(1).clamp(min=1)
