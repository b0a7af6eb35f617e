"""Collisions, expected and measured, against each other and against brute force; coverage against sorted counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.errors import ConfigError
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.report.memory import memory_report
from recsys_embed.report.memory.collisions import expected_collisions, measured_collisions, row_keys
from recsys_embed.report.memory.stats import FieldStats, read_stats_of

METHODS = rse.list_methods()
IDS = 4000


def zipf_counts(n: int = IDS, exponent: float = 1.1, shuffled: bool = False) -> torch.Tensor:
    counts = (1e6 / torch.arange(1, n + 1) ** exponent).ceil()
    return counts[torch.randperm(n, generator=torch.Generator().manual_seed(0))] if shuffled else counts


def program_of(method: str, seed: int = 0, rows: int = IDS, **more: Any):
    config_cls = rse.get_method(method).config_cls
    spec = FeatureSpec("C1", rows, 16)
    if method == "full":
        return config_cls.from_params({}).program(spec)
    return config_cls.for_budget(spec, rows * 16, seed=seed, **more).program(spec)


@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
def test_keys_are_equal_exactly_where_vectors_are(info: rse.MethodInfo) -> None:
    """The oracle is the vectors themselves: random weights tell apart whatever reads other rows or signs."""
    options = {} if info.name == "full" else {"budget": 700 * 16}
    module = rse.make_embedding(info.name, 700, 8, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    keys = row_keys(module.program, module.kernel.index)(torch.arange(700))
    vectors = module.materialize().round(decimals=10)
    _, by_key = keys.unique(return_inverse=True)
    _, by_vector = vectors.unique(dim=0, return_inverse=True)
    for mine, theirs in ((by_key, by_vector), (by_vector, by_key)):
        pairs = torch.stack([mine, theirs]).unique(dim=1)
        assert pairs.shape[1] == int(mine.max()) + 1


@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
def test_expected_is_the_mean_of_measured(info: rse.MethodInfo) -> None:
    stats = FieldStats.of_counts("C1", zipf_counts())
    seeds = range(1 if info.name == "full" else 6)
    found = [measured_collisions(row_keys(program_of(info.name, seed)), stats) for seed in seeds]
    said = expected_collisions(program_of(info.name), IDS, stats)
    assert said.ids == pytest.approx(np.mean([c.ids for c in found]), abs=0.02)
    assert said.traffic is not None
    assert said.mixed == pytest.approx(np.mean([c.mixed for c in found]), abs=0.03)
    # One id of many lookups falls into a shared row or not; the mean over salts is what is expected.
    spread = 0.02 + 3 * float(np.std([c.traffic for c in found])) / len(found) ** 0.5
    assert said.traffic == pytest.approx(np.mean([c.traffic for c in found]), abs=spread)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hash", {"num_buckets": 500}),
        ("hash", {"num_buckets": 500, "sign": True}),
        ("hash", {"num_buckets": 500, "hash": "mod"}),
        ("hash", {"num_buckets": 3000, "hash": "mod"}),
        ("multihash", {"num_buckets": 40, "num_frequent": 100}),
        ("multihash", {"num_buckets": 25, "preset": "thinc"}),
        ("multihash", {"num_buckets": 60}),
        ("compositional", {"num_collisions": 7, "affine": True}),
        ("compositional", {"num_collisions": 4, "combine": "concat"}),
        ("robe", {"num_elements": 900}),
        ("robe", {"num_elements": 900, "sign": True}),
        ("adaptive", {"num_frequent": 500, "num_buckets": 200}),
        ("freqcut", {"num_frequent": 1000}),
        ("memcom", {"num_buckets": 100}),
        ("unified", {"num_buckets": 30, "num_hashes": 2, "dim": 4}),
    ],
)
def test_expected_rates_of_options(method: str, options: dict[str, Any]) -> None:
    spec = FeatureSpec("C1", IDS, 16)
    config_cls = rse.get_method(method).config_cls
    stats = FieldStats.of_counts("C1", zipf_counts())
    programs = [config_cls.from_params({**options, "seed": seed}).program(spec) for seed in range(5)]
    found = [measured_collisions(row_keys(p), stats) for p in programs]
    assert expected_collisions(programs[0], IDS, stats).ids == pytest.approx(np.mean([c.ids for c in found]), abs=0.03)
    # Of a digit the formula knows how many ids fall together, not which: there, frequent ids with rare ones.
    near = 0.08 if options.get("hash") == "mod" else 0.03
    assert expected_collisions(programs[0], IDS, stats).mixed == pytest.approx(
        np.mean([c.mixed for c in found]), abs=near
    )


def test_ids_that_own_a_row_are_no_neighbours() -> None:
    config = rse.get_method("adaptive").config_cls.from_params({"num_frequent": 3900, "num_buckets": 90})
    said = expected_collisions(config.program(FeatureSpec("C1", IDS, 16)), IDS).ids
    assert said == pytest.approx((1 - (1 - 1 / 90) ** 99) * 100 / IDS)


def test_measured_by_brute_force() -> None:
    counts = torch.tensor([5, 0, 3, 2, 7, 1])
    program = rse.get_method("hash").config_cls.from_params({"num_buckets": 3}).program(FeatureSpec("C1", 6, 4))
    rows = program.row_lookups[0].transform.rows(torch.arange(6)).tolist()
    seen = [i for i in range(6) if counts[i] > 0]
    shared = [i for i in seen if any(rows[i] == rows[j] for j in seen if j != i)]
    found = measured_collisions(row_keys(program), FieldStats.of_counts("C1", counts))
    assert found.ids == pytest.approx(len(shared) / len(seen))
    assert found.traffic == pytest.approx(float(sum(counts[i] for i in shared) / counts.sum()))
    others = [sum(counts[j] for j in seen if j != i and rows[j] == rows[i]) for i in range(6)]
    mixed = sum(counts[i] * others[i] / (counts[i] + others[i]) for i in seen)
    assert found.mixed == pytest.approx(float(mixed / counts.sum()))


def test_a_models_own_index_buffers_are_read() -> None:
    """Frequent ids that are numbered anyhow own rows once the module knows them."""
    counts = zipf_counts(shuffled=True)
    schema = Schema([FeatureSpec("C1", IDS, 16)])
    config = rse.get_method("adaptive").config_cls.from_params(
        {"num_frequent": 500, "num_buckets": 50, "order": "counts"}
    )
    coll = rse.EmbeddingCollection(schema, Plan({"C1": config}))
    before = memory_report(coll, stats={"C1": counts}).tables[0].stats
    after = memory_report(coll.assign_({"C1": counts}), stats={"C1": counts}).tables[0].stats
    assert before is not None
    assert after is not None
    assert before.measured.traffic > 0.5
    assert after.measured.traffic < 0.3
    assert after.measured.traffic == pytest.approx(after.expected.traffic, abs=0.01)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300).filter(any))
def test_coverage_is_that_of_sorted_counts(counts: list[int]) -> None:
    stats = FieldStats.of_counts("C1", counts)
    ordered = np.sort(counts)[::-1]
    assert stats.distinct == np.count_nonzero(counts)
    assert stats.seen_once == counts.count(1)
    for k, share in stats.coverage():
        if k <= 8 or k == stats.distinct:  # other ranks lie within bins of the curve
            assert share == pytest.approx(ordered[:k].sum() / ordered.sum())
    shares = [share for _, share in stats.coverage()]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_raw_ids_and_their_counts() -> None:
    ids = np.array([2**62, -5, 17, 2**40])
    stats = read_stats_of({"C1": (ids, np.array([4, 3, 2, 1]))})["C1"]
    schema = Schema([FeatureSpec("C1", 4, 16, ids="raw")])
    plan = Plan({"C1": rse.get_method("hash").config_cls.from_params({"num_buckets": 1})})
    table = memory_report(plan, schema=schema, stats={"C1": stats}).tables[0]
    assert table.stats.measured.ids == 1.0


def test_stats_of_a_folder_as_json() -> None:
    fields = {
        "C1": {
            "distinct": 50,
            "seen_once": 10,
            "num_embeddings": 51,
            "kept": 50,
            "coverage": {"1": 0.2, "10": 0.6, "100": 1.0},
            "oov_rate": {"train": 0.0, "valid": 0.125},
            "estimated": False,
        }
    }
    found = {"splits": {"train": {"rows": 1000}}, "fields": fields}
    report = memory_report(Schema([FeatureSpec("C1", 51, 4)]), stats=found)
    stats = report.tables[0].stats
    assert stats.field.share(10) == pytest.approx(0.6, abs=0.02)
    assert stats.field.unseen["valid"] == 0.125
    assert stats.measured is None
    assert "unseen valid" in str(report)
    assert "12.5 %" in str(report)


def test_curves_and_fields_are_taken_as_they_are() -> None:
    curve = FrequencyCurve.zipf(1000)
    stats = read_stats_of({"a": curve, "b": FieldStats("b", curve)})
    assert stats["a"].curve is curve
    assert stats["b"].distinct == 1000


def test_names_match_with_and_without_their_collection() -> None:
    from recsys_embed.models import build_model

    schema = Schema([FeatureSpec("C1", 100, 4), FeatureSpec("C2", 100, 4)])
    model = build_model("deepfm", schema, Plan.full(schema), num_dense=1)
    report = memory_report(model, stats={"C1": torch.ones(100)})
    assert report["embedding/C1"].stats is not None
    assert report["linear/C1"].stats is not None
    assert report["embedding/C2"].stats is None


def test_features_of_a_data_set_that_match_no_table_are_noted() -> None:
    one = {"distinct": 50, "num_embeddings": 51, "coverage": {"1": 0.2, "100": 1.0}}
    stats = {"splits": {"train": {"rows": 1000}}, "fields": {"C1": one, "C9": one}}
    report = memory_report(Schema([FeatureSpec("C1", 100, 4)]), stats=stats)
    assert report["C1"].stats is not None
    assert any("match no table: C9" in n for n in report.notes)


@pytest.mark.parametrize(
    "stats", [3, {"C1": [1, -2]}, {"C1": [0, 0]}, {"C1": [float("nan")]}, {"C1": ["a"]}, {"C1": ([1.5], [1])}]
)
def test_other_statistics_are_refused(stats: Any) -> None:
    with pytest.raises(ConfigError, match=r"stats|statistics|counts must"):
        memory_report(Schema([FeatureSpec("C1", 100, 4)]), stats=stats)
