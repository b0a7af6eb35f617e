"""Metrics of rankings against their definitions, pair by pair and threshold by threshold."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.train.ranking_metrics import auc_and_average_precision, grouped_auc

ROWS = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), max_size=30)


def pairwise(rows: list[tuple[int, bool, int]]) -> float:
    pairs = [(a, b) for a, positive, _ in rows if positive for b, other, _ in rows if not other]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs) if pairs else math.nan


@given(ROWS)
def test_by_their_definitions(rows: list[tuple[int, bool, int]]) -> None:
    scores, labels = np.float32([s for s, _, _ in rows]), np.array([y for _, y, _ in rows], bool)
    auc, precision = auc_and_average_precision(scores, labels)
    np.testing.assert_allclose(auc, pairwise(rows), rtol=1e-12)
    positives, steps = int(labels.sum()), 0.0
    for threshold in sorted({s for s, _, _ in rows}, reverse=True):
        hits = sum(y for s, y, _ in rows if s == threshold)
        taken = [y for s, y, _ in rows if s >= threshold]
        steps += hits / positives * sum(taken) / len(taken) if positives else 0.0
    np.testing.assert_allclose(precision, steps if positives else math.nan, rtol=1e-12)
    total = weight = 0.0
    for group in {g for _, _, g in rows}:
        own = [row for row in rows if row[2] == group]
        if not math.isnan(pairwise(own)):
            total, weight = total + len(own) * pairwise(own), weight + len(own)
    found = grouped_auc(scores, labels, np.array([g for _, _, g in rows], np.int64))
    np.testing.assert_allclose(found, total / weight if weight else math.nan, rtol=1e-12)
