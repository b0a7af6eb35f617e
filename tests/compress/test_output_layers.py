"""Output layers whose weight is an embedding table score by the rows of the compressed table."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import recsys_embed as rse
from recsys_embed.discover import find_tables
from recsys_embed.embedding.tied_linear import TiedLinear
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.planning.network_context import network_context

METHODS = [m.name for m in rse.list_methods() if m.name != "full"]
IDS = torch.randint(1, 500, (7,), generator=torch.Generator().manual_seed(0))


class NextItem(nn.Module):
    """Scores all items by their own vectors; another module holds the output layer in a plain list."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.item, self.net = nn.Embedding(500, 8, padding_idx=0), nn.Linear(8, 8)
        self.scores = nn.Linear(8, 500, bias=bias)
        self.scores.weight = self.item.weight
        self.layers = [self.scores]

    def forward(self, ids: Tensor) -> Tensor:
        return self.scores(self.net(self.item(ids)))


def compressed(method: str, **options: Any) -> NextItem:
    torch.manual_seed(0)
    model = NextItem()
    rse.compress_(model, rse.Plan.uniform(rse.Schema.from_model(model), method, budget="6KiB"), **options)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_scores_and_gradients_are_those_of_the_plain_rows(method: str, tmp_path: Path) -> None:
    model = compressed(method)
    assert type(model.scores) is TiedLinear
    assert model.layers[0] is model.scores
    (table,) = find_tables(model)
    assert (table.paths, table.output_layers) == (("item",), (model.scores,))
    assert not any(name.startswith("scores.") and "bias" not in name for name in model.state_dict())
    weight = model.item.materialize().requires_grad_()
    hidden = model.net(F.embedding(IDS, weight, padding_idx=0))
    expected = F.linear(hidden, weight, model.scores.bias)
    torch.testing.assert_close(model(IDS), expected)
    own = list(model.item.parameters())
    got = torch.autograd.grad(model(IDS).square().sum(), own, allow_unused=True)
    (dense,) = torch.autograd.grad(expected.square().sum(), [weight])
    wanted = torch.autograd.grad(model.item.weight, own, dense, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for precision, atol in (("fp32", 0.0), ("int8", 0.1)):
        rse.export(model, tmp_path / "m", precision)  # type: ignore[arg-type]
        for into in (NextItem(), copy.deepcopy(model)):
            served = rse.load(tmp_path / "m", into=into)
            assert type(served.scores) is TiedLinear
            assert served.layers[0] is served.scores  # type: ignore[index]
            torch.testing.assert_close(served(IDS), model(IDS), rtol=0, atol=atol)
    again = compressed(method, init="fresh")
    again.load_state_dict(model.state_dict())
    for same in (again, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(same(IDS), model(IDS))
        assert same.scores.table is same.item
    back = copy.deepcopy(model)
    rse.materialize_(back)
    assert type(back.scores) is nn.Linear
    assert back.scores.weight is back.item.weight
    torch.testing.assert_close(back(IDS), model(IDS))


def test_optimizers_step_the_table_once_and_get_no_other_parameter() -> None:
    model = NextItem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = {"item": rse.HashConfig(num_buckets=50)}
    rse.compress_(model, plan, optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    before = model.item.table("weight").detach().clone()
    F.cross_entropy(model(IDS), IDS).backward()
    optimizer.step()
    torch.testing.assert_close(model.item.table("weight"), before - 0.1 * model.item.table("weight").grad)  # type: ignore[operator]
    rse.compress_(model, {"item": rse.LowdimConfig(dim=4)}, optimizer=optimizer)
    assert model.scores.table is model.item
    assert len(list(model.parameters())) == len(optimizer.param_groups[0]["params"]) == 5


def test_rows_that_are_elsewhere_between_calls_are_fetched_by_the_tables_hooks() -> None:
    model = compressed("lowdim")
    wanted, values = model(IDS), {name: p.detach().clone() for name, p in model.item.named_parameters()}

    def fetch(module: nn.Module, inputs: Any) -> None:
        for name, value in values.items():
            module._parameters[name] = nn.Parameter(value)

    def drop(module: nn.Module, inputs: Any, output: Any) -> None:
        for name, value in values.items():
            module._parameters[name] = nn.Parameter(value.to("meta"))

    model.item.register_forward_pre_hook(fetch)
    model.item.register_forward_hook(drop)
    assert torch.equal(model(IDS), wanted)
    assert model.item.table("weight").is_meta


def test_hooks_and_attributes_stay_and_the_weight_cannot_be_set() -> None:
    model = NextItem()
    calls: list[int] = []
    handle = model.scores.register_forward_hook(lambda *a: calls.append(1))
    model.scores.label, model.scores.training = "next", False
    rse.compress_(model, {"item": rse.HashConfig(num_buckets=50)})
    model(IDS)
    assert (calls, model.scores.label, model.scores.training) == ([1], "next", False)
    handle.remove()
    model(IDS)
    assert calls == [1]
    with pytest.raises(ConfigError, match="materialize_"):
        model.scores.weight = nn.Parameter(torch.zeros(500, 8))
    assert "tied" in repr(model.scores)


def test_a_layer_whose_table_left_the_model_says_so(tmp_path: Path) -> None:
    model = compressed("hash")
    kept, model.item = model.item, nn.Embedding(500, 8)
    with pytest.raises(ConfigError, match="scores scores by a compressed table that is no longer in the model"):
        rse.export(model, tmp_path / "m")
    del kept
    for act in (lambda: model(IDS), lambda: copy.deepcopy(model), lambda: model.scores.weight):
        with pytest.raises(ConfigError, match=r"is gone.*materialize_"):
            act()


class Own(NextItem):
    """Built with a drop-in of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.item = rse.FullEmbedding(500, 8, padding_idx=0)
        self.scores.weight = self.item.table("weight")


@pytest.mark.parametrize("into", [Own, NextItem])
def test_drop_ins_that_users_tied_stay_tied(into: type[NextItem], tmp_path: Path) -> None:
    model = Own()
    (table,) = find_tables(model)
    assert (table.tied, table.output_layers) == (("scores.weight",), (model.scores,))
    for precision, atol in (("fp32", 0.0), ("int8", 0.1)):
        rse.export(model, tmp_path / "m", precision)  # type: ignore[arg-type]
        served = rse.load(tmp_path / "m", into=into())
        assert served.scores.table is served.item  # type: ignore[union-attr]
        torch.testing.assert_close(served(IDS), model(IDS), rtol=0, atol=atol)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rse.compress_(model, {"item": rse.LowdimConfig(dim=2)}, optimizer=optimizer)
    assert model.scores.table is model.item
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    rse.materialize_(model, optimizer=optimizer)
    assert model.scores.weight is model.item.weight


def test_stored_rows_that_another_layer_holds_are_an_obstacle(tmp_path: Path) -> None:
    model = nn.ModuleDict({"item": rse.HashEmbedding(500, 8, num_buckets=20), "net": nn.Linear(8, 20, bias=False)})
    model["net"].weight = model["item"].table("weight")
    acts = (
        lambda: rse.compress_(model, {"item": rse.LowdimConfig(dim=2)}),
        lambda: rse.materialize_(model),
        lambda: rse.export(model, tmp_path / "m"),
    )
    for act in acts:
        with pytest.raises(ConfigError, match=r"its weight is also net\.weight"):
            act()


def test_plans_made_without_the_table_leave_it_and_its_layer_as_they_are(tmp_path: Path) -> None:
    model = NextItem()
    model.user = nn.Embedding(300, 8)
    report = rse.compress_(model, {"user": rse.HashConfig(num_buckets=30)})
    assert report["item"].action == "skipped"
    assert "scores.weight" in report["item"].note
    assert model.scores.weight is model.item.weight
    rse.export(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"scores\.weight"):
        rse.load(tmp_path / "m", into=compressed("hash"))


def test_ids_of_one_row_have_one_score_whatever_the_network() -> None:
    class Wide(NextItem):
        def __init__(self) -> None:
            super().__init__()
            self.others = nn.ModuleList(nn.Embedding(50, 8) for _ in range(9))
            self.wide = nn.Linear(80, 8)

    model = Wide()
    assert network_context(model, rse.Schema.from_model(model)).without_network == {"item"}


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: layer.register_buffer("weight", torch.zeros(1)),
        lambda layer: delattr(layer, "weight"),
    ],
)
def test_the_weight_of_a_tied_layer_is_no_parameter(change: Any) -> None:
    """Refused in words before anything changes, also of a copy; a plain layer again takes all of it."""
    model = nn.ModuleDict({"item": nn.Embedding(60, 8), "scores": nn.Linear(8, 60)})
    model["scores"].weight = model["item"].weight
    rse.compress_(model, {"item": rse.HashConfig(num_buckets=10)})
    x = torch.rand(2, 8)
    for tied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before, state = tied["scores"](x), list(tied.state_dict())
        with pytest.raises(ConfigError, match="materialize_"):
            change(tied["scores"])
        assert torch.equal(tied["scores"](x), before)
        assert list(tied.state_dict()) == state
    rse.materialize_(model)
    model["scores"].weight = nn.Parameter(model["item"].weight.detach().clone())
    parametrizations.weight_norm(model["scores"])
    torch.testing.assert_close(model["scores"](x), before)
