"""Vectors of single ids, unpooled: the same as pooled bags of one id, the same tables, one step per backward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import SGD, Adagrad, Adam, EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import ConfigError, IdRangeError, UnknownNameError
from recsys_embed.optim import FusedOptimizer, fused_optimizer
from recsys_embed.registry import MethodInfo, list_methods
from recsys_embed.utils.types import BagIds

N, WIDTH, PAD = 61, 8, 5
METHODS = [pytest.param(m, id=m.name) for m in list_methods()]
HISTORY = torch.tensor([[7, 3, 7, PAD], [60, PAD, PAD, PAD], [0, 1, 2, 3]])
IDS = torch.tensor([[4, 7, 3], [39, 60, 0], [4, PAD, 3]])


def schema_of(pooling: Any = "mean") -> Schema:
    return Schema(
        [
            FeatureSpec("user", 40, WIDTH, init="normal:1"),
            FeatureSpec("item", N, WIDTH, init="normal:1"),
            FeatureSpec("history", N, WIDTH, pooling, init="normal:1", table="item", padding_idx=PAD),
        ]
    )


def collection(name: str, rule: FusedOptimizer | None, backend: str) -> EmbeddingCollection:
    schema = schema_of()
    cls, spec = rse.get_method(name).config_cls, schema["item"]
    config = cls.for_budget(spec, max(N * WIDTH * 2, cls.sized(spec, 1).footprint(spec).serve))
    plan = Plan({**Plan.full(schema).configs, "item": config, "history": config})
    return EmbeddingCollection(schema, plan, rule, backend=backend)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_is_a_bag_of_one_id(method: MethodInfo, backend: str) -> None:
    coll = collection(method.name, None, backend)
    width = coll.bundle.widths[2]
    for ids in (HISTORY, HISTORY.int(), HISTORY[0, 0], HISTORY[:0], HISTORY.view(3, 2, 2)):
        found = coll.lookup("history", ids)
        assert found.shape == (*ids.shape, width)
        flat = ids.reshape(-1).long()
        each = coll(torch.stack([torch.zeros_like(flat), flat, flat], 1)).flatten(1)[:, -width:]
        torch.testing.assert_close(found.reshape(-1, width), each.view(-1, width))
    assert not coll.lookup("history", HISTORY)[0, 3].any()
    torch.testing.assert_close(coll.lookup("item", HISTORY[2]), coll.lookup("history", HISTORY[2]))


def loss(coll: Any, tables: Any = None) -> Tensor:
    """A pooled and two unpooled reads of one table, by the collection or by torch's modules."""
    if tables is None:
        pooled, items, history = coll(IDS).flatten(1), coll.lookup("item", IDS[:, 1]), coll.lookup("history", HISTORY)
    else:
        padded = (HISTORY != PAD).unsqueeze(-1), (IDS[:, 2:] != PAD)
        rows = [tables["user"](IDS[:, 0]), tables["item"](IDS[:, 1]), tables["item"](IDS[:, 2]) * padded[1]]
        pooled, items, history = torch.cat(rows, 1), tables["item"](IDS[:, 1]), tables["item"](HISTORY) * padded[0]
    score = (history * items.unsqueeze(1)).sum(-1)
    return (score.softmax(1).unsqueeze(-1) * history).sum(1).square().sum() + pooled.square().sum()


@pytest.mark.parametrize("mode", ["backward", "step"])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_lookups_of_one_backward_are_one_step(rule: str, backend: str, mode: str) -> None:
    made = {"sgd": SGD(lr=0.1), "adagrad": Adagrad(lr=0.1), "adam": Adam(lr=0.1, rows="all")}[rule]
    coll = EmbeddingCollection(schema_of(), None, made, backend=backend)
    tables = nn.ModuleDict({"user": nn.Embedding(40, WIDTH), "item": nn.Embedding(N, WIDTH)})
    with torch.no_grad():
        for name, module in tables.items():
            module.weight.copy_(coll.table(f"{name}.weight"))
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}
    dense = kinds[rule](tables.parameters(), lr=0.1)
    stepper = fused_optimizer(coll) if mode == "step" else None
    for _ in range(3):
        dense.zero_grad()
        loss(None, tables).backward()
        dense.step()
        loss(coll).backward()
        if stepper is not None:
            stepper.step()
            stepper.zero_grad()
    for name, module in tables.items():
        torch.testing.assert_close(coll.table(f"{name}.weight"), module.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_trains_as_torchs_gradients_do(method: MethodInfo) -> None:
    """Native kernels in one step per backward, against the ordinary gradients of the reference."""
    fused, plain = collection(method.name, SGD(lr=0.1), "native"), collection(method.name, None, "reference")
    loss(fused).backward()
    loss(plain).backward()
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        stepped = theirs - 0.1 * theirs.grad if name in fused.storages and theirs.grad is not None else theirs
        torch.testing.assert_close(mine, stepped, msg=name)
        if name not in fused.storages:
            torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("rule", [None, SGD(lr=0.1), Adam(lr=0.1, rows="all")])
@pytest.mark.parametrize("name", ["memcom", "lowdim"])
def test_compiled_as_one_graph(name: str, rule: FusedOptimizer | None) -> None:
    coll = collection(name, rule, "auto")
    eager = copy.deepcopy(coll)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: loss(coll), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        mine, theirs = compiled(), loss(eager)
        torch.testing.assert_close(mine, theirs)
        mine.backward()
        theirs.backward()
    coll.eval(), eager.eval()
    for (key, a), b in zip(coll.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_of_an_export(tmp_path: Any) -> None:
    coll = collection("hash", None, "auto").eval()
    for precision in ("fp32", "int8"):
        rse.export(coll, tmp_path / "model.safetensors", precision)
        served = rse.load(tmp_path / "model.safetensors")
        within = {"rtol": 0.0, "atol": 0.0} if precision == "fp32" else {"rtol": 0.1, "atol": 0.05}
        torch.testing.assert_close(served.lookup("history", HISTORY), coll.lookup("history", HISTORY), **within)
        assert served.lookup("history", HISTORY)[1, 1:].any() == torch.tensor(False)


def test_copies_and_pickles() -> None:
    coll = collection("freqcut", None, "auto")
    wanted = coll.lookup("history", HISTORY)
    for other in (copy.deepcopy(coll), pickle.loads(pickle.dumps(coll))):
        other.assign_({"item": torch.arange(N)})
        torch.testing.assert_close(
            other.lookup("item", HISTORY),
            other(
                torch.zeros(12, 3)
                .long()
                .index_fill(1, torch.tensor([0]), 0)
                .add(HISTORY.view(-1, 1) * torch.tensor([0, 1, 0]))
            )[:, 1].view(3, 4, WIDTH),
        )
    torch.testing.assert_close(coll.lookup("history", HISTORY), wanted)


def test_of_unknown_features_and_ids() -> None:
    coll = collection("full", None, "auto")
    with pytest.raises(UnknownNameError, match="history"):
        coll.lookup("histry", HISTORY)
    with pytest.raises(IdRangeError, match="item"):
        coll.lookup("item", torch.tensor([[N]]))
    with pytest.raises(ConfigError, match="int32 or int64"):
        coll.lookup("item", torch.tensor([[0.5]]))


def test_strings() -> None:
    schema = Schema([FeatureSpec("a", 100, WIDTH, ids="raw")])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, "hash", num_buckets=50))
    found = coll.lookup("a", [["x", "y"], ["z", "x"]])
    assert found.shape == (2, 2, WIDTH)
    torch.testing.assert_close(found[0, 0], coll({"a": ["x"]})[0, 0])


def test_counts_unseen_ids() -> None:
    schema = Schema([FeatureSpec("b", 9, WIDTH), FeatureSpec("a", N, WIDTH, unseen="zero", padding_idx=PAD)])
    coll = EmbeddingCollection(schema)
    assert not coll.lookup("a", torch.tensor([N, -1, PAD])).any()
    coll.lookup("a", torch.tensor([[1]]))
    assert coll.unseen_counts() == {"a": (2, 3), "b": (0, 0)}


def test_bags_as_one_value() -> None:
    coll = collection("hash", None, "auto")
    values, offsets = torch.tensor([1, 2, 3, 4, 5, 6, 7]), torch.tensor([0, 1, 2, 3, 4, 4, 7])
    torch.testing.assert_close(coll(BagIds(values, offsets)), coll(values, offsets))


def test_compiled_and_uncompiled_lookups_do_not_mix() -> None:
    """Of one backward they would be two steps."""
    coll = collection("full", SGD(lr=0.1), "auto")
    torch._dynamo.reset()
    compiled = torch.compile(lambda: coll.lookup("history", HISTORY).sum(), fullgraph=True, backend="aot_eager")
    # Torch is first to see that a table that compiled code has saved was changed in between.
    for number in (1, 2):
        with pytest.raises((ConfigError, RuntimeError), match=r"lookup|modified by an inplace operation"):
            (sum(compiled() for _ in range(number)) + coll(IDS).sum()).backward()
