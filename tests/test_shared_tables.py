"""Several features that read one table, against one module that is read several times and dense torch optimizers."""

from __future__ import annotations

from collections.abc import Mapping
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
from recsys_embed.registry import MethodInfo, list_methods

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
