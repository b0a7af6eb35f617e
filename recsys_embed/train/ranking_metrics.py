"""Exact metrics of a ranking: AUC, AUC within groups, and average precision."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 20


def exact_auc(scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), a tie counting one half.

    Counted in integers, so the result is exact up to one final division, whatever the order of the samples.

    Args:
        scores: ``[n]`` float32, any monotone score (logits keep apart what a sigmoid would round together).
        labels: ``[n]`` bool.

    Returns:
        A number in [0, 1]; NaN where only one class is present, as no pair exists.

    Memory: a sorted copy of the scores (4 bytes each) and 32 MiB of working space.

    >>> exact_auc(np.float32([0, 1, 1, 2]), np.bool_([0, 1, 0, 1]))
    0.875
    """
    return auc_and_average_precision(scores, labels)[0]


def auc_and_average_precision(scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> tuple[float, float]:
    """:func:`exact_auc`, and the area under the precision-recall curve by steps: the mean precision at each positive.

    Samples of one score are retrieved together, so that neither depends on the order of ties.

    >>> auc, precision = auc_and_average_precision(np.float32([0, 1, 1, 2]), np.bool_([0, 1, 0, 1]))
    >>> auc, round(precision, 6)  # 1/1 at score 2, 2/3 at score 1
    (0.875, 0.833333)
    """
    positive, negative = scores[labels], scores[~labels]
    if not positive.size * negative.size:
        return math.nan, 1.0 if positive.size else math.nan
    negative.sort()
    positive.sort()
    twice_wins, precision = 0, 0.0
    for start in range(0, positive.size, _CHUNK):
        part = positive[start : start + _CHUNK]
        below = np.searchsorted(negative, part, "left")
        twice_wins += int(below.sum(dtype=np.int64))
        twice_wins += int(np.searchsorted(negative, part, "right").sum(dtype=np.int64))
        retrieved = positive.size - np.searchsorted(positive, part, "left")
        precision += float((retrieved / (retrieved + negative.size - below)).sum())
    return twice_wins / (2 * positive.size * negative.size), precision / positive.size


def grouped_auc(scores: NDArray[np.float32], labels: NDArray[np.bool_], groups: NDArray[np.int64]) -> float:
    """AUC within each group, such as a user's rows or those of a query, averaged by the groups' rows.

    Groups of one class have no pairs and are left out (Zhou et al., "Deep Interest Network", 2018, section 6.2).

    Args:
        scores: ``[n]`` float32.
        labels: ``[n]`` bool.
        groups: ``[n]``, equal numbers for rows of one group.

    Returns:
        A number in [0, 1]; NaN where no group has both classes.

    >>> grouped_auc(np.float32([1, 2, 2, 1, 5]), np.bool_([0, 1, 0, 1, 1]), np.int64([7, 7, 8, 8, 9]))
    0.5
    """
    if not scores.size:
        return math.nan
    order = np.lexsort((scores, groups))
    scores, labels, groups = scores[order], labels[order], groups[order]
    new_group = np.append(True, groups[1:] != groups[:-1])
    new_tie = new_group | np.append(True, scores[1:] != scores[:-1])
    starts, ties = np.flatnonzero(new_group), np.flatnonzero(new_tie)
    sizes = np.diff(np.append(starts, len(scores)))
    positives = np.add.reduceat(labels.astype(np.int64), starts)
    # Twice the mean rank, from 1, of the samples of one score within their group.
    tie_sizes = np.diff(np.append(ties, len(scores)))
    first = ties - np.repeat(starts, sizes)[ties]
    twice_rank = np.repeat(2 * first + tie_sizes + 1, tie_sizes)
    twice_sum = np.add.reduceat(np.where(labels, twice_rank, 0), starts)
    pairs = positives * (sizes - positives)
    both = pairs > 0
    if not both.any():
        return math.nan
    wins = (twice_sum - positives * (positives + 1))[both] / 2
    return float((wins / pairs[both] * sizes[both]).sum() / sizes[both].sum())
