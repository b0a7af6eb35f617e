"""Losses of users and items: softmax over the catalogue, over sampled items, and pairs (BPR)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
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
    scores = queries.vectors @ (items.T / args.temperature)
    with torch.no_grad():  # what has probability 0 has gradient 0
        scores.masked_fill_(~model.in_catalogue, float("-inf"))
    return F.cross_entropy(scores, queries.targets, reduction="none")


def sampled_softmax(model: RetrievalModel, queries: Queries, args: SampledSoftmaxArgs) -> Tensor:
    """Cross entropies ``[n]`` of the positives among the batch's other positives and ``negatives`` uniform items.

    The positive itself among the negatives, an accidental hit, is left out.
    """
    targets, total = queries.targets, len(model.in_catalogue)
    drawn = torch.randint(total, (args.negatives,), device=targets.device)
    ids = torch.cat([targets, drawn])
    items = model.items(ids)
    rows = torch.arange(len(targets), device=targets.device)
    with torch.no_grad():
        absent = targets.unsqueeze(1) == ids
        absent |= ~model.in_catalogue[ids]
        absent[rows, rows] = False
        log_expected = items.new_zeros(len(ids))
        if args.logq:
            log_expected = expected_negatives(model, ids, len(targets), args.negatives).log().to(items.dtype)
    scores = torch.addmm(-log_expected, queries.vectors, items.T / args.temperature)
    with torch.no_grad():
        if not args.correct_positive:
            scores[rows, rows] += log_expected[: len(targets)]
        scores.masked_fill_(absent, float("-inf"))  # what has probability 0 has gradient 0
    return F.cross_entropy(scores, rows, reduction="none")


def expected_negatives(model: RetrievalModel, ids: Tensor, batch: int, negatives: int) -> Tensor:
    """How often each of ``ids [n]`` is expected among a row's negatives: ``batch - 1`` items by the frequencies of
    training, and ``negatives`` uniform ones; float64 ``[n]``."""
    counts = model.item_counts.clamp(min=1).double()
    expected = counts[ids] * (max(batch - 1, 0) / counts.sum()) + negatives / len(counts)
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
