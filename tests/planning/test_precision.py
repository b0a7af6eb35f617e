"""Bits as a planned variable: bytes, losses and choices follow the precision of each table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema, plan_for_budget
from recsys_embed.core.precision import SEARCHES, Layout, Precision
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.planning.candidates import Candidate
from recsys_embed.planning.costs import Costs
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.planning.loss_estimate import CurveTerms, column_spans, estimate_loss
from recsys_embed.planning.options import ResizableMethod
from recsys_embed.planning.rounding import AUTO, COLUMNS, ERRORS
from recsys_embed.registry import MethodInfo, get_method, list_methods
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.plans import plans_for
from tests.tiers import slow_but

ROWS = {"user": 20_000, "item": 5000, "c1": 10, "c2": 300, "c3": 900}
SCHEMA = Schema([FeatureSpec(name, n, 16) for name, n in ROWS.items()])
FULL = Plan.full(SCHEMA).footprint(SCHEMA).serve


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("columns", COLUMNS)
def test_errors_are_those_of_normal_rows(precision: Any, columns: int) -> None:
    rows = torch.randn(4000, columns, generator=torch.Generator().manual_seed(0))
    layout = Layout(precision, columns)
    back = layout.decode(layout.encode(rows, SEARCHES.get(precision, "minmax")))
    error = float((back - rows).square().mean() / rows.square().mean())
    assert ERRORS[precision][COLUMNS.index(columns)] == pytest.approx(error, rel=0.08, abs=1e-12)


@pytest.mark.parametrize("ratio", slow_but([4, 20, 100], 20))
def test_more_precisions_to_choose_from_never_lose_more(ratio: int) -> None:
    losses = []
    for menu in ("fp32", ("fp32", "int8"), "auto"):
        plan = plan_for_budget(SCHEMA, FULL // ratio, precision=menu, full_below=0)
        assert plan.notes is not None
        assert plan.notes.bytes == plan.footprint(SCHEMA).serve <= FULL // ratio
        assert {c.precision for c in plan.configs.values()} <= ({menu} if menu == "fp32" else set(AUTO))
        losses.append(plan.notes.predicted_loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
@given(
    sizes=st.lists(st.integers(1, 50_000), min_size=1, max_size=5),
    width=st.sampled_from([1, 4, 8, 16, 20]),
    ratio=st.floats(1.5, 100),
    menu=st.one_of(
        st.just("auto"), st.lists(st.sampled_from(get_args(Precision)), min_size=1, max_size=2, unique=True)
    ),
    methods=st.sampled_from([None, ["unified"], ["robe", "full"], ["lowdim", "hash"]]),
)
def test_plans_keep_to_their_bytes(sizes: Any, width: int, ratio: float, menu: Any, methods: Any) -> None:
    schema = Schema([FeatureSpec(f"f{i}", n, width) for i, n in enumerate(sizes)])
    budget = max(1, int(Plan.full(schema).footprint(schema).serve / ratio))
    try:
        plan = plan_for_budget(schema, budget, methods=methods, precision=menu)
    except BudgetError:
        return
    assert plan.notes is not None
    assert plan.footprint(schema).serve == plan.notes.bytes <= budget
    assert {c.precision for c in plan.configs.values()} <= set(AUTO if menu == "auto" else menu)


def test_a_name_is_that_of_every_table_and_what_is_exported(tmp_path: Path) -> None:
    plan = plan_for_budget(SCHEMA, FULL // 20, precision="int4")
    assert {c.precision for c in plan.configs.values()} == {"int4"}
    assert "at int4" in plan.reasons["user"]
    report = rse.export(rse.EmbeddingCollection(SCHEMA, plan), tmp_path / "c", prune=False)
    assert report.embedding_bytes == plan.notes.bytes  # type: ignore[union-attr]
    assert {t.kind for t in report.tables if t.form != "whole"} == {"int4"}


def test_in_training_fewer_bits_save_nothing() -> None:
    plan = plan_for_budget(SCHEMA, FULL // 4, "train", precision="auto")
    assert {c.precision for c in plan.configs.values()} == {"fp32"}
    assert plan.configs == plan_for_budget(SCHEMA, FULL // 4, "train").configs


def test_a_budget_for_fewer_bits_is_named() -> None:
    with pytest.raises(BudgetError, match=r'precision="auto": .* at least'):
        plan_for_budget(SCHEMA, FULL // 2, methods=["full"])


@pytest.mark.parametrize(("method", "params"), [("lowdim", {"dim": 8}), ("tt", {"ranks": (4, 4)})])
def test_rounding_costs_more_where_no_network_reads_the_rows(method: str, params: dict[str, Any]) -> None:
    spec = FeatureSpec("user", 5000, 16)
    program = get_method(method).config_cls.from_params({**params, "precision": "int4"}).program(spec)
    beside, alone = (
        column_spans(program, CurveTerms(FrequencyCurve.zipf(5000), without))[0].rounded for without in (False, True)
    )
    assert alone < 1
    assert 1 - alone == pytest.approx(8 * (1 - beside))


class _Factors(torch.nn.Module):
    """Matrix factorisation, in which no network reads the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = torch.nn.Embedding(900, 16), torch.nn.Embedding(300, 16)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return (self.user(user) * self.item(item)).sum(-1)


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("model", [_Factors(), Schema([FeatureSpec("user", 900, 16), FeatureSpec("item", 300, 16)])])
def test_bytes_for_full_tables_give_full_tables_at_every_precision(model: Any, precision: Any) -> None:
    ample = 10 * 1200 * 64
    full = plan_for_budget(model, ample, precision=precision, methods="full")
    assert full.notes is not None
    for budget in (full.notes.bytes, full.notes.bytes * 21 // 20, ample):
        plan = plan_for_budget(model, budget, precision=precision, full_below=0)
        assert {c.method for c in plan.configs.values()} == {"full"}, budget
    for method in ("lowdim", "memcom", "compositional"):
        other = plan_for_budget(model, ample, precision=precision, methods=method).notes
        assert other is not None
        assert other.predicted_loss >= full.notes.predicted_loss - 1e-9, method


@pytest.mark.parametrize(("method", "params"), [("robe", {"block_size": 16}), ("unified", {"dim": 1})])
def test_a_budget_that_is_too_small_for_a_rounded_block_is_told_what_one_takes(
    method: str, params: dict[str, Any]
) -> None:
    options: dict[str, Any] = {**params, "precision": "int8", "full_below": 0}
    with pytest.raises(BudgetError, match="available") as told:
        Plan.uniform(SCHEMA, method, budget=60, **options)
    need = re.search(r"needs at least ([0-9]+) B", str(told.value))
    assert need is not None
    assert Plan.uniform(SCHEMA, method, budget=int(need[1]), **options).footprint(SCHEMA).serve <= int(need[1])
    with pytest.raises(BudgetError):
        Plan.uniform(SCHEMA, method, budget=int(need[1]) - 1, **options)


def test_full_tables_of_a_run_have_the_precision_of_its_settings() -> None:
    plans = plans_for(SCHEMA, TrainConfig(model="deepfm", method="full", method_args={"precision": "int8"}))
    assert plans.vectors.footprint(SCHEMA).serve == sum(n * 20 for n in ROWS.values())
    with pytest.raises(ConfigError, match="dim"):
        plans_for(SCHEMA, TrainConfig(model="deepfm", method="full", method_args={"dim": 8}))


@pytest.mark.parametrize("wrong", ["int9", [], None, 4, ["int8", "in4"], b"int8"])
def test_what_is_no_precision_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="precision"):
        plan_for_budget(SCHEMA, FULL // 4, precision=wrong)


def test_a_model_is_compressed_and_exported_as_planned(tmp_path: Path) -> None:
    class Ranker(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item = torch.nn.Embedding(3000, 16), torch.nn.Embedding(800, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return (self.user(ids[:, 0]) * self.item(ids[:, 1])).sum(1)

    model, ids = Ranker(), torch.stack([torch.arange(99), torch.arange(99)], 1)
    before = model(ids).detach()
    plan = plan_for_budget(model, "60KiB", methods=["full"], precision="auto")
    report = rse.compress_(model, plan)
    assert report.bytes_after == plan.notes.bytes  # type: ignore[union-attr]
    written = rse.export(model, tmp_path / "m", prune=False)
    assert written.embedding_bytes == report.bytes_after
    served = rse.load(tmp_path / "m", into=Ranker())
    assert torch.corrcoef(torch.stack([served(ids), before]))[0, 1] > 0.95


def test_a_run_is_measured_as_it_is_served(tmp_path: Path) -> None:
    from recsys_embed.train import evaluate, run_training
    from tests.train.toy import ToyData, toy_config

    schema = ToyData(2000).schema(8)
    precisions = ("int2", "int2", "fp32", "int2")
    configs = {s.name: {"method": "full", "precision": p} for s, p in zip(schema, precisions, strict=True)}
    data = ToyData(2000)
    plan = {"version": 1, "features": configs}
    config = toy_config(method="planned", plan=plan, eval_every=5, epochs=8, learning_rate=0.05)
    found = run_training(config, data, folder=tmp_path / "run", show_progress=False)
    assert found.result.best_step < found.result.steps, "the best weights are loaded"
    unrounded = evaluate(found.model, data, "test")
    rse.export(found.model, tmp_path / "m")
    served = evaluate(rse.load(tmp_path / "m"), data, "test")  # type: ignore[arg-type]
    assert unrounded is not None
    assert found.result.test.auc == pytest.approx(served.auc, abs=1e-9)  # type: ignore[union-attr]
    assert found.result.test.auc != unrounded.auc  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "info",
    [m for m in list_methods() if m.config_cls.plannable and not m.config_cls.has_own_precisions],
    ids=lambda m: m.name,
)
def test_what_is_found_at_one_precision_is_what_another_would_find(info: MethodInfo) -> None:
    spec, terms, costs = FeatureSpec("a", 900, 16), CurveTerms(FrequencyCurve.zipf(900)), Costs(None, False)

    def resizable(precision: Precision, other: ResizableMethod | None = None) -> ResizableMethod:
        return ResizableMethod(Candidate(info, None, precision), spec, terms, costs, other)

    for first, second in (("fp32", "int4"), ("int8", "fp32")):
        alone, found = resizable(second), resizable(second, resizable(first))
        if resizable("fp32").at(1).config.computes:
            with pytest.raises(ConfigError, match="these are computed"):
                resizable("int4", resizable("fp32")).at(1)
            return
        for size in {1, alone.top() // 2 + 1, alone.top()}:
            a, b = alone.at(size), found.at(size)
            assert (a.config, a.cost) == (b.config, b.cost)
            assert estimate_loss(terms, [a.spans], 16) == pytest.approx(estimate_loss(terms, [b.spans], 16), rel=1e-12)
