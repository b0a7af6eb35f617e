"""A method that the planner has never heard of is planned from its program, or priced by itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Self

import pytest

from recsys_embed import FeatureSpec, Schema, registry
from recsys_embed.core.method_config import MethodConfig, param
from recsys_embed.core.program import Initializer, LookupProgram, MixedRadixDigit, RowLookup, Table
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.planning import FrequencyCurve, plan_for_budget

SCHEMA = Schema([FeatureSpec("C1", 10_000, 16), FeatureSpec("C2", 300, 16)])
STATS = {s.name: FrequencyCurve.zipf(s.num_embeddings) for s in SCHEMA}


@dataclass(frozen=True, kw_only=True)
class FoldConfig(MethodConfig):
    """Ids modulo a number of rows."""

    method: ClassVar[str] = "fold"
    rows: int = param(MISSING, "rows", low=1)
    colour: str = param("red", "an option")

    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        table = Table("weight", self.rows, spec.embedding_dim, Initializer.plain(spec))
        return LookupProgram((table,), (RowLookup("weight", MixedRadixDigit(mod=self.rows)),))

    @classmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        return cls.from_params({**params, "rows": size})


@dataclass(frozen=True, kw_only=True)
class WonderConfig(FoldConfig):
    """One that knows its loss, and options worth trying."""

    method: ClassVar[str] = "wonder"

    def planning_loss(self, spec: FeatureSpec, curve: FrequencyCurve) -> float:
        return (0.001 if self.colour == "blue" else 0.5) / self.rows * curve.coverage(1)

    @classmethod
    def planning_variants(cls, spec: FeatureSpec, curve: FrequencyCurve) -> Sequence[Mapping[str, Any]]:
        return ({}, {"colour": "blue"}) if spec.num_embeddings > 1000 else ({},)


class FoldEmbedding(CompressedEmbedding):
    """Drop-in of fold."""

    config_cls = FoldConfig


class WonderEmbedding(CompressedEmbedding):
    """Drop-in of wonder."""

    config_cls = WonderConfig


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register(FoldEmbedding, paper="none")


def test_a_new_method_is_planned_by_its_program_alone() -> None:
    plan = plan_for_budget(SCHEMA, "100KiB", methods=["full", "fold"], stats=STATS)
    assert plan["C1"].method == "fold"
    like = plan_for_budget(SCHEMA, "100KiB", methods=["full", "hash"], stats=STATS)
    assert plan["C1"].rows == like["C1"].num_buckets  # type: ignore[attr-defined]
    assert f"all ids share {plan['C1'].rows:,} rows" in plan.reasons["C1"]  # type: ignore[attr-defined]


def test_a_method_that_knows_better_prices_itself_and_names_its_variants() -> None:
    registry.register(WonderEmbedding, paper="none")
    plan = plan_for_budget(SCHEMA, "100KiB", stats=STATS)
    assert plan["C1"].method == "wonder"
    assert plan["C1"].colour == "blue"  # type: ignore[attr-defined]
    plan = plan_for_budget(SCHEMA, "100KiB", stats=STATS, methods={"wonder": {"colour": "green"}, "full": None})
    assert plan["C1"].colour == "green"  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["tt", "dhe"])
def test_computed_rows_are_planned_and_rated_as_shared_ones(method: str) -> None:
    schema = Schema([FeatureSpec("a", 100_000, 16)])
    losses = []
    for budget in (20_000, 60_000, 200_000):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows are shared, which no network tells apart
            plan = plan_for_budget(schema, budget, methods=[method])
        assert plan["a"].method == method
        assert 0.8 * budget <= plan.footprint(schema).serve <= budget
        assert plan.notes is not None
        losses.append(plan.notes.predicted_loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > 0, "ids that share all that is stored lose some of their signal"
