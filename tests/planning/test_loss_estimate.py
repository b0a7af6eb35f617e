"""The loss model against simulation, its limits, and the order of what was measured."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys_embed import FeatureSpec, Plan, Schema, get_method, list_methods
from recsys_embed.core.program import Hash, Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table, Transform
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.planning import FrequencyCurve, curve_terms, curves_from, plan_losses
from recsys_embed.planning.loss_estimate import BETWEEN, CurveTerms, column_spans, estimate_loss, load_of_others

ROOT = Path(__file__).resolve().parents[2]
NAMES = [m.name for m in list_methods()]


def loss_of(program: LookupProgram, terms: CurveTerms, dim: int = 16) -> float:
    return float(estimate_loss(terms, [column_spans(program, terms)], dim)[0])


def table_of(rows: int, transform: Transform, width: int = 16, n: int = 1000) -> LookupProgram:
    spec = FeatureSpec("C1", n, width)
    return LookupProgram((Table("weight", rows, width, Initializer.plain(spec)),), (RowLookup("weight", transform),))


@pytest.mark.parametrize("rows", [3, 30, 300, 3000])
@pytest.mark.parametrize("exponent", [0.0, 1.1])
def test_a_hash_keeps_what_simulated_buckets_keep(rows: int, exponent: float) -> None:
    n = 600
    share = np.arange(1, n + 1) ** -exponent
    share /= share.sum()
    terms = CurveTerms(FrequencyCurve.from_counts(np.round(share * 1e9)))
    rng, kept = np.random.default_rng(0), np.zeros(n)
    draws = 400
    for _ in range(draws):
        bucket = rng.integers(0, rows, n)
        kept += share / np.bincount(bucket, share, rows)[bucket]
    expected = float((share * (1 - kept / draws)).sum())
    predicted = loss_of(table_of(rows, Hash(1, rows), n=n), terms)
    assert predicted == pytest.approx(expected, abs=0.01)


def test_shared_tables_are_charged_for_other_features_by_their_share_of_harm() -> None:
    n, rows = 400, 200
    terms = CurveTerms(FrequencyCurve.zipf(n, 1.0, total=1e9))
    table = Table("pool", rows, 16, Initializer("uniform", 0.1), shared=True)
    parts = column_spans(LookupProgram((table,), (RowLookup("pool", Hash(1, rows)),)), terms)
    losses = [
        estimate_loss(terms, [parts], 16, {"pool": load_of_others(terms, members * terms.load)})[0]
        for members in (1, 2, 10)
    ]
    assert losses[0] == pytest.approx(loss_of(table_of(rows, Hash(1, rows), n=n), terms))
    assert losses[0] < losses[1] < losses[2]
    # A strange id is a part of an own one, so ten features do less harm than as many rows fewer.
    assert losses[2] < loss_of(table_of(rows // 10, Hash(1, rows // 10), n=n), terms)
    assert 0 < BETWEEN < 1


def test_ids_without_a_row_lose_all_and_ids_of_their_own_nothing() -> None:
    terms = CurveTerms(FrequencyCurve.from_counts([60, 30, 10]))
    everything = float(terms.value.sum())
    assert loss_of(table_of(3, MixedRadixDigit()), terms) == pytest.approx(0.0, abs=1e-12)
    absent = LookupProgram(
        (Table("weight", 10, 16, Initializer("constant")),),
        (RowLookup("weight", Hash(1, 10, num_frequent=3, frequent_absent=True)),),
    )
    assert loss_of(absent, terms) == pytest.approx(everything)


@dataclass(frozen=True)
class Odd(Transform):
    """A transform that the model has never heard of."""

    mod: int

    def signature(self) -> tuple[Any, ...]:
        return (Odd,)

    def parameters(self) -> tuple[int, ...]:
        return (self.mod,)

    @staticmethod
    def map(signature: tuple[Any, ...], ids: Tensor, params: Any, at: Any = 0, arrays: Any = None) -> Tensor:
        return torch.remainder(ids, params[0])


def test_unknown_transforms_count_as_hashes_unless_there_is_a_row_per_id() -> None:
    terms = CurveTerms(FrequencyCurve.zipf(1000))
    assert loss_of(table_of(100, Odd(100)), terms) == loss_of(table_of(100, Hash(5, 100)), terms)
    assert loss_of(table_of(1000, Odd(1000)), terms) == pytest.approx(0.0, abs=1e-12)


def configs(method: str, spec: FeatureSpec) -> list[Any]:
    cls = get_method(method).config_cls
    top = cls.max_size(spec)
    return [cls.sized(spec, s) for s in sorted({1, top, *(max(1, top * k // 8) for k in range(1, 8))})]


@pytest.mark.parametrize("method", NAMES)
@settings(max_examples=10)
@given(st.integers(2, 100_000), st.sampled_from([4, 8, 16, 64]), st.floats(0, 1.6))
def test_every_method_loses_something_between_nothing_and_all_and_less_at_larger_sizes(
    method: str, n: int, dim: int, exponent: float
) -> None:
    spec = FeatureSpec("C1", n, dim)
    terms = CurveTerms(FrequencyCurve.zipf(n, exponent, total=50 * n))
    losses = [loss_of(c.program(spec), terms, dim) for c in configs(method, spec)]
    everything = float(terms.value.sum())
    assert all(0 <= loss <= everything + 1e-9 for loss in losses)
    # Balanced partitions trade rows of one table for another, so their sharing is not quite monotone.
    slack = 0.1 * everything if method == "compositional" else 1e-9
    assert all(b <= a + slack for a, b in pairwise(losses))
    if method == "full":
        assert losses == [pytest.approx(0.0, abs=1e-12)]


def test_rare_ids_weigh_less_than_their_share_of_lookups() -> None:
    often, rarely = (CurveTerms(FrequencyCurve.zipf(1000, 0.0, total=t)) for t in (1e9, 1e4))
    assert often.value.sum() > 0.99
    assert rarely.value.sum() < 0.1


def test_rows_that_add_up_or_multiply_hinder_each_other() -> None:
    spec = FeatureSpec("C1", 10_000, 16)
    terms = CurveTerms(FrequencyCurve.zipf(10_000))
    made = {
        method: get_method(method).config_cls.from_params(params).program(spec)
        for method, params in (
            ("hash", {"num_buckets": 500}),
            ("multihash", {"num_buckets": 500}),
            ("compositional", {"moduli": (480, 25)}),
        )
    }
    one, added, multiplied = (loss_of(program, terms) for program in made.values())
    assert one < added < multiplied


def test_chunks_side_by_side_save_an_id_that_lost_one_of_them() -> None:
    terms = CurveTerms(FrequencyCurve.zipf(10_000))
    losses = []
    for chunks in (1, 2, 4):
        rows, width = 500 * chunks, 16 // chunks
        table = Table("weight", rows, width, Initializer("constant"))
        row_lookups = tuple(RowLookup("weight", Hash(j, rows), column=j * width) for j in range(chunks))
        losses.append(loss_of(LookupProgram((table,), row_lookups), terms))
    assert losses[0] > 1.5 * losses[1] > 2 * losses[2], "the same bytes in more chunks"


def test_a_scalar_of_its_own_gives_an_id_something() -> None:
    spec = FeatureSpec("C1", 10_000, 16)
    terms = CurveTerms(FrequencyCurve.zipf(10_000))
    shared = loss_of(get_method("hash").config_cls.from_params({"num_buckets": 50}).program(spec), terms)
    config_cls = get_method("memcom").config_cls
    scaled, shifted = (
        loss_of(config_cls.from_params({"num_buckets": 50, "bias": bias}).program(spec), terms)
        for bias in (False, True)
    )
    assert shifted < scaled < shared


def sample_curves() -> tuple[Schema, dict[str, FrequencyCurve]]:
    from recsys_embed.data import convert_criteo, open_dataset
    from recsys_embed.data.criteo.options import CriteoOptions
    from recsys_embed.data.splits import SplitRule

    root = os.environ.get("RECSYS_EMBED_DATA")
    found = sorted(Path(root).glob("criteo_kaggle/criteo_days*.tsv.gz")) if root else []
    if not found:
        pytest.skip("needs RECSYS_EMBED_DATA with Criteo's sample")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rule = SplitRule(valid=1 / 12, test=1 / 6)
        convert_criteo(found, Path(folder) / "data", CriteoOptions(split=rule))
        data = open_dataset(Path(folder) / "data")
        return data.schema(16), curves_from(data)


def test_predictions_stand_in_the_order_of_measured_losses() -> None:
    schema, curves = sample_curves()
    rows = json.loads((ROOT / "benchmarks/results/criteo_sample.json").read_text())["rows"]
    aucs: dict[tuple[str, str, str], list[float]] = {}
    for r in rows:
        if r["status"] == "ok":
            aucs.setdefault((r["model"], r["method"], r["size"]), []).append(r["test"]["auc"])
    terms = curve_terms(schema, curves)
    whole = Plan.full(schema).footprint(schema).serve
    measured, predicted = [], []
    for method in NAMES:
        for ratio in (4, 20):
            falls = [
                np.mean(aucs[model, "full", ""]) - np.mean(aucs[model, method, f"{ratio}x"])
                for model in ("deepfm", "dcnv2")
                if (model, method, f"{ratio}x") in aucs
            ]
            if falls and method != "full":
                plan = Plan.uniform(schema, method, budget=whole // ratio)
                predicted.append(sum(plan_losses(schema, plan, terms).values()))
                measured.append(float(np.mean(falls)))
    assert len(measured) >= 9
    ranks = [np.argsort(np.argsort(values)) for values in (measured, predicted)]
    assert np.corrcoef(*ranks)[0, 1] > 0.8, (measured, predicted)
    large = [m / p for m, p in zip(measured, predicted, strict=True) if m > 1e-3]
    assert max(large) / min(large) < 4, "one AUC per loss, within a factor of two either way"


def test_losses_of_a_plan_add_up_feature_by_feature() -> None:
    schema = Schema([FeatureSpec(f"C{i}", 500 * (i + 1), 16) for i in range(4)])
    terms = curve_terms(schema, {s.name: FrequencyCurve.zipf(s.num_embeddings) for s in schema})
    for method in NAMES:
        try:
            plan = Plan.uniform(schema, method, budget="100KiB", **({} if method == "full" else {"full_below": 0}))
        except RecsysEmbedError:
            continue
        losses = plan_losses(schema, plan, terms)
        assert list(losses) == list(schema.names)
        twice = plan_losses(schema, plan, terms, dict.fromkeys(schema.names, 2.0), {method: 3.0})
        assert twice == {k: pytest.approx(6 * v) for k, v in losses.items()}
