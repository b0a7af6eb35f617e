"""Rules by name: what is registered is known wherever a rule is named, and no class passes for the one it extends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import BackendError, ConfigError, UnknownNameError
from recsys_embed.kernels.native import library as native_library
from recsys_embed.optim import FusedOptimizer, list_rules, make_rule, register_rule, registry, rule_name
from recsys_embed.report.memory import memory_report
from recsys_embed.search.optembed import OptembedSearch, OptembedSettings
from recsys_embed.train import TrainConfig
from recsys_embed.train.build import make_optimizer

SCHEMA = Schema([FeatureSpec("C1", 50, 8), FeatureSpec("C2", 3000, 8)])


@dataclass(frozen=True)
class SignSGD(rse.SGD):
    """Steps of one length."""

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        return weight.sub(grad.sign(), alpha=lr)


@pytest.fixture
def sign_sgd() -> Iterator[str]:
    register_rule("sign_sgd")(SignSGD)
    yield "sign_sgd"
    del registry._RULES["sign_sgd"]


def test_a_registered_rule_is_known_wherever_one_is_named(sign_sgd: str) -> None:
    assert sign_sgd in list_rules()
    assert rule_name(SignSGD()) == sign_sgd
    config = TrainConfig(embedding_optimizer=sign_sgd, embedding_learning_rate=0.5, embedding_weight_decay=0.1)
    assert make_optimizer(config) == SignSGD(lr=0.5, weight_decay=0.1, rows="all")
    plan = rse.plan_for_budget(SCHEMA, "80KiB", target="train", optimizer=sign_sgd)
    assert plan == rse.plan_for_budget(SCHEMA, "80KiB", target="train", optimizer="sgd")
    coll = EmbeddingCollection(SCHEMA, plan, SignSGD(), backend="torch")
    assert memory_report(coll, optimizer=sign_sgd).footprint.optimizer == coll.footprint().optimizer == 0


def test_unknown_names_and_options_are_told_with_those_that_are_known(sign_sgd: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown optimizer 'adm'; did you mean 'adam'\? Known: .*sign_sgd"):
        make_rule("adm")
    for build in (
        lambda: TrainConfig(embedding_optimizer="adagrd"),
        lambda: rse.plan_for_budget(SCHEMA, "80KiB", optimizer="adagrd"),
        lambda: memory_report(EmbeddingCollection(SCHEMA), optimizer="adagrd"),
    ):
        with pytest.raises(ConfigError, match="unknown optimizer 'adagrd'; did you mean 'adagrad'"):
            build()
    for args, fault in (({"epsilon": 1}, "epsilon"), ({"lr": 1.0}, "embedding_learning_rate"), ({"eps": -1}, "eps")):
        with pytest.raises(ConfigError, match=rf"embedding_optimizer_args.*{fault}|{fault}.*embedding_optimizer_args"):
            make_optimizer(TrainConfig(embedding_optimizer_args=args))


def test_names_stand_for_one_rule_each() -> None:
    for name, cls, fault in (
        ("adam", SignSGD, "'adam' is already registered by Adam"),
        ("none", SignSGD, "'none' means that no rule"),
        ("torch", torch.optim.SGD, "a rule is a subclass of"),
    ):
        with pytest.raises(ConfigError, match=fault):
            register_rule(name)(cls)  # type: ignore[type-var]


def variant(cls: type[FusedOptimizer]) -> type[FusedOptimizer]:
    """A rule that extends another and moves the other way."""

    def update(self: Any, weight: Tensor, *args: Any) -> Tensor:
        return weight + (weight - cls.update(self, weight, *args))

    return dataclass(frozen=True)(type(f"Other{cls.__name__}", (cls,), {"update": update, "__annotations__": {}}))


@pytest.mark.parametrize("name", list_rules())
def test_a_rule_that_extends_another_is_not_taken_for_it(name: str) -> None:
    cls = type(make_rule(name))
    own = variant(cls)(lr=0.1)
    assert rule_name(own) is None
    if not isinstance(native_library.library(), str):
        with pytest.raises(BackendError, match=rf"does not know the rule of .*Other{cls.__name__}"):
            EmbeddingCollection(SCHEMA, None, own, backend="native")
    twins = [EmbeddingCollection(SCHEMA, None, rule) for rule in (make_rule(name, lr=0.1), own)]
    assert twins[1].backend == "torch"
    before = twins[0].table("C1.weight")[:4].clone()
    for coll in twins:
        coll(torch.tensor([[0, 0], [1, 0], [2, 0], [3, 0]])).square().sum().backward()
    ours, theirs = (coll.table("C1.weight")[:4] - before for coll in twins)
    assert bool((ours != 0).any())
    torch.testing.assert_close(theirs, -ours)


@pytest.mark.parametrize("name", list_rules())
def test_torchrec_updates_by_a_rule_it_has_and_by_no_other(name: str) -> None:
    update = pytest.importorskip("recsys_embed.sharding.fused_updates", exc_type=ImportError)
    layout = pytest.importorskip("recsys_embed.sharding.physical_tables", exc_type=ImportError)
    rule = make_rule(name)
    tables = Plan.full(SCHEMA).tables(SCHEMA)
    physical = layout.physical_tables_for(tables, rule)["C1.weight"]
    for device in ("cpu", "cuda"):
        if update.fuses(rule, device):
            assert issubclass(update.in_backward(rule, physical)[0], torch.optim.Optimizer)
        other = variant(type(rule))()
        assert not update.fuses(other, device)
        with pytest.raises(ConfigError, match=f"TorchRec has no optimizer .* what Other{type(rule).__name__}"):
            update.in_backward(other, physical)


def test_searches_that_need_adam_refuse_what_extends_it() -> None:
    other = variant(rse.Adam)
    register_rule("other_adam")(other)
    try:
        config = TrainConfig(embedding_optimizer="other_adam", embedding_weight_decay=0.1)
        search = OptembedSearch.__new__(OptembedSearch)
        search.config, search.settings = config, OptembedSettings()
        with pytest.raises(ConfigError, match=r"rows are pruned because weight decay.*got OtherAdam"):
            search.check()
    finally:
        del registry._RULES["other_adam"]


@pytest.mark.parametrize("name", list_rules())
def test_tables_that_torchrec_replicates_step_as_those_of_a_collection(name: str) -> None:
    updates = pytest.importorskip("recsys_embed.sharding.fused_updates", exc_type=ImportError)
    layout = pytest.importorskip("recsys_embed.sharding.physical_tables", exc_type=ImportError)
    rule = make_rule(name, lr=0.1)
    coll = EmbeddingCollection(SCHEMA, None, rule, backend="torch")
    physical = layout.physical_tables_for(coll.tables, rule)["C1.weight"]
    stored = torch.nn.Parameter(physical.pack(coll.table("C1.weight").detach().clone()))
    optimizer = updates.TableOptimizer([("C1", physical, stored)], rule)
    for step in range(6):
        ids = torch.randint(0, 40, (30, 2), generator=torch.Generator().manual_seed(step))
        grad = torch.randn(30, 2, 8, generator=torch.Generator().manual_seed(step))
        coll(ids).view(30, 2, 8).backward(grad)
        stored.grad = physical.pack(torch.zeros(50, 8).index_add_(0, ids[:, 0], grad[:, 0]))
        optimizer.step()
    torch.testing.assert_close(physical.unpack(stored.detach()), coll.table("C1.weight").detach(), rtol=1e-5, atol=1e-6)
