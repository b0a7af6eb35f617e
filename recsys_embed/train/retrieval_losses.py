"""Losses of users and items: softmax over the catalogue, over sampled items, and pairs (BPR)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys_embed.core.footprint import format_bytes
from recsys_embed.models.retrieval import Queries, RetrievalModel
from recsys_embed.utils.evaluation_mode import evaluation_mode
from recsys_embed.utils.settings import Settings, param

HELD_SCORES = 1 << 26
"""Scores of users and items that a loss holds together, 256 MiB; of more it computes each twice."""
MANY_BYTES = 4 << 30
"""Vectors of a catalogue and their gradients that ``softmax`` warns of."""


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


def warn_of_large(model: RetrievalModel) -> None:
    """Warn that ``softmax`` holds the vectors of all items, where these are many."""
    with evaluation_mode(model), torch.no_grad():
        one = model.items(torch.arange(1, device=model.in_catalogue.device))
    # Vectors and those over the temperature, and the gradients of both.
    found = 4 * one.nbytes * len(model.in_catalogue)
    if found > MANY_BYTES:
        warnings.warn(
            f"loss 'softmax' computes the vectors of all {len(model.in_catalogue):,} items and their gradients at "
            f"every step, {format_bytes(found)}; 'sampled_softmax' computes those of the batch and of `negatives`",
            stacklevel=2,
        )


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
    """Keeps the probabilities as the one matrix of all users and items, where torch's own functions make five; of more
    than ``HELD_SCORES`` it keeps their sums, and computes them in blocks of items, once more for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, items: Tensor, columns: Tensor, bias: Tensor, positives: Positives | None
    ) -> Tensor:
        own = None
        if positives is not None:
            own = (users * items.index_select(0, columns)).sum(1) + positives.bias
        ctx.given = given = _Scores(users, items, columns, bias, positives, own)
        if users.shape[0] * items.shape[0] > HELD_SCORES:
            top, total, chosen = (users.new_full((len(users),), value) for value in (float("-inf"), 0.0, 0.0))
            for part in given.parts():
                scores, rows, at = given.of(part)
                chosen[rows] = scores[rows, at]
                highest = torch.maximum(top, scores.amax(1))
                # Where no item of a block is in the catalogue there is no highest score yet.
                shift = highest.masked_fill(highest == float("-inf"), 0.0)
                total.mul_((top - shift).exp_()).add_(scores.sub_(shift.unsqueeze(1)).exp_().sum(1))
                top = highest
            ctx.log_sums = total.log_().add_(top)
            ctx.save_for_backward(users, items)
            return ctx.log_sums - chosen
        scores, rows, columns = given.of(slice(0, len(items)))
        top = scores.amax(1, keepdim=True)
        chosen = scores[rows, columns] - top.squeeze(1)
        total = scores.sub_(top).exp_().sum(1, keepdim=True)
        ctx.log_sums = None
        ctx.save_for_backward(users, items, scores.div_(total))
        return total.log_().squeeze(1) - chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        users, items, *shares = ctx.saved_tensors
        given = ctx.given
        if shares:
            moved = shares[0] * grad.unsqueeze(1)
            moved[torch.arange(len(users), device=users.device), given.columns] -= grad
            return moved @ items, moved.T @ users, None, None, None
        of_users, of_items = torch.zeros_like(users), torch.empty_like(items)
        for part in given.parts():
            scores, rows, at = given.of(part)
            moved = scores.sub_(ctx.log_sums.unsqueeze(1)).exp_().mul_(grad.unsqueeze(1))
            moved[rows, at] -= grad[rows]
            of_users.addmm_(moved, items[part])
            torch.mm(moved.T, users, out=of_items[part])
        return of_users, of_items, None, None, None


class _Scores(NamedTuple):
    """What :func:`cross_entropy` compares, by blocks of items; ``own`` are the positives' scores where they differ."""

    users: Tensor
    items: Tensor
    columns: Tensor
    bias: Tensor
    positives: Positives | None
    own: Tensor | None

    def parts(self) -> Iterator[slice]:
        """Blocks of items of ``HELD_SCORES`` scores."""
        total, size = len(self.items), max(1, HELD_SCORES // len(self.users))
        return (slice(start, min(start + size, total)) for start in range(0, total, size))

    def of(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Scores ``[n, block]``, the rows whose positive is in the block, and its place there."""
        scores = torch.addmm(self.bias[part], self.users, self.items[part].T)
        if part.stop - part.start == len(self.items):
            rows = torch.arange(len(scores), device=scores.device)
        else:
            rows = ((self.columns >= part.start) & (self.columns < part.stop)).nonzero().squeeze(1)
        at = self.columns[rows] - part.start
        if self.positives is not None and self.own is not None:
            scores[same_items(self.positives.targets, self.positives.ids[part])] = float("-inf")
            scores[rows, at] = self.own[rows]
        return scores, rows, at


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
