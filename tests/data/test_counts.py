"""Counting and numbering values, against plain dictionaries."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import random_rows, write
from hypothesis import given
from hypothesis import strategies as st

from recsys_embed.data import CriteoOptions, convert_criteo, open_dataset
from recsys_embed.data.criteo import encode
from recsys_embed.data.field_counts import FieldCounter, FieldCounts
from recsys_embed.data.random_bits import mix64, random_bits
from recsys_embed.data.splits import SplitRule, fraction
from recsys_embed.data.vocab import IdTable, Vocabulary
from recsys_embed.errors import ConfigError

values64 = st.integers(0, 2**64 - 1)


def splitmix64(x: int) -> int:
    """The finaliser in Python integers."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


@given(st.lists(values64, min_size=1))
def test_mix64_is_splitmix64(xs: list[int]) -> None:
    assert mix64(np.array(xs, np.uint64)).tolist() == [splitmix64(x) for x in xs]


def test_shares_in_order_are_whole_rows_nearest_to_them() -> None:
    rule = SplitRule(valid=fraction("1/10", "valid"), test=fraction("1/6", "test"))
    # 11.7 and 19.5 of 117 rows; 11.5 and 19.17 of 115.
    for total, wanted in ((117, [85, 12, 20]), (115, [84, 12, 19])):
        assert np.bincount(rule.codes(total, np.arange(total), 0)).tolist() == wanted


@given(values64, st.integers(0, 1000), st.integers(0, 50), st.integers(0, 50))
def test_streams_can_be_cut_anywhere(key: int, start: int, one: int, two: int) -> None:
    whole = random_bits(key, start, one + two)
    assert whole.tolist() == [*random_bits(key, start, one).tolist(), *random_bits(key, start + one, two).tolist()]


@given(
    st.lists(st.lists(st.one_of(st.none(), st.integers(0, 30), values64), max_size=30), max_size=6), st.integers(1, 40)
)
def test_counts_in_pieces(pieces: list[list[int | None]], max_rows: int) -> None:
    counter = FieldCounter(max_rows=max_rows)
    for piece in pieces:
        missing = np.array([v is None for v in piece], bool)
        counter.add(np.array([v or 0 for v in piece], np.uint64), missing)
    result = counter.result()
    want = Counter(v for piece in pieces for v in piece)
    assert result.missing == want.pop(None, 0)
    assert dict(zip(result.values.tolist(), result.counts.tolist(), strict=True)) == want
    assert result.level == 0


def test_sampled_counts_estimate_the_number_of_values() -> None:
    counter = FieldCounter(max_rows=10_000, max_distinct=2_000)
    rng = np.random.default_rng(1)
    for _ in range(20):
        counter.add(rng.integers(0, 80_000, 10_000, dtype=np.uint32), np.zeros(10_000, bool))
    result = counter.result()
    expected = 80_000 * (1 - np.exp(-200_000 / 80_000))
    assert result.level >= 5
    assert len(result.values) <= 2_000
    assert len(result.values) << result.level == pytest.approx(expected, rel=0.15)
    assert result.counts.mean() == pytest.approx(200_000 / expected, rel=0.1)


@given(st.sets(values64, max_size=60), st.lists(values64, max_size=60), st.sampled_from([np.uint32, np.uint64]))
def test_lookup(known: set[int], asked: list[int], kind: type[np.unsignedinteger]) -> None:
    top = int(np.iinfo(kind).max)
    keys = sorted({k & top for k in known})
    ids = {k: i + 1 for i, k in enumerate(keys)}
    table = IdTable.build(np.array(keys, kind), np.arange(1, len(keys) + 1, dtype=np.int32))
    questions = [a & top for a in asked] + keys + [0, top]
    assert table(np.array(questions, kind)).tolist() == [ids.get(q, 0) for q in questions]


def test_lookup_when_all_keys_share_their_leading_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from recsys_embed.data import vocab

    monkeypatch.setattr(vocab, "_scramble", lambda keys: keys)
    keys = np.arange(5000, dtype=np.uint64)
    table = IdTable.build(keys, np.arange(1, 5001, dtype=np.int32))
    assert table.longest == 5000
    assert table(np.array([0, 4999, 5000, 17, 2**64 - 1], np.uint64)).tolist() == [1, 5000, 0, 18, 0]


def test_wide_values_are_unknown_to_a_narrow_vocabulary() -> None:
    counts = FieldCounts(np.array([0, 7], np.uint32), np.array([5, 5]), missing=0)
    vocab = Vocabulary.from_counts("C1", counts, min_count=1)
    asked = np.array([7, 7 + 2**32, 2**32, 0], np.uint64)
    assert vocab.encode(asked, np.zeros(4, bool)).tolist() == [2, 0, 0, 1]


def test_a_vocabulary_beyond_the_memory_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_DISTINCT_COST", 10 << 20)
    text = write(tmp_path / "a.tsv", random_rows(300, 1, values=10**6))
    none = SplitRule(valid=fraction(0, "valid"), test=fraction(0, "test"))
    with pytest.raises(ConfigError, match=r"field C1 has more than \d+ distinct values.*--max-memory.*--ids raw"):
        convert_criteo(text, tmp_path / "out", CriteoOptions(split=none))
    convert_criteo(text, tmp_path / "out", CriteoOptions(ids="raw", split=none))
    feature = open_dataset(tmp_path / "out").manifest.features[0]
    assert feature.estimated
    assert 100 < feature.num_embeddings < 900
