"""Frequency curves say what counts say, from a few dozen bins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.data import make_synthetic, open_dataset
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.planning import FrequencyCurve, curves_from

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=300)


@given(COUNTS)
def test_a_curve_keeps_what_counts_sum_to(counts: list[int]) -> None:
    curve = FrequencyCurve.from_counts(counts)
    assert curve.n == len(counts)
    assert curve.total == sum(counts)
    assert curve.seen == sum(c > 0 for c in counts)
    assert curve.mass.sum() == pytest.approx(1.0 if sum(counts) else 0.0)
    assert (np.diff(curve.share) <= 1e-15).all(), "bins fall in frequency"


@given(COUNTS)
def test_coverage_lies_on_the_counts_where_bins_are_single_ids(counts: list[int]) -> None:
    curve = FrequencyCurve.from_counts(counts)
    falling = sorted(counts, reverse=True)
    for k in range(1, min(8, len(counts)) + 1):
        assert curve.coverage(k) == pytest.approx(sum(falling[:k]) / max(1, sum(counts)))


@given(st.integers(1, 5000), st.floats(0, 2))
def test_a_zipf_curve_is_the_sum_it_stands_for(n: int, exponent: float) -> None:
    mass = np.arange(1, n + 1) ** -exponent
    exact = np.cumsum(mass / mass.sum())
    curve = FrequencyCurve.zipf(n, exponent)
    assert curve.n == n
    for k in {1, 2, 10, n // 2 or 1, n}:
        if k <= n:
            assert curve.coverage(k) == pytest.approx(exact[k - 1], abs=0.02)


def test_a_billion_ids_are_some_dozen_bins() -> None:
    curve = FrequencyCurve.zipf(10**9)
    assert curve.n == 10**9
    assert len(curve.ids) < 80


def test_head_is_the_inverse_of_coverage() -> None:
    counts = np.random.default_rng(0).zipf(1.4, 4000).clip(max=10**6)
    curve = FrequencyCurve.from_counts(counts)
    for share in (0.1, 0.5, 0.9, 1.0):
        assert curve.coverage(curve.head(share)) >= share - 1e-9
        assert curve.coverage(curve.head(share) - 1) <= share + 1e-9


def test_ids_numbered_by_frequency_are_recognised_whatever_id_0_is() -> None:
    assert FrequencyCurve.from_counts([3, 9, 5, 1]).ranked
    assert not FrequencyCurve.from_counts([3, 1, 5, 9]).ranked
    assert not FrequencyCurve.zipf(10).ranked


def test_tensors_and_lists_are_counts_alike() -> None:
    curves = [FrequencyCurve.from_counts(c) for c in ([4, 2], torch.tensor([4, 2]), np.array([2.0, 4.0]))]
    assert [c.mass.tolist() for c in curves] == [curves[0].mass.tolist()] * 3


def test_a_curve_passes_through_the_coverage_it_is_made_from() -> None:
    drawn = np.random.default_rng(1).poisson(30_000 * np.arange(1, 20_001) ** -1.05)
    counts = np.sort(drawn[drawn > 0])[::-1]
    total = int(counts.sum())
    exact = FrequencyCurve.from_counts(counts)
    known = {str(k): float(counts[:k].sum() / total) for k in (1, 10, 100, 1000, 10_000)}
    curve = FrequencyCurve.from_coverage(known, len(counts), int((counts == 1).sum()), total)
    assert curve.n == len(counts)
    for k, share in known.items():
        assert curve.coverage(int(k)) == pytest.approx(share, abs=1e-3)
    for k in (3, 30, 300, 3000):
        assert curve.coverage(k) == pytest.approx(exact.coverage(k), abs=0.03)


def test_resizing_adds_ids_that_never_occur_or_merges_the_rarest() -> None:
    curve = FrequencyCurve.from_counts([50, 30, 10, 10])
    more, less = curve.resized(10), curve.resized(3)
    assert (more.n, more.seen, more.coverage(4)) == (10, 4, pytest.approx(1.0))
    assert less.n == 3
    assert less.coverage(2) == pytest.approx(0.8)
    assert less.mass.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrequencyCurve.from_counts([]), "one number per id"),
        (lambda: FrequencyCurve.from_counts([[1, 2]]), "one number per id"),
        (lambda: FrequencyCurve.from_counts([1, -1]), "not negative"),
        (lambda: FrequencyCurve.from_counts([1.0, float("nan")]), "finite"),
        (lambda: FrequencyCurve.from_counts(["a"]), "one number per id"),
        (lambda: FrequencyCurve.zipf(0), "n >= 1"),
        (lambda: FrequencyCurve.zipf(5, -1), "exponent"),
        (lambda: FrequencyCurve(np.ones(2), np.ones(2), 5), "sum to 1"),
        (lambda: FrequencyCurve(np.ones(2), np.ones(3) / 3, 5), "one length"),
        (lambda: FrequencyCurve(np.ones(2), np.ones(2) / 2, float("nan")), "`total`"),
        (lambda: FrequencyCurve.from_coverage({1: 0.9, 2: 0.5}, 10), "rise with k"),
        (lambda: curves_from(5), "an opened data set or its folder"),
        (lambda: curves_from({"C1": [1, -2], "C2": "x"}), "(?s)2 faults.*'C1'.*'C2'"),
    ],
)
def test_what_is_no_curve_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_data_folders_open_data_and_their_statistics_give_the_same_curves(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    make_synthetic(folder, 4000, seed=0)
    data = open_dataset(folder)
    schema = data.schema(8)
    exact, coarse = curves_from(data), curves_from(folder)
    assert set(exact) == set(coarse) == set(schema.names)
    assert {k: c.n for k, c in curves_from(json.loads((folder / "stats.json").read_text())).items()} == {
        s.name: s.num_embeddings for s in schema
    }
    ids = data.load("train").ids
    for i, spec in enumerate(schema):
        counts = torch.bincount(ids[:, i].long(), minlength=spec.num_embeddings)
        counted = FrequencyCurve.from_counts(counts)
        assert exact[spec.name].n == spec.num_embeddings
        assert exact[spec.name].ranked
        assert exact[spec.name].mass == pytest.approx(counted.mass)
        for k in (1, 10, 100):
            assert coarse[spec.name].coverage(k) == pytest.approx(counted.coverage(min(k, counted.n)), abs=0.03)


def test_a_folder_without_statistics_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no statistics of a data folder"):
        curves_from(tmp_path)


@pytest.mark.parametrize("written", [False, True])
def test_every_fault_of_statistics_is_named_with_its_field(tmp_path: Path, written: bool) -> None:
    good = {"distinct": 5, "num_embeddings": 9, "kept": 4, "seen_once": 1, "coverage": {"1": 0.5}, "later": 1}
    fields = {
        "C1": good,
        "C2": {"num_embeddings": 0, "distinct": 5},
        "C3": {"distinct": 5},
        "C4": {**good, "coverage": {"one": 0.5}, "oov_rate": {"test": "many"}},
        "C5": {**good, "coverage": {"1": 0.5, "2": 0.4}},
        "C6": 7,
    }
    stats = {"splits": {"train": {"rows": 8}}, "fields": fields}
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    with pytest.raises(DataError if written else ConfigError) as caught:
        curves_from(tmp_path if written else stats)
    assert str(caught.value).splitlines()[1:] == [
        "  - `num_embeddings` must be an integer in [1, 1152921504606846976]; got 0 (field 'C2')",
        "  - `num_embeddings` is missing (field 'C3')",
        "  - 2 faults in field 'C4':",
        "      - `oov_rate` must be numbers by split; got {'test': 'many'}",
        "      - `coverage` must be shares by number of ids; got {'one': 0.5}",
        "  - `coverage` must be shares in [0, 1] that rise with k; got {1.0: 0.5, 2.0: 0.4, 4.0: 0.875, 5.0: 1.0} "
        "(field 'C5')",
        "  - expected values by name; got int (field 'C6')",
    ]
