"""A data set of a contributor's own, in one file: it trains, is planned for, reported, compared and searched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from recsys_embed import memory_report, plan_for_budget
from recsys_embed.compress import table_counts
from recsys_embed.errors import ConfigError
from recsys_embed.models import build_model
from recsys_embed.plan import Plan
from recsys_embed.search import DnisSearch, DnisSettings, PepSearch, PepSettings, run_search
from recsys_embed.train import TrainConfig, run_training
from recsys_embed.train.compare import Comparison, run_comparison
from tests.extend.parquet_source import ParquetSource

COLUMNS = {"label": "clicked", "numeric": ("price", "age"), "categorical": ("item", "city", "model")}
CONFIG = TrainConfig(model="deepfm", model_args={"hidden": [16]}, embedding_dim=4, batch_size=256, learning_rate=0.02)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ids of integers, strings and floats, some missing; clicks follow the item and the city."""
    folder, rng, found = tmp_path_factory.mktemp("parquet"), np.random.default_rng(0), {}
    like_item, like_city = rng.normal(0, 1.5, 400), rng.normal(0, 1.5, 30)
    for split, rows in (("train", 6000), ("valid", 2000), ("test", 2000)):
        item, city = np.minimum(rng.zipf(1.4, rows) - 1, 399), rng.integers(0, 30, rows)
        odds = like_item[item] + like_city[city]
        model = rng.integers(0, 9, rows) / 4
        model[rng.random(rows) < 0.1] = np.nan
        table = pl.DataFrame(
            {
                "age": rng.integers(18, 90, rows),
                "city": [None if rng.random() < 0.05 else f"city {c}" for c in city],
                "clicked": (rng.random(rows) < 1 / (1 + np.exp(-odds))).astype(np.int64),
                "item": item.astype(np.int64) * 1_000_003 - 7,
                "model": model,
                "price": rng.random(rows),
            }
        )
        found[split] = folder / f"{split}.parquet"
        table.write_parquet(found[split], row_group_size=500)
    return found


def test_ids_are_ranks_of_training_values(files: dict[str, Path]) -> None:
    data = ParquetSource(files, **COLUMNS)
    for column, name in enumerate(COLUMNS["categorical"]):
        known = [v for v in pl.read_parquet(files["train"])[name].to_list() if v is not None and v == v]
        ranked = [value for value, _ in sorted(Counter(known).items(), key=lambda found: (-found[1], found[0]))]
        for split in data.splits:
            given = pl.read_parquet(files[split])[name].to_list()
            wanted = [ranked.index(v) + 1 if v in ranked else 0 for v in given]
            ids = torch.cat([b.ids[:, column] for b in data.batches(split, 999, shuffle=False)])
            assert ids.tolist() == wanted
        counts = Counter(known)
        assert data.counts(name).tolist()[1:] == [counts[v] for v in ranked]
        assert int(data.counts(name).sum()) == data.splits["train"]


def test_it_trains_from_memory_and_from_files_and_goes_on(files: dict[str, Path], tmp_path: Path) -> None:
    found = run_training(CONFIG, ParquetSource(files, **COLUMNS), folder=tmp_path / "run", show_progress=False)
    assert found.result.test.auc > 0.7
    again = run_training(CONFIG, ParquetSource(files, **COLUMNS), folder=tmp_path / "run", resume=True)
    assert again.result.test == found.result.test
    streamed = ParquetSource(files, **COLUMNS, memory_limit=0)
    batches = list(streamed.batches("train", 256, seed=1))
    rest = list(streamed.batches("train", 256, seed=1, start_batch=5))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(rest, batches[5:], strict=True))
    assert run_training(CONFIG, streamed, show_progress=False).result.test.auc > 0.7


def test_it_is_planned_for_reported_and_counted(files: dict[str, Path]) -> None:
    data = ParquetSource(files, **COLUMNS)
    schema = data.schema(8)
    plan = plan_for_budget(schema, "4KiB", stats=data)
    assert plan.notes.statistics == "counted"
    assert plan.footprint(schema).serve <= 4096
    table = memory_report(plan, schema=schema, stats=data).tables[0]
    assert table.stats.field.distinct == int((data.counts("item") > 0).sum())
    model = build_model("dnn", schema, Plan.full(schema), num_dense=data.num_dense, hidden=(4,))
    assert {name.rpartition("/")[2] for name in table_counts(model, data)} == set(schema.names)
    planned = run_training(CONFIG.replace(method="planned", ratio=4.0), data, show_progress=False)
    assert planned.footprint.serve <= planned.full_bytes / 4


def test_it_is_compared_and_searched_also_on_a_portion(files: dict[str, Path], tmp_path: Path) -> None:
    data = ParquetSource(files, **COLUMNS)
    comparison = Comparison(models=("fm",), methods=("hash",), ratios=(4.0,), train=CONFIG.replace(model_args={}))
    rows = run_comparison(comparison, data, tmp_path / "compare", show_progress=False)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    config = CONFIG.replace(model="dnn", ratio=4.0)
    for kind, settings in ((DnisSearch, DnisSettings(held_out=0.3, blocks=2)), (PepSearch, PepSettings(check_every=1))):
        found = run_search(kind, config, data.portion(1, 2), settings, show_progress=False)
        assert found.footprint.serve <= found.full_bytes / 4


def test_what_is_no_data_set_is_refused_by_name() -> None:
    class Half:
        splits, num_dense = {"train": 3}, 1

    with pytest.raises(ConfigError, match=r"training needs .*; got Half, which lacks digest, schema, batches"):
        run_training(CONFIG, Half())
    with pytest.raises(ConfigError, match=r"a search needs .*; got str, which lacks splits, num_dense"):
        run_search(DnisSearch, CONFIG, "data/criteo", DnisSettings())
