"""compress_: optimizers, lists and whoever else holds the tables."""

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed.compress import compress_, materialize_
from recsys_embed.errors import ConfigError
from tests.compress.models import Model, snapshot, uniform

# -- who else holds the tables ----------------------------------------------------------------------------------------


def test_optimizers_left_behind_are_named_and_given_ones_taken_over() -> None:
    model = Model()
    stale = torch.optim.SGD([{"params": [model.user.weight]}, {"params": model.head.parameters()}], lr=0.1)
    model.optim = torch.optim.Adam(model.parameters())
    model(torch.tensor([3])).sum().backward()
    model.optim.step()
    given = model.optim
    with pytest.warns(UserWarning, match=r"SGD still holds the replaced parameters of user:.*optimizer=") as caught:
        compress_(model, uniform(model, "hash"), optimizer=given)
    assert len(caught) == 1
    held = [id(p) for g in given.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in given.state} <= set(held), "no state of tables that are gone"
    assert len(given.state) == 2, "the head keeps its own"
    before = copy.deepcopy(model.state_dict())
    model.zero_grad()
    model(torch.tensor([3, 4])).sum().backward()
    given.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    tables = ("user", "fields.0", "fields.1", "tower.0.item")
    assert {"head.weight", *(f"{t}.stored_weight" for t in tables)} <= moved
    with pytest.raises(ConfigError, match="SGD holds none"):
        compress_(model, uniform(model, "lowdim"), optimizer=stale)
    with pytest.warns(UserWarning, match=r"Adam \(attribute 'optim' of the model\)"):
        materialize_(model)
    del stale
    gc.collect()


def test_a_warning_turned_into_an_error_leaves_the_model_as_it_was() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="SGD"):
            compress_(model, uniform(model, "hash"))
    assert snapshot(model) == before
    del optimizer


def test_an_optimizer_of_tables_that_stay_full_is_none_too_many() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(300, 4), "b": nn.Embedding(20, 4), "head": nn.Linear(4, 1)})
    whole, one, head = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, model["b"], model["head"]))
    tables = rse.Schema.from_model(model)
    before = snapshot(model)
    compress_(model, rse.Plan.full(tables), optimizer=[whole, head])
    assert snapshot(model) == before
    some = {"a": rse.get_method("hash").config_cls.from_params({"num_buckets": 9}), "b": rse.Plan.full(tables)["b"]}
    with pytest.raises(ConfigError, match="SGD holds none of the parameters to be replaced"):
        compress_(model, some, optimizer=[whole, head])
    compress_(model, some, optimizer=[whole, one])
    assert [id(p) for p in whole.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert one.param_groups[0]["params"] == [model["b"].weight]


def test_a_warning_names_each_table_once_at_the_callers_line() -> None:
    model = nn.ModuleDict({n: nn.Embedding(300, 4) for n in "abcd"})
    schema = rse.Schema.from_model(model)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.warns(UserWarning, match="the replaced parameters of a, b, c and 1 more: ") as first:
        compress_(model, rse.Plan.uniform(schema, "lowdim", dim=2))
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.warns(UserWarning, match="the replaced parameters of a, b, c and 1 more: ") as second:
        materialize_(model)
    assert {w.filename for w in [*first, *second]} == {__file__}
    del optimizer


def test_a_table_that_many_share_enters_an_optimizer_once() -> None:
    model = nn.ModuleDict({f"C{i}": nn.Embedding(50, 8) for i in range(4)})
    optimizer = torch.optim.SGD([{"params": [m.weight]} for m in model.values()], lr=0.1)
    held = [[m.weight for m in model.values()]]
    model.held = held
    compress_(model, rse.Plan(dict.fromkeys(model, rse.UnifiedConfig(num_buckets=20))), optimizer=optimizer)
    (shared,) = model.parameters()
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 0, 0, 0]
    assert optimizer.param_groups[0]["params"][0] is shared
    assert [id(p) for p in held[0]] == [id(shared)]


def test_parameters_that_stay_in_use_stay_in_the_optimizer() -> None:
    model = nn.ModuleDict({f"C{i}": nn.Embedding(50, 8) for i in range(3)})
    compress_(model, rse.Plan(dict.fromkeys(model, rse.UnifiedConfig(num_buckets=20))))
    optimizer = torch.optim.Adam(model.parameters())
    model["C1"](torch.arange(5)).sum().backward()
    optimizer.step()
    shared = model["C1"].table("unified")
    compress_(model, {"C0": rse.HashConfig(num_buckets=9)}, optimizer=[])
    assert optimizer.param_groups[0]["params"] == [shared]
    model["full"] = rse.FullEmbedding(30, 8)
    optimizer.add_param_group({"params": [model["full"].weight]})
    kept = model["full"].weight
    materialize_(model, include="full")
    assert model["full"].weight is kept
    assert optimizer.param_groups[1]["params"][0] is kept
    assert shared in optimizer.state


def test_shared_rows_start_as_wide_as_the_tables_together() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(4000, 8), "b": nn.Embedding(4000, 8)})
    with torch.no_grad():
        model["a"].weight.normal_(0, 0.3)
        model["b"].weight.normal_(0, 0.4)
    compress_(model, rse.Plan(dict.fromkeys("ab", rse.UnifiedConfig(num_buckets=3000))), init="fresh")
    assert abs(float(model["a"].table("unified").detach().std()) - (0.125**0.5)) < 0.01


def test_changes_are_made_together_or_not_at_all() -> None:
    from recsys_embed.compress.exchange import ReversibleChange, apply_all

    done: list[str] = []

    def fails() -> None:
        done.append("half")
        raise KeyboardInterrupt

    first = ReversibleChange(lambda: done.append("first"), lambda: done.append("undo first"))
    second = ReversibleChange(fails, lambda: done.append("undo half"))
    with pytest.raises(KeyboardInterrupt):
        apply_all([first, second, first])
    assert done == ["first", "half", "undo half", "undo first"]


def test_named_and_repeated_groups_of_an_optimizer() -> None:
    model = Model()
    optimizer = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
    compress_(model, uniform(model, "lowdim"), optimizer=[optimizer])
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(group["param_names"]) == len(list(model.parameters()))
    assert {"user.weight.0", "user.weight.1", "head.bias"} <= set(group["param_names"])
    model(torch.tensor([1])).sum().backward()
    optimizer.step()


def test_lists_and_dictionaries_beside_the_tree_follow() -> None:
    model = Model()
    model.tables = [model.user, model.fields[0]]
    model.by_name = {"user": model.user, "nested": [("item", model.tower[0]["item"])]}
    # As DeepCTR-Torch keeps what it regularises.
    model.regularized = [([model.user.weight, model.fields[0].weight, model.head.weight], 0.0, 1e-5)]
    model.named = [("user.weight", model.user.weight)]
    object.__setattr__(model, "alias", model.user)
    cyclic: list[Any] = [model.user]
    cyclic.append(cyclic)
    model.cyclic = cyclic
    inner = model.regularized[0][0]
    compress_(model, uniform(model, "lowdim"))
    assert model.tables == [model.user, model.fields[0]]
    assert model.by_name["user"] is model.user
    assert model.by_name["nested"][0][1] is model.tower[0]["item"]
    assert model.alias is model.user
    assert model.cyclic[0] is model.user
    assert model.regularized[0][0] is inner
    expected = [*model.user.parameters(), *model.fields[0].parameters(), model.head.weight]
    assert [id(p) for p in inner] == [id(p) for p in expected]
    assert [name for name, _ in model.named] == ["user.weight"] * 2
    model.single = {"weight": model.fields[1].table("weight")}
    with pytest.raises(ConfigError, match=r"single\['weight'\] holds the replaced fields/1, which is 2 parameters now"):
        compress_(model, {"fields/1": rse.LowdimConfig(dim=2)})


def test_failure_while_building_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    plan = uniform(model, "hash")
    before = snapshot(model)
    calls = []

    def fails(self: Any, *args: Any) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(rse.HashEmbedding, "fit_", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        compress_(model, plan)
    assert snapshot(model) == before
