"""What the memory report finds in models of all kinds, in plans and in statistics alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed import FeatureSpec, Plan, Schema
from recsys_embed.core.footprint import Footprint
from recsys_embed.embedding.shared_tables import SharedTables
from recsys_embed.errors import ConfigError, UnknownNameError
from recsys_embed.report.memory import memory_report
from recsys_embed.report.memory.plan import arrays_of


def test_plain_tables_of_a_tree() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Embedding(100, 8),
            "deep": nn.ModuleList([nn.EmbeddingBag(50, 4, mode="mean"), nn.Linear(8, 3)]),
        }
    )
    report = memory_report(model)
    assert [(t.name, t.method, t.storage.kind) for t in report.tables] == [
        ("a", "full", "embedding"),
        ("deep/0", "full", "embedding_bag"),
    ]
    assert report.total("serve") == 100 * 8 * 4 + 50 * 4 * 4
    assert report.rest.weights == (8 * 3 + 3) * 4
    assert report.share == pytest.approx(4000 / 4108)
    assert report["a"].storage.paths == ("a",)
    with pytest.raises(UnknownNameError, match="did you mean 'deep/0'"):
        report["deep/1"]


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(1000, 8)
            self.again = nn.Embedding(1000, 8)
            self.again.weight = self.emb.weight
            self.head = nn.Linear(8, 1000, bias=False)
            self.head.weight = self.emb.weight

    report = memory_report(Tied(), optimizer="adam")
    (table,) = report.tables
    assert table.storage.paths == ("emb", "again")
    assert report.total("serve", "model") == report.total("serve") == 32_000
    assert report.total("train", "model") == 4 * 32_000 + 4
    assert any("head.weight" in n for n in report.notes)


def test_frozen_tables_train_for_nothing() -> None:
    model = nn.Embedding.from_pretrained(torch.zeros(100, 8))
    report = memory_report(model, optimizer="adam")
    assert (report.total("train"), report.footprint.optimizer, report.footprint.gradient) == (3200, 0, 0)


def test_buffers_of_the_rest_are_counted() -> None:
    report = memory_report(nn.Sequential(nn.Embedding(10, 4), nn.BatchNorm1d(4)))
    assert (report.rest.weights, report.rest.buffers) == (32, 2 * 16 + 8)


def test_tables_too_large_to_allocate() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(10**9, 128), nn.EmbeddingBag(10**8, 64))
        ours = rse.make_embedding("hash", 10**9, 64, budget="100GiB")
    report = memory_report(model, optimizer="adam")
    assert report.total("serve") == 4 * (10**9 * 128 + 10**8 * 64)
    assert memory_report(ours).total("serve") <= 100 * 2**30
    schema = Schema([FeatureSpec("big", 2**31 - 1, 256)])
    assert memory_report(schema).total("serve") == 4 * 256 * (2**31 - 1)


def test_a_thousand_tables_in_seconds() -> None:
    schema = Schema([FeatureSpec(f"f{i}", 10**6 + 997_000 * i, 16 + i % 3) for i in range(1000)])
    start = time.perf_counter()
    text = memory_report(schema, optimizer="rowwise_adagrad").to_text()
    assert "970 smaller ones" in text
    assert time.perf_counter() - start < 60


def test_torchrec_tables() -> None:
    torchrec = pytest.importorskip("torchrec")
    config = torchrec.modules.embedding_configs.EmbeddingBagConfig
    tables = [config(name=f"t{i}", embedding_dim=8, num_embeddings=100 * i, feature_names=[f"f{i}"]) for i in (1, 2)]
    model = nn.ModuleDict({"sparse": torchrec.EmbeddingBagCollection(tables=tables), "over": nn.Linear(16, 1)})
    report = memory_report(model, optimizer="adam")
    assert [t.storage.kind for t in report.tables] == ["torchrec_ebc"] * 2
    assert report.total("serve") == 300 * 8 * 4
    assert report.total("train") == 4 * 300 * 8 * 4 + 2 * 4
    assert report.rest.weights == 17 * 4


def test_drop_ins_that_share_a_table() -> None:
    from recsys_embed.core.program import Initializer, Table

    tables = SharedTables([Table("unified", 100, 4, Initializer("uniform", 0.05), shared=True)])
    model = nn.ModuleDict({n: rse.UnifiedEmbedding(1000, 16, num_buckets=100, name=n, shared=tables) for n in "ab"})
    report = memory_report(model, batch_size=10)
    assert report.total("serve") == sum(p.nbytes for p in model.parameters()) == 1600
    shared = report["unified"]
    assert (shared.storage.kind, shared.storage.read_by, shared.serve) == ("shared", ("a", "b"), 1600)
    assert report["a"].storage.shared == ("unified",)
    assert report["a"].serve == 0


def test_shared_arrays_of_a_plan_count_once() -> None:
    schema = Schema([FeatureSpec(f"f{i}", 5000, 16) for i in range(4)])
    plan = Plan.uniform(schema, "unified", budget="64KiB")
    report = memory_report(plan, schema=schema)
    assert report.total("serve") == plan.footprint(schema).serve
    assert report["unified"].storage.read_by == schema.names
    assert all(report[n].serve == 0 for n in schema.names)


def test_same_collection_at_two_places_counts_once() -> None:
    schema = Schema([FeatureSpec("a", 100, 8)])
    coll = rse.EmbeddingCollection(schema)
    assert memory_report(nn.ModuleList([coll, coll])).total("serve") == 3200


def test_model_without_tables_says_so() -> None:
    report = memory_report(nn.Linear(3, 3))
    assert (report.total("serve"), report.tables) == (0, ())
    assert "no embedding table was found in the model" in report.notes
    assert "Linear: 0 embedding tables" in str(report)


def test_lazy_parameters_are_named() -> None:
    report = memory_report(nn.Sequential(nn.Embedding(10, 4), nn.LazyLinear(3)))
    assert any("2 parameters have no shape yet" in n for n in report.notes)


def test_unknown_things_are_refused() -> None:
    schema = Schema([FeatureSpec("a", 100, 8)])
    with pytest.raises(ConfigError, match="`source` must be"):
        memory_report(3)
    with pytest.raises(ConfigError, match=r"needs the features it is for: memory_report\(plan, schema=schema\)"):
        memory_report(Plan.full(schema))
    with pytest.raises(UnknownNameError, match="did you mean 'adam'"):
        memory_report(schema, optimizer="adm")
    with pytest.raises(ConfigError, match="`optimizer` must be a name"):
        memory_report(schema, optimizer=3)
    with pytest.raises(UnknownNameError, match="did you mean 'int8'"):
        memory_report(schema, precision="int9")  # type: ignore[arg-type]
    wrong = {"batch_size": 0, "ids_per_sample": -1, "ratio": 0.5, "schema": 5, "embedding_dim": 0}
    for key, value in (*wrong.items(), ("batch_size", True), ("embedding_dim", 65537)):
        with pytest.raises(ConfigError, match=f"`{key}` must"):
            memory_report(nn.Embedding(3, 2), **{key: value})
    with pytest.raises(ConfigError, match="5 faults"):
        memory_report(schema, **wrong)
    with pytest.raises(UnknownNameError, match="unknown total"):
        memory_report(schema).total("serving")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="LBFGS"):
        memory_report(nn.Embedding(3, 2), optimizer=torch.optim.LBFGS)


def test_names_of_no_table_are_refused() -> None:
    model = nn.ModuleDict({"tower": nn.ModuleDict({"user": nn.Embedding(10, 4)})})
    memory_report(model, stats={"tower/user": [1] * 10}, ids_per_sample={"user": 3})
    with pytest.raises(ConfigError) as caught:
        memory_report(model, stats={"tower/usr": [1] * 10}, ids_per_sample={"user": 3, "uer": 2, 7: 1})
    for text in ("3 faults", "`stats` 'tower/usr'; did you mean 'tower/user'", "'uer'; did you mean 'user'", "'7'"):
        assert text in str(caught.value)


def test_batches_and_ids_per_sample_decide_what_a_lookup_takes() -> None:
    schema = Schema([FeatureSpec("a", 10_000, 8), FeatureSpec("b", 10_000, 8)])
    one = memory_report(schema, batch_size=100)
    many = memory_report(schema, batch_size=100, ids_per_sample={"a": 5})
    assert many["b"].lookup == one["b"].lookup
    assert many["a"].lookup > 4 * one["a"].lookup
    assert one.total("peak") == one.total("train") + sum(t.activations for t in one.tables)
    assert one["a"].activations >= one["a"].lookup


@pytest.mark.parametrize("info", rse.list_methods(), ids=lambda m: m.name)
def test_lookup_is_near_what_a_forward_allocates(info: rse.MethodInfo) -> None:
    """Bytes of all results of operations of one forward bound what it holds at once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Outputs(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[torch.Tensor] = []  # kept, so that no memory is used twice

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.made += [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
            return out

    module = rse.make_embedding(info.name, 50_000, 32, **({} if info.name == "full" else {"budget": "1MiB"}))
    ids = torch.randint(0, 50_000, (2000,))
    with torch.no_grad(), Outputs() as outputs:
        module(ids)
    # Hashing makes several integers on the way to each row number, which are gone before rows are read.
    numbers = 40 * ids.nbytes * max(1, memory_report(module).tables[0].storage.row_reads)
    said = memory_report(module, batch_size=2000).tables[0].lookup
    made = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in outputs.made}.values())
    assert said - ids.nbytes <= made <= 3 * said + numbers
    assert said >= 2000 * 32 * 4


@pytest.mark.parametrize("itemsize", [4, 2])
def test_networks_of_a_method_that_computes_are_dense_arrays(itemsize: int) -> None:
    """Weights that no table of the program has, as a generator of vectors has them."""

    @dataclass(frozen=True, kw_only=True)
    class Generated(rse.get_method("hash").config_cls):  # type: ignore[misc]
        computes = True

        def footprint(self, spec: FeatureSpec, itemsize: int = 4) -> Footprint:
            return super().footprint(spec, itemsize) + Footprint(weights=itemsize * 123)

    spec, config = FeatureSpec("a", 5000, 8), Generated(num_buckets=10)
    arrays = arrays_of(spec, config, config.program(spec), itemsize)
    assert [(a.name, a.elements, a.nbytes) for a in arrays if a.role == "dense"] == [("network", 123, itemsize * 123)]
    assert sum(a.nbytes for a in arrays) == config.footprint(spec, itemsize).serve
