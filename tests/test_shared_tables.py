"""Several features that read one table, against one module that is read several times and dense torch optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import SGD, Adagrad, Adam, EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.errors import ConfigError
from recsys_embed.optim import FusedOptimizer, unfused_parameters
from recsys_embed.planning.costs import Costs
from recsys_embed.planning.frequencies import with_frequent_ids
from recsys_embed.registry import MethodInfo, list_methods
from recsys_embed.search.studies.space import StudySpace
from recsys_embed.train.rounded_rows import rounded_rows

N, WIDTH, BATCH = 61, 8, 7
METHODS = [pytest.param(m, id=m.name) for m in list_methods()]
BACKENDS = ("native", "torch")
SHARED = ("item", "history", "last")
RULES: dict[str, tuple[FusedOptimizer, Any]] = {
    "sgd": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "adagrad": (Adagrad(lr=0.1, eps=1e-3), lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3)),
    "adam": (Adam(lr=0.1, eps=1e-3, rows="all"), lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-3)),
}


def schema_of(**options: Any) -> Schema:
    """A feature alone, then three of one table, with different poolings."""
    return Schema(
        [
            FeatureSpec("user", 40, WIDTH, init="normal:1"),
            FeatureSpec("item", N, WIDTH, init="normal:1", **options),
            FeatureSpec("history", N, WIDTH, "mean", init="normal:1", table="item", **options),
            FeatureSpec("last", N, WIDTH, "sum", init="normal:1", table="item", **options),
        ]
    )


def config_of(method: MethodInfo) -> MethodConfig:
    spec = FeatureSpec("item", N, WIDTH)
    need = method.config_cls.sized(spec, 1).footprint(spec).serve
    return method.config_cls.for_budget(spec, max(N * WIDTH * 2, need))


def plan_of(config: MethodConfig) -> Plan:
    full = Plan.full(schema_of())
    return Plan({**full.configs, **dict.fromkeys(SHARED, config)})


def ragged(seed: int, counts: tuple[int, ...] = (40, N, N, N), most: int = 4) -> tuple[Tensor, Tensor]:
    """Bags ``(values, offsets)`` of all features; those of the first two have one id."""
    make = torch.Generator().manual_seed(seed)
    sizes = [torch.ones(BATCH, dtype=torch.int64)] * 2
    sizes += [torch.randint(0, most, (BATCH,), generator=make) for _ in counts[2:]]
    values = [torch.randint(n, (int(s.sum()),), generator=make) for n, s in zip(counts, sizes, strict=True)]
    return torch.cat(values), torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(sizes).cumsum(0)])


class OneModule(nn.Module):
    """What the collection stands for: one module per table, read once per feature, pooled by torch."""

    def __init__(self, schema: Schema, tables: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.schema, self.tables = schema, nn.ModuleDict(tables)

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        out = []
        for f, spec in enumerate(self.schema):
            at = offsets[f * BATCH : (f + 1) * BATCH + 1]
            rows = self.tables[spec.table_name](values[at[0] : at[-1]]).flatten(1)
            pooled = []
            for start, stop in zip((at - at[0])[:-1].tolist(), (at - at[0])[1:].tolist(), strict=True):
                bag = rows[start:stop]
                if spec.padding_idx is not None:
                    bag = bag[values[at[0] + start : at[0] + stop] != spec.padding_idx]
                total = bag.sum(0)
                if spec.pooling == "max":
                    total = bag.amax(0) if len(bag) else total
                pooled.append(total / max(len(bag), 1) if spec.pooling == "mean" else total)
            out.append(torch.stack(pooled))
        return torch.cat(out, 1)


def one_module(schema: Schema, config: MethodConfig, seed: int = 3) -> OneModule:
    tables: dict[str, CompressedEmbedding] = {}
    for first in schema.first_readers:
        chosen = config if first.table_name == "item" else Plan.full(schema)["user"]
        cls = rse.registry.get_method(chosen.method).embedding_cls
        module = cls(first.num_embeddings, WIDTH, config=chosen, name=first.table_name, init="normal:1")
        module.reset_parameters(seed)
        tables[first.table_name] = module
    return OneModule(schema, tables)


def run(model: nn.Module, seed: int) -> Tensor:
    out: Tensor = model(*ragged(seed))
    out = out.flatten(1)
    return (out * torch.linspace(-1, 1, out.shape[1])).square().sum()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_is_one_module_that_is_read_several_times(method: MethodInfo, backend: str, rule: str) -> None:
    fused, dense = RULES[rule]
    schema, config = schema_of(), config_of(method)
    coll = EmbeddingCollection(schema, plan_of(config), fused, seed=3, backend=backend)
    oracle = one_module(schema, config)
    rest = list(unfused_parameters(coll))
    mine = dense(rest) if rest else None
    theirs = dense(oracle.parameters())
    for seed in range(3):
        for model, optimizer in ((coll, mine), (oracle, theirs)):
            if optimizer is not None:
                optimizer.zero_grad()
            run(model, seed).backward()
            if optimizer is not None:
                optimizer.step()
    coll.eval(), oracle.eval()
    values, offsets = ragged(9)
    torch.testing.assert_close(coll(values, offsets).flatten(1), oracle(values, offsets), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_torchs_embedding_that_is_read_several_times(backend: str) -> None:
    schema = schema_of()
    coll = EmbeddingCollection(schema, None, Adagrad(lr=0.1), backend=backend)
    oracle = OneModule(schema, {"user": nn.Embedding(40, WIDTH), "item": nn.Embedding(N, WIDTH)})
    with torch.no_grad():
        for name, module in oracle.tables.items():
            module.weight.copy_(coll.table(f"{name}.weight"))
    optimizer = torch.optim.Adagrad(oracle.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        run(coll, seed).backward()
        run(oracle, seed).backward()
        optimizer.step()
    for name, module in oracle.tables.items():
        torch.testing.assert_close(coll.table(f"{name}.weight"), module.weight)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_counted_once(method: MethodInfo) -> None:
    schema, config = schema_of(), config_of(method)
    coll = EmbeddingCollection(schema, plan_of(config), SGD(lr=0.1))
    alone = Schema([schema["user"], schema["item"]])
    plan = Plan({n: plan_of(config)[n] for n in alone.names})
    assert coll.footprint() == EmbeddingCollection(alone, plan, SGD(lr=0.1)).footprint()
    assert coll.plan.footprint(schema) == plan.footprint(alone)
    assert coll.state_dict().keys() == EmbeddingCollection(alone, plan, SGD(lr=0.1)).state_dict().keys()


def test_features_of_one_table_have_to_agree() -> None:
    with pytest.raises(ConfigError) as e:
        Schema([FeatureSpec("a", 10, 4, table="t"), FeatureSpec("b", 20, 8, table="t", unseen="zero")])
    assert all(word in str(e.value) for word in ("'t'", "num_embeddings", "embedding_dim", "unseen"))
    schema = schema_of()
    full, other = Plan.full(schema), Plan.uniform(schema, "hash", num_buckets=7)
    with pytest.raises(ConfigError, match=r"one configuration .* 'item'"):
        Plan({**full.configs, "last": other["last"]}).check(schema)


def test_texts_without_them_are_as_before() -> None:
    spec = FeatureSpec("a", 10, 4)
    text = Schema([spec]).to_dict()
    assert set(text["features"][0]) == {"name", "num_embeddings", "embedding_dim", "pooling", "ids", "init"}
    shared = schema_of(padding_idx=3)
    assert Schema.from_dict(shared.to_dict()) == shared


def test_counts_are_summed() -> None:
    schema = schema_of()
    config = rse.registry.get_method("freqcut").config_cls(num_frequent=1, order="counts")
    coll = EmbeddingCollection(schema, plan_of(config))
    item, history = torch.zeros(N, dtype=torch.int64), torch.zeros(N, dtype=torch.int64)
    item[4], item[5], history[6], history[5] = 3, 2, 3, 2
    coll.assign_({"item": item, "history": history})
    index = coll.bundle.kernel.index
    places = [index.value(list(coll.bundle.programs).index(n), "kept").tolist() for n in SHARED]
    assert places == [[5], [5], [5]]


@pytest.mark.parametrize("method", METHODS)
def test_reports_count_once(method: MethodInfo) -> None:
    schema, plan = schema_of(), plan_of(config_of(method))
    alone = Schema([schema["user"], schema["item"]])
    part = Plan({n: plan[n] for n in alone.names})
    for rule in (SGD(lr=0.1), Adam(lr=0.1)):
        for source in (EmbeddingCollection(schema, plan, rule), plan):
            report = rse.memory_report(source, schema=schema if source is plan else None, optimizer=rule)
            wanted = rse.memory_report(part, schema=alone, optimizer=rule)
            for when in ("serve", "train"):
                assert report.total(when) == wanted.total(when)
            assert {t.name for t in report.tables} >= set(schema.names)
        assert Costs(rule, train=True).plan(plan, schema) == Costs(rule, train=True).plan(part, alone)


def test_planned_as_one_table() -> None:
    schema = Schema([s if s.name == "user" else replace(s, num_embeddings=5000) for s in schema_of()])
    counts = {"user": torch.arange(40), "item": torch.arange(5000), "history": 5 * torch.arange(5000).flip(0)}
    summed = {"user": counts["user"], "item": counts["item"] + counts["history"]}
    alone = schema.first_readers
    for methods in (None, ["full", "hash", "freqcut"]):
        plan = rse.plan_for_budget(schema, "40KiB", methods=methods, stats=counts)
        wanted = rse.plan_for_budget(alone, "40KiB", methods=methods, stats=summed, importance={"item": 3})
        assert plan["item"] == plan["history"] == plan["last"] == wanted["item"]
        assert plan["user"] == wanted["user"]
        assert (plan.notes, plan.sets) == (wanted.notes, wanted.sets)
        assert plan.footprint(schema) == wanted.footprint(alone)
        assert "one table for item, history, last" in plan.reasons["last"]
        EmbeddingCollection(schema, plan)
    with pytest.raises(ConfigError, match=r"'item'.*'hash' of 'item', 'full' of 'last'"):
        rse.plan_for_budget(schema, "1MiB", pin={"item": "hash", "last": "full"})
    pinned = rse.plan_for_budget(schema, "1MiB", pin={"last": "hash"}, forbid={"user": "full"})
    assert pinned["item"].method == "hash"
    assert pinned["user"].method != "full"
    uniform = Plan.uniform(schema, "hash", budget="40KiB")
    assert uniform.footprint(schema).serve <= 40 * 1024
    assert uniform["item"] == uniform["last"]


def test_sets_of_ids_are_one_per_table() -> None:
    schema = schema_of()
    config = rse.get_method("freqcut").config_cls(num_frequent=2, order="counts")
    plan = with_frequent_ids(plan_of(config), schema, {"item": torch.arange(N), "last": torch.arange(N).flip(0) * 3})
    assert list(plan.sets) == ["item"]
    assert plan.members(schema["item"])["kept"].tolist() == [0, 1]
    coll = EmbeddingCollection(schema, Plan.from_dict(plan.to_dict()))
    index = coll.bundle.kernel.index
    assert [index.value(i, "kept").tolist() for i in (1, 2, 3)] == [[0, 1]] * 3
    with pytest.raises(ConfigError, match="one set of ids"):
        replace(plan, sets={**plan.sets, "last": {"kept": "5"}}).check(schema)
    EmbeddingCollection(schema, replace(plan, sets={"last": plan.sets["item"], "item": plan.sets["item"]}))


@pytest.mark.parametrize("method", METHODS)
def test_exports_hold_it_once(method: MethodInfo, tmp_path: Path) -> None:
    schema, plan = schema_of(padding_idx=4), plan_of(config_of(method))
    coll = EmbeddingCollection(schema, plan).eval()
    report = rse.export(coll, tmp_path / "model.safetensors")
    alone = Schema([schema["user"], schema["item"]])
    other = EmbeddingCollection(alone, Plan({n: plan[n] for n in alone.names})).eval()
    assert report.embedding_bytes == rse.export(other, tmp_path / "other.safetensors").embedding_bytes
    served = rse.load(tmp_path / "model.safetensors")
    with rounded_rows(coll):  # tiers are served at precisions of their own, and added in another order
        torch.testing.assert_close(served(*ragged(5)), coll(*ragged(5)), rtol=0, atol=1e-6)
    restored = EmbeddingCollection(schema, plan, seed=9)
    restored.load_state_dict(coll.state_dict())
    assert torch.equal(restored.eval()(*ragged(5)), coll(*ragged(5)))
    stored = rse.memory_report(tmp_path / "model.safetensors") if method.name == "hash" else None
    assert stored is None or stored.total("serve") == rse.memory_report(coll).total("serve")


def test_a_study_chooses_per_table() -> None:
    schema = schema_of()
    space = StudySpace(schema, {"8KiB": 8192}, ("hash", "freqcut"), groups=1)
    names = list(space.fields.values())
    assert [[s.name for s in group] for group in names] == [["user", "item"]]
    params = {"budget": "8KiB", "all.method": "hash", "all.width": WIDTH, "all.share": 1.0}
    group = next(iter(space.fields))
    plan = space.plan({k.replace("all", group): v for k, v in params.items()})
    plan.check(schema)
    assert plan["item"] == plan["last"]
    assert plan.footprint(schema).serve <= 8192
