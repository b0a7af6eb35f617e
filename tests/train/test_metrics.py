"""Exact metrics against scikit-learn and integer counting."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from recsys_embed.errors import DataError
from recsys_embed.train import BinaryMetrics, exact_auc, ranking_metrics

samples = st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=1, max_size=60)


@given(samples)
def test_auc_counts_pairs_with_ties_as_half(pairs: list[tuple[int, bool]]) -> None:
    scores, labels = np.float32([s for s, _ in pairs]), np.bool_([y for _, y in pairs])
    positive, negative = scores[labels], scores[~labels]
    got = exact_auc(scores, labels)
    if not positive.size or not negative.size:
        assert math.isnan(got)
        return
    wins = sum(Fraction(int(p > n)) + Fraction(int(p == n), 2) for p in positive for n in negative)
    assert got == float(wins / (positive.size * negative.size))


@pytest.mark.parametrize("levels", [3, 1000, None])
def test_auc_equals_sklearn(levels: int | None) -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < 0.25
    scores = (rng.normal(size=labels.size) + labels).astype(np.float32)
    if levels is not None:
        scores = np.round(scores * levels / 8).astype(np.float32)
    assert exact_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_in_chunks_is_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 50, 5000).astype(np.float32), rng.random(5000) < 0.5
    whole = exact_auc(scores, labels)
    monkeypatch.setattr(ranking_metrics, "_CHUNK", 7)
    assert exact_auc(scores, labels) == whole


def test_auc_keeps_logits_apart_that_a_sigmoid_would_round_together() -> None:
    scores = np.float32([40.0, 50.0])
    assert exact_auc(scores, np.bool_([False, True])) == 1.0


def test_batches_add_up_to_the_whole_and_order_does_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, generator=g) * 3
    labels = (torch.rand(1000, generator=g) < torch.sigmoid(logits)).float()
    whole, parts = BinaryMetrics(), BinaryMetrics()
    whole.update(logits, labels)
    for chunk in torch.randperm(1000, generator=g).split(77):
        parts.update(logits[chunk], labels[chunk])
    a, b = whole.compute(), parts.compute()
    assert (a.auc, a.samples, a.positives) == (b.auc, b.samples, b.positives)
    assert a.logloss == pytest.approx(b.logloss, rel=1e-12)
    p = torch.sigmoid(logits.double()).numpy()
    assert a.logloss == pytest.approx(log_loss(labels.numpy(), p), rel=1e-9)
    assert a.calibration == pytest.approx(p.sum() / labels.sum().item(), rel=1e-12)
    assert parts.compute() == b


def test_logloss_is_finite_where_a_probability_rounds_to_one() -> None:
    m = BinaryMetrics()
    m.update(torch.tensor([200.0, -200.0]), torch.tensor([0.0, 1.0]))
    assert m.compute().logloss == 200.0


def test_one_class_has_no_auc() -> None:
    m = BinaryMetrics()
    m.update(torch.tensor([0.0]), torch.tensor([1.0]))
    assert math.isnan(m.compute().auc)


def test_bad_values_are_named() -> None:
    m = BinaryMetrics()
    with pytest.raises(DataError, match="empty"):
        m.compute()
    with pytest.raises(DataError, match="not numbers"):
        m.update(torch.tensor([float("nan")]), torch.tensor([1.0]))
    with pytest.raises(DataError, match="0 or 1"):
        m.update(torch.tensor([0.0]), torch.tensor([-1.0]))
