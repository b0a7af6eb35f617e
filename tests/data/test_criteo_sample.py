"""Facts known about a sample of the real file, where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recsys_embed.data import CriteoOptions, SplitRule, convert_criteo, open_dataset
from recsys_embed.data.splits import fraction

ROOT = os.environ.get("RECSYS_EMBED_DATA", "")
SAMPLE = Path(ROOT) / "criteo_kaggle" / "criteo_days1to6.tsv.gz"
pytestmark = pytest.mark.skipif(not ROOT or not SAMPLE.exists(), reason="RECSYS_EMBED_DATA is not set")

DISTINCT = {
    "I1": 153, "I2": 2826, "I5": 26240, "I10": 9,
    "C1": 572, "C2": 521, "C3": 53627, "C4": 28517, "C5": 143, "C6": 12, "C7": 8295, "C8": 273, "C9": 3, "C10": 12982,
    "C11": 3979, "C12": 49029, "C13": 2903, "C14": 26, "C15": 5624, "C16": 40532, "C17": 10, "C18": 2734, "C19": 1296,
    "C20": 4, "C21": 45519, "C22": 13, "C23": 14, "C24": 13279, "C25": 53, "C26": 10112,
}  # fmt: skip
ONCE = {"C1": 274, "C3": 47688, "C9": 0, "C13": 228, "C21": 39283, "C26": 6068}
MISSING = {"C1": 0.0, "C3": 0.035, "C6": 0.123, "C19": 0.441, "C22": 0.761, "C26": 0.441}


def test_whole_sample(tmp_path: Path) -> None:
    none = SplitRule(valid=fraction("0", "valid"), test=fraction("0", "test"))
    report = convert_criteo(SAMPLE, tmp_path / "out", CriteoOptions(min_count=1, split=none))
    assert report.rows == {"train": 117_335}
    assert report.quarantined == 0
    data = open_dataset(tmp_path / "out", verify=True)
    stats = data.stats
    assert stats["splits"]["train"]["click_rate"] == pytest.approx(0.2562, abs=5e-5)
    for name, count in DISTINCT.items():
        if name.startswith("C"):
            assert stats["fields"][name]["distinct"] == count, name
            assert data.schema(16)[name].num_embeddings == count + 1
    for name, count in ONCE.items():
        assert stats["fields"][name]["seen_once"] == count, name
    for name, rate in MISSING.items():
        assert stats["fields"][name]["missing_rate"]["train"] == pytest.approx(rate, abs=5.1e-4), name
    assert sum(stats["fields"][f"C{i}"]["distinct"] for i in range(1, 27)) == 280_072
    assert sum(stats["fields"][f"C{i}"]["seen_once"] for i in range(1, 27)) == 211_405
    dense = data.load("train").dense
    assert len(dense[:, 0].unique()) <= DISTINCT["I1"]


def test_last_sixth_in_order_tests(tmp_path: Path) -> None:
    report = convert_criteo(SAMPLE, tmp_path / "out")
    assert report.rows == {"train": 86_045, "valid": 11_734, "test": 19_556}
    data = open_dataset(tmp_path / "out")
    assert sum(len(b.label) for b in data.batches("train", 4096)) == 86_045
