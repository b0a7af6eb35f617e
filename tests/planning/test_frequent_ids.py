"""Which ids are frequent is part of a plan: whoever follows it gives them rows of their own, without counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema, compress_, list_methods
from recsys_embed.cli import main
from recsys_embed.errors import ConfigError
from recsys_embed.planning import FrequencyCurve, plan_for_budget
from recsys_embed.planning.frequencies import with_frequent_ids
from recsys_embed.train.plans import plans_for
from tests.train.toy import ToyData, toy_config

ROWS, WIDTH, HOT = 20_000, 16, 1000
BUDGET = ROWS * WIDTH * 4 // 10
SCHEMA = Schema([FeatureSpec("item", ROWS, WIDTH)])
BY_FREQUENCY = [m.name for m in list_methods() if m.config_cls.plannable and m.config_cls.order_option is not None]


def counts(seed: int = 0) -> Tensor:
    made = torch.ones(ROWS)
    made[torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:HOT]] = 1000.0
    return made


def hot(seed: int = 0) -> Tensor:
    return (counts(seed) > 1).nonzero().squeeze(1)


def model() -> nn.Module:
    return nn.ModuleDict({"item": nn.Embedding(ROWS, WIDTH)})


def by_text(plan: Plan, tmp_path: Path) -> Plan:
    return Plan.from_dict(json.loads(plan.to_json()))


def by_file(plan: Plan, tmp_path: Path) -> Plan:
    plan.save(tmp_path / "plan.json")
    return Plan.load(tmp_path / "plan.json")


def as_it_is(plan: Plan, tmp_path: Path) -> Plan:
    return plan


def compressed(plan: Plan) -> Tensor:
    target = model()
    assert "numbered by falling frequency" not in str(compress_(target, plan, init="fresh"))
    found: Tensor = target["item"](hot()).detach()  # type: ignore[index]
    return found


def collected(plan: Plan) -> Tensor:
    return EmbeddingCollection(SCHEMA, plan)(hot()[:, None]).detach()[:, 0]


def served(plan: Plan) -> Tensor:
    import tempfile

    target = model()
    compress_(target, plan, init="fresh")
    file = Path(tempfile.mkdtemp()) / "model.safetensors"
    rse.export(target, file)
    return rse.load(file, into=model())["item"](hot()).detach()  # type: ignore[index]


@pytest.mark.crossed
@pytest.mark.parametrize("carried", [as_it_is, by_text, by_file])
@pytest.mark.parametrize("used", [compressed, collected, served])
@pytest.mark.parametrize("method", [*BY_FREQUENCY, None])
def test_frequent_ids_get_their_rows_wherever_the_plan_goes(
    method: str | None,
    used: Callable[[Plan], Tensor],
    carried: Callable[[Plan, Path], Plan],
    tmp_path: Path,
) -> None:
    plan = plan_for_budget(SCHEMA, BUDGET, stats={"item": counts()}, methods=method)
    before = plan.footprint(SCHEMA).serve
    plan = carried(plan, tmp_path)
    assert plan.footprint(SCHEMA).serve == before <= BUDGET
    assert len(torch.unique(used(plan), dim=0)) > 0.99 * HOT


@pytest.mark.parametrize("given", [counts(), counts().tolist(), (torch.arange(ROWS), counts()), (None, counts())])
def test_counts_in_any_form_say_which_ids_are_frequent(given: Any) -> None:
    plan = plan_for_budget(SCHEMA, BUDGET, stats={"item": given}, methods=["freqcut"])
    kept = plan.members(SCHEMA["item"])["kept"]
    assert set(hot().tolist()) <= set(kept.tolist())


def test_counts_of_some_ids_leave_the_others_behind() -> None:
    plan = Plan.uniform(SCHEMA, "freqcut", num_frequent=2, order="counts")
    assert with_frequent_ids(plan, SCHEMA, {"item": [1, 5, 3]}).members(SCHEMA["item"])["kept"].tolist() == [1, 2]
    assert with_frequent_ids(plan, SCHEMA, None) == with_frequent_ids(plan, SCHEMA, {}) == plan


@pytest.mark.parametrize("repeat", [1, 2])
def test_counts_that_fall_do_not_say_that_their_ids_rise(repeat: int) -> None:
    """As pandas' ``value_counts`` gives them, maybe of two parts of the data."""
    falling, ids = counts().sort(descending=True)
    for method in BY_FREQUENCY:
        pair = (ids.repeat(repeat), falling.repeat(repeat))
        plan = plan_for_budget(SCHEMA, BUDGET, stats={"item": pair}, methods=[method])
        assert (
            plan.configs == plan_for_budget(SCHEMA, BUDGET, stats={"item": counts() * repeat}, methods=[method]).configs
        )
        assert len(torch.unique(collected(plan), dim=0)) > 0.99 * HOT


@pytest.mark.parametrize(
    ("pair", "fault"),
    [
        (([1, ROWS], [3, 4]), f"statistics are of ids from 0 to {ROWS - 1}; got {ROWS}"),
        (([1, -5], [3, 4]), "got -5"),
        (([1, 5], [3]), r"got shapes \(2,\) and \(1,\)"),
        (([1.0, 5.5], [3, 4]), "integer ids; got .* float64"),
        ((["a", "b"], [3, 4]), "integer ids"),
        (([1, 1], [3, -1]), "counts must be finite and not negative; got -1"),
        (([1, 5], [3, float("nan")]), "counts must be finite and not negative; got nan"),
    ],
)
@pytest.mark.parametrize("method", [None, "freqcut"])
def test_ids_that_a_feature_does_not_have_are_named(pair: Any, fault: str, method: str | None) -> None:
    with pytest.raises(ConfigError, match=f"{fault}.*feature 'item'"):
        plan_for_budget(SCHEMA, BUDGET, stats={"item": pair}, methods=method)


def test_a_curve_says_how_many_ids_are_frequent_but_not_which() -> None:
    curve = FrequencyCurve.from_counts(counts())
    with pytest.raises(ConfigError, match="the statistics are a curve without ids; give counts"):
        plan_for_budget(SCHEMA, BUDGET, stats={"item": curve}, methods=["freqcut"])
    plan = plan_for_budget(SCHEMA, BUDGET, stats={"item": curve})
    assert plan["item"].method not in BY_FREQUENCY or not plan["item"].program(SCHEMA["item"]).indexes
    falling = FrequencyCurve.from_counts(counts().sort(descending=True).values)
    plan = plan_for_budget(SCHEMA, BUDGET, stats={"item": falling}, methods=["freqcut"])
    assert plan["item"].order == "ids"  # type: ignore[attr-defined]
    assert not plan.sets


def test_later_counts_are_newer_than_those_of_the_plan() -> None:
    plan = plan_for_budget(SCHEMA, BUDGET, stats={"item": counts(0)}, methods=["freqcut"])
    target = model()
    compress_(target, plan, init="fresh", counts={"item": counts(1)})
    assert len(torch.unique(target["item"](hot(1)).detach(), dim=0)) == HOT  # type: ignore[index]
    collection = EmbeddingCollection(SCHEMA, plan).assign_({"item": counts(1)})
    assert len(torch.unique(collection(hot(1)[:, None]).detach()[:, 0], dim=0)) == HOT


def test_plans_of_before_still_load_and_the_report_says_what_they_assume() -> None:
    text = json.loads(plan_for_budget(SCHEMA, BUDGET, stats={"item": counts()}, methods=["freqcut"]).to_json())
    del text["sets"]
    plan = Plan.from_dict(text)
    assert "numbered by falling frequency; give `counts`" in str(compress_(model(), plan, init="fresh"))


class Shuffled(ToyData):
    """Data whose ids are not numbered by frequency."""

    def counts(self, feature: str) -> Tensor:
        return counts()[: self.schema(1)[feature].num_embeddings]


@pytest.mark.parametrize("method", BY_FREQUENCY)
def test_runs_on_ids_in_any_order_go_by_the_counts_of_their_data(method: str) -> None:
    data = Shuffled()
    schema = data.schema(8)
    config = toy_config(method=method, ratio=4, embedding_dim=8, method_args={})
    plan = plans_for(schema, config, data).vectors  # type: ignore[arg-type]
    filled = {n for n in plan if any(i.by_frequency and i.arrays for i in plan[n].program(schema[n]).indexes)}
    assert set(plan.sets) == filled
    assert filled or method == "mixeddim"
    bare = Plan(plan.configs).to_dict()
    again = plans_for(schema, toy_config(method="planned", plan=bare, embedding_dim=8), data).vectors  # type: ignore[arg-type]
    assert again == plan


def test_the_command_line_writes_the_frequent_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_shops.py").write_text(
        f"import torch\ndef build(): return torch.nn.ModuleDict({{'item': torch.nn.Embedding({ROWS}, {WIDTH})}})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plan_for_budget(SCHEMA, BUDGET, stats={"item": counts()}, methods=["freqcut"]).save(tmp_path / "plan.json")
    out = tmp_path / "state.pt"
    args = ["compress", "--model-factory", "two_shops:build", "--plan", str(tmp_path / "plan.json"), "--init", "fresh"]
    assert main([*args, "--out", str(out)]) == 0
    target = model()
    compress_(target, Plan.load(tmp_path / "plan.json"), init="fresh")
    target.load_state_dict(torch.load(out, weights_only=True))
    assert len(torch.unique(target["item"](hot()).detach(), dim=0)) == HOT  # type: ignore[index]
