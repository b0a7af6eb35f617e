"""Measured runs move the planner's mind; rows that cannot are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.errors import ConfigError, DataError
from recsys_embed.planning import FrequencyCurve, curve_terms, plan_for_budget, plan_losses
from recsys_embed.planning.calibration import LEAST, MOST, calibrate, read_comparison

SCHEMA = Schema([FeatureSpec(f"C{i}", 2000 * (i + 1), 16) for i in range(4)])
TERMS = curve_terms(SCHEMA, {s.name: FrequencyCurve.zipf(s.num_embeddings) for s in SCHEMA})
WHOLE = Plan.full(SCHEMA).footprint(SCHEMA).serve


def row(method: str, ratio: float, fall: float, seed: int = 0, **other: Any) -> dict[str, Any]:
    auc = {"test": {"auc": 0.75 + 0.001 * seed - fall}}
    return {"model": "deepfm", "method": method, "size": f"{ratio}x", "seed": seed, "status": "ok", "reason": "",
            "compression": ratio, **auc, **other}  # fmt: skip


def predicted(method: str, ratio: float) -> float:
    plan = Plan.uniform(SCHEMA, method, budget=int(WHOLE / ratio))
    return sum(plan_losses(SCHEMA, plan, TERMS).values())


def rows_with(factors: dict[str, float], scale: float = 0.002) -> list[dict[str, Any]]:
    """Rows in which each method loses its prediction times a factor."""
    rows = [row("full", 1, 0.0, seed) for seed in (0, 1)]
    for method, factor in factors.items():
        for ratio in (4, 12):
            rows += [row(method, ratio, scale * factor * predicted(method, ratio), seed) for seed in (0, 1)]
    return rows


def test_factors_come_back_from_rows_made_with_them() -> None:
    found = calibrate(rows_with({"hash": 1.0, "lowdim": 3.0, "unified": 0.5}), SCHEMA, TERMS)
    assert found.scales["lowdim"] / found.scales["hash"] == pytest.approx(3.0)
    assert found.scales["unified"] / found.scales["hash"] == pytest.approx(0.5)
    assert found.runs == {"hash": 2, "lowdim": 2, "unified": 2}
    alone = calibrate(rows_with({"hash": 1.0}), SCHEMA, TERMS)
    assert alone.scales == {"hash": pytest.approx(1.0)}
    assert alone.auc_per_loss == pytest.approx(0.002)


def test_methods_that_seem_to_gain_keep_a_price_and_the_hopeless_one_a_limit() -> None:
    found = calibrate(rows_with({"hash": 1.0, "unified": -5.0, "lowdim": 0.01}), SCHEMA, TERMS)
    assert found.scales["unified"] == LEAST
    found = calibrate(rows_with({"hash": 1.0, "unified": 1e4}), SCHEMA, TERMS)
    assert found.scales["unified"] <= MOST


def test_rows_that_say_nothing_are_left_out() -> None:
    rows = rows_with({"hash": 1.0})
    odd = [
        row("planned", 4, 0.3),
        row("hash", 4, 0.5, seed=9),
        {**row("lowdim", 20, 0.1), "status": "infeasible"},
        {**row("unified", 20, 0.1), "test": None},
    ]
    assert calibrate(rows + odd, SCHEMA, TERMS) == calibrate(rows, SCHEMA, TERMS)


def test_the_planner_follows_the_evidence_and_says_what_was_measured(tmp_path: Path) -> None:
    stats = {s.name: FrequencyCurve.zipf(s.num_embeddings) for s in SCHEMA}
    methods = ["full", "hash", "lowdim"]
    before = plan_for_budget(SCHEMA, WHOLE // 6, methods=methods, stats=stats, full_below=0, network=True)
    assert "hash" in {before[n].method for n in before}
    folder = tmp_path / "compare"
    (folder / "rows").mkdir(parents=True)
    for i, r in enumerate(rows_with({"hash": 9.0, "lowdim": 0.2})):
        (folder / "rows" / f"{i}.json").write_text(json.dumps(r))
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": rows_with({"hash": 9.0, "lowdim": 0.2})}))
    plans = [
        plan_for_budget(SCHEMA, WHOLE // 6, methods=methods, stats=stats, evidence=e, full_below=0, network=True)
        for e in (folder, str(file), rows_with({"hash": 9.0, "lowdim": 0.2}))
    ]
    assert plans[0] == plans[1] == plans[2]
    assert {plans[0][n].method for n in plans[0]} == {"lowdim"}
    assert plans[0].notes is not None
    assert plans[0].notes.measured == ("hash", "lowdim")


def test_what_is_no_evidence_is_refused(tmp_path: Path) -> None:
    for source in (tmp_path, [], [{"method": "hash"}], 5, tmp_path / "absent.json"):
        with pytest.raises(DataError, match="no rows of a comparison"):
            read_comparison(source)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(DataError, match=r"broken\.json: cannot be read"):
        read_comparison(broken)
    for rows in ([row("hash", 4, 0.1)], [row("full", 1, 0.0)], rows_with({"hash": -1.0})):
        with pytest.raises(ConfigError, match="does not show what compression costs"):
            calibrate(rows, SCHEMA, TERMS)
