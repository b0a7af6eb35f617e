"""Runs whose features are stored by a plan: the planner's own, or one from a file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from recsys_embed.cli import main
from recsys_embed.core.footprint import format_bytes
from recsys_embed.data import make_synthetic, open_dataset
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.plan import Plan
from recsys_embed.planning import plan_for_budget
from recsys_embed.train.compare import Comparison, run_comparison
from recsys_embed.train.plans import first_order_bytes, plans_for, resolve
from recsys_embed.train.run import run_training
from tests.train.toy import ToyData, toy_config


def test_a_planned_run_keeps_to_the_budget_and_records_its_plan(tmp_path: Path) -> None:
    data, config = ToyData(), toy_config(method="planned", ratio=4, epochs=1)
    out = run_training(config, data, folder=tmp_path)
    assert out.footprint.serve <= out.full_bytes / 4
    saved = json.loads((tmp_path / "config.json").read_text())
    assert Plan.from_dict(saved["plan"]) == out.model.vectors.plan
    assert plans_for(data.schema(config.embedding_dim), config.from_dict(saved)).vectors == out.model.vectors.plan


def test_a_given_plan_is_used_as_it_is_and_first_order_weights_get_their_part() -> None:
    data = ToyData()
    schema = data.schema(8)
    plan = Plan.uniform(schema, "hash", budget="2KiB")
    config = toy_config(method="planned", plan=plan.to_dict(), embedding_dim=8)
    plans = plans_for(schema, config, data)
    assert plans.vectors == plan
    assert plans.linear is not None
    spent = plan.footprint(schema).serve
    assert plans.linear.footprint(schema.with_dim(1)).serve <= spent / 8
    with pytest.raises(BudgetError, match=r"the plan needs .* Ways out"):
        plans_for(schema, config.replace(budget=spent), data)


def test_a_plan_made_for_another_width_is_told() -> None:
    data = ToyData()
    plan = plan_for_budget(data.schema(16), "1KiB").to_dict()
    with pytest.warns(UserWarning, match=r"other widths or sizes: it took .* at width 8; plan for these"):
        resolve(data.schema(8), toy_config(method="planned", plan=plan, embedding_dim=8), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(data.schema(16), toy_config(method="planned", plan=plan, embedding_dim=16), data)


def test_planned_rows_stand_beside_methods_in_a_comparison(tmp_path: Path) -> None:
    comparison = Comparison(methods=("hash", "planned"), ratios=(4.0,), train=toy_config(epochs=1))
    rows = run_comparison(comparison, ToyData(), tmp_path)
    assert [r["method"] for r in rows] == ["full", "hash", "planned"]
    assert rows[2]["status"] == "ok"
    assert set(rows[2]["plan"]["features"]) == {"C0", "C1", "C2", "C3"}
    assert rows == json.loads(json.dumps(run_comparison(comparison, ToyData(), tmp_path)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "planned"}, "needs a `ratio` or `budget`"),
        ({"method": "hash", "plan": {"version": 1}}, "a `plan` goes with `method` 'planned'"),
        ({"method": "planned", "plan": {"version": 1}, "method_args": {"methods": ["hash"]}}, "without `method_args`"),
    ],
)
def test_contradicting_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_config(**wrong)


def test_the_command_takes_a_plan_file(tmp_path: Path, capsys) -> None:
    make_synthetic(tmp_path / "data", rows=2000, seed=1)
    schema = open_dataset(tmp_path / "data").schema(4)
    plan = tmp_path / "plan.json"
    made = Plan.uniform(schema, "hash", budget="64KiB")
    plan.write_text(made.to_json())
    args = ["train", "--data", str(tmp_path / "data"), "--embedding-dim", "4", "--plan", str(plan)]
    assert main([*args, "--out", str(tmp_path / "run"), "--set", "model_args.hidden=[8]"]) == 0
    serve = json.loads((tmp_path / "run" / "run.json").read_text())["footprint"]["serve"]
    assert serve <= 80 * 1024
    on_top = serve - made.footprint(schema).serve
    line = f"first-order weights (linear tables), {format_bytes(on_top)}, come on top of the plan"
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert first_order_bytes(made, schema) == on_top > 0
    assert main([*args, "--method", "hash", "--out", str(tmp_path / "other")]) == 2
    assert "either --plan or --method" in capsys.readouterr().err
    plan.write_text("{}")
    assert main([*args, "--out", str(tmp_path / "other")]) == 2
    assert "a plan is an object" in capsys.readouterr().err
