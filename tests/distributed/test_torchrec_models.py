"""TorchRec's own models run unchanged with a compressed collection, and shard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.types import DataType

import recsys_embed as rse
from recsys_embed.errors import ConfigError
from recsys_embed.sharding import CompressedEBC, ManagedEBC, ShardableCollection, schema_of, shard
from recsys_embed.sharding.checkpoint_tensors import weight_tensors
from recsys_embed.sharding.single_machine import from_single, to_single
from tests.distributed.workers import Workers


@pytest.mark.crossed
@pytest.mark.parametrize("kind", ["mixed", "row_wise"])
@pytest.mark.parametrize("method", ["full", "compositional", "unified", "memcom"])
@pytest.mark.parametrize("name", ["dlrm", "deepfm", "dlrm_dcn"])
def test_models_train_as_unsharded(workers: Workers, name: str, method: str, kind: str) -> None:
    for rank in workers.run("torchrec_models", 2, name=name, method=method, kind=kind):
        assert rank["start"] <= 1e-5
        assert rank["after"] <= 1e-5
        assert rank["moved"] > 1e-2
        assert rank["still"] == []


def features() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name="a", num_embeddings=40, embedding_dim=8, feature_names=["f0", "f1"]),
        EmbeddingBagConfig(
            name="b", num_embeddings=30, embedding_dim=8, feature_names=["f2"], pooling=PoolingType.MEAN
        ),
    ]


def test_plain_tables_are_those_of_torchrec() -> None:
    """With weights copied over, the vectors are those of an EmbeddingBagCollection, for any order of the keys."""
    ebc = EmbeddingBagCollection(tables=features())
    ours = CompressedEBC.like(ebc)
    tables = {"a": "a", "f2": "b"}
    for shard_ in ours.collection.shards():
        shard_.take(ebc.state_dict()[f"embedding_bags.{tables[shard_.physical.key.split('.')[0]]}.weight"])
    lengths = torch.tensor([2, 0, 1, 1, 3, 2, 0, 1, 1])
    ids = KeyedJaggedTensor(["f2", "f0", "f1"], torch.arange(11), lengths=lengths)
    found, wanted = ours(ids), ebc(ids)
    assert found.keys() == ["f0", "f1", "f2"]
    for name in found.keys():  # noqa: SIM118 - a KeyedTensor is no dictionary
        torch.testing.assert_close(found[name], wanted[name])
    assert [c.feature_names for c in ours.embedding_bag_configs()] == [["f0", "f1"], ["f2"]]
    assert not ours.is_weighted()


def test_what_cannot_be_said_is_an_error() -> None:
    twice = [*features(), EmbeddingBagConfig(name="c", num_embeddings=9, embedding_dim=8, feature_names=["f0"])]
    with pytest.raises(ConfigError, match="'f0' is served by several tables"):
        CompressedEBC.like(twice)
    half = EmbeddingBagConfig(name="h", num_embeddings=9, embedding_dim=8, feature_names=["h"], data_type=DataType.FP16)
    with pytest.raises(ConfigError, match=r"must be fp32.*got FP16 \(table 'h'\)"):
        CompressedEBC.like([half])
    schema = rse.Schema([rse.FeatureSpec("C1", 10, 4)])
    with pytest.raises(ConfigError, match="`pool` must be 'tables' or 'ids'; got 'bags'"):
        ShardableCollection(schema, pool="bags")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`optimizer` must be a fused optimizer"):
        ShardableCollection(schema, optimizer=torch.optim.SGD)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no ShardableCollection"):
        shard(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no process group"):
        shard(ShardableCollection(schema))


def test_tables_and_poolings_as_configurations() -> None:
    shared = {"num_embeddings": 40, "embedding_dim": 8, "table": "item"}
    schema = rse.Schema(
        [
            rse.FeatureSpec("target", **shared),
            rse.FeatureSpec("user", 30, 8),
            rse.FeatureSpec("history", pooling="mean", **shared),
            rse.FeatureSpec("basket", **shared),
        ]
    )
    configs = CompressedEBC(schema).embedding_bag_configs()
    found = {c.name: (c.feature_names, c.pooling) for c in configs}
    assert found == {
        "item": (["target", "basket"], PoolingType.SUM),
        "user": (["user"], PoolingType.SUM),
        "item_mean": (["history"], PoolingType.MEAN),
    }
    # A feature without a table has one of its own name, which no table of others may take.
    taken = EmbeddingBagConfig(name="f2", num_embeddings=40, embedding_dim=8, feature_names=["f0", "f1"])
    assert set(schema_of([taken, features()[1]]).by_table) == {"f2_table", "f2"}


@pytest.mark.parametrize("pool", ["tables", "ids"])
def test_padding_and_unpooled_vectors(pool: str) -> None:
    specs = [rse.FeatureSpec("item", 40, 8), rse.FeatureSpec("history", 40, 8, "mean", table="item", padding_idx=0)]
    schema = rse.Schema(specs)
    for method in ("full", "compositional", "memcom"):
        plan = rse.Plan.full(schema) if method == "full" else rse.Plan.uniform(schema, method, "1KiB", full_below=0)
        whole = rse.EmbeddingCollection(schema, plan, seed=3)
        coll = ShardableCollection(schema, plan, seed=3, pool=pool)
        values, offsets = torch.tensor([3, 4, 0, 3, 0, 0]), torch.tensor([0, 1, 2, 4, 6])
        assert torch.equal(coll(values, offsets), whole(values, offsets))
        ids = torch.tensor([[1, 0], [39, 3]])
        # With padding, means are taken of what each id reads.
        assert torch.equal(coll.lookup("history", ids), whole.lookup("history", ids))
    alone = rse.Schema([rse.FeatureSpec("item", 40, 8)])
    with pytest.raises(ConfigError, match="pool='ids'"):
        ShardableCollection(alone).lookup("item", ids)
    with pytest.raises(ConfigError, match="step of its own"):
        ShardableCollection(schema, None, rse.SGD(lr=0.1)).lookup("item", ids)


def test_managed_tables_refuse_what_they_lack() -> None:
    specs = [rse.FeatureSpec(n, 40, 8, table="t", padding_idx=1) for n in ("a", "b")]
    with pytest.raises(ConfigError) as e:
        ManagedEBC(rse.Schema(specs))
    assert all(word in str(e.value) for word in ("padding_idx", "'t' of a, b"))


def test_checkpoints_hold_a_shared_table_once(tmp_path: Path) -> None:
    specs = [rse.FeatureSpec("item", 40, 8), rse.FeatureSpec("history", 40, 8, "mean", table="item", padding_idx=0)]
    schema = rse.Schema(specs)
    plan = rse.Plan.uniform(schema, "freqcut", num_frequent=5, order="counts")
    models = [rse.EmbeddingCollection(schema, plan, rse.Adagrad(lr=0.1), seed=seed) for seed in (1, 2)]
    models[0].assign_({"history": torch.arange(40)})
    models[0](torch.tensor([[3, 39], [39, 0]])).sum().backward()
    names = [t.name for t in weight_tensors(nn.ModuleDict({"e": models[0]}))]
    assert sorted(n for n in names if "index" in n) == ["e/item:index:kept"]
    assert len(set(names)) == len(names)
    from_single(tmp_path / "saved", nn.ModuleDict({"e": models[0]}))
    to_single(tmp_path / "saved", nn.ModuleDict({"e": models[1]}))
    ids = torch.arange(40)
    assert torch.equal(models[1].lookup("history", ids), models[0].lookup("history", ids))
