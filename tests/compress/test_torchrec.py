"""TorchRec's collections: the same keyed outputs from compressed tables, and a DLRM that goes on learning."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse
from recsys_embed.compress import compress_, materialize_

torchrec = pytest.importorskip("torchrec")
METHODS = [m.name for m in rse.list_methods() if m.name != "full"]


def jagged(weighted: bool = False) -> Any:
    """Three features of two samples, in an order of its own; one bag is empty."""
    values = torch.tensor([5, 0, 7, 1, 2, 3, 9, 9])
    return torchrec.KeyedJaggedTensor(
        keys=["f3", "f1", "f2"],
        values=values,
        lengths=torch.tensor([2, 1, 0, 3, 1, 1]),
        weights=torch.rand(len(values)) if weighted else None,
    )


def bags(weighted: bool = False, pooling: Any = None) -> nn.Module:
    config = torchrec.EmbeddingBagConfig
    tables = [
        config(name="t1", embedding_dim=8, num_embeddings=100, feature_names=["f1", "f3"]),
        config(name="t2", embedding_dim=4, num_embeddings=50, feature_names=["f2"]),
    ]
    for table in tables:
        table.pooling = pooling or torchrec.PoolingType.SUM
    return nn.ModuleDict({"sparse": torchrec.EmbeddingBagCollection(tables=tables, is_weighted=weighted)})


def rows(need_indices: bool = False) -> nn.Module:
    config = torchrec.EmbeddingConfig
    tables = [
        config(name="t1", embedding_dim=8, num_embeddings=100, feature_names=["f1", "f3"]),
        config(name="t2", embedding_dim=8, num_embeddings=50, feature_names=["f2"]),
    ]
    return nn.ModuleDict({"sparse": torchrec.EmbeddingCollection(tables=tables, need_indices=need_indices)})


def lossless(model: nn.Module) -> rse.Plan:
    """Compressed only in name: full rank, so that outputs must come back as they were."""
    return rse.Plan({f.name: rse.LowdimConfig(dim=f.embedding_dim) for f in rse.Schema.from_model(model)})


@pytest.mark.parametrize(("weighted", "pooling"), [(False, "SUM"), (True, "SUM"), (False, "MEAN")])
def test_bags_give_the_same_keyed_tensor(weighted: bool, pooling: str) -> None:
    model = bags(weighted, torchrec.PoolingType[pooling])
    ids = jagged(weighted)
    wanted = model["sparse"](ids)
    report = compress_(model, lossless(model))
    assert [t.kind for t in report.tables] == ["torchrec_ebc"] * 2
    assert [t.name for t in report.tables] == ["sparse/embedding_bags/t1", "sparse/embedding_bags/t2"]
    got = model["sparse"](ids)
    assert type(got) is type(wanted)
    assert got.keys() == wanted.keys()
    assert got.length_per_key() == wanted.length_per_key()
    torch.testing.assert_close(got.values(), wanted.values(), rtol=1e-4, atol=1e-5)
    assert model["sparse"].is_weighted() == weighted
    assert [c.name for c in model["sparse"].embedding_bag_configs()] == ["t1", "t2"]
    materialize_(model)
    assert isinstance(model["sparse"].embedding_bags["t1"], nn.EmbeddingBag)
    torch.testing.assert_close(model["sparse"](ids).values(), wanted.values(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_indices", [False, True])
def test_rows_give_the_same_jagged_tensors(need_indices: bool) -> None:
    model = rows(need_indices)
    ids = jagged()
    wanted = model["sparse"](ids)
    compress_(model, lossless(model))
    got = model["sparse"](ids)
    assert list(got) == list(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key].values(), tensor.values(), rtol=1e-4, atol=1e-5)
        assert torch.equal(got[key].lengths(), tensor.lengths())
        assert not need_indices or torch.equal(got[key].weights(), tensor.weights())


@pytest.mark.crossed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [bags, rows])
def test_every_method(build: Any, method: str) -> None:
    model = build()
    schema = rse.Schema.from_model(model)
    params: dict[str, Any] = {"dim": 4} if method == "unified" else {}
    plan = rse.Plan.uniform(schema, method, budget="3KiB", full_below=0, **params)
    report = compress_(model, plan)
    assert report.bytes_after == plan.footprint(schema).serve <= 3 * 1024
    out = model["sparse"](jagged())
    values = out.values() if build is bags else out["f1"].values()
    values.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_dlrm_learns_before_and_after() -> None:
    from torchrec.models.dlrm import DLRM

    torch.manual_seed(0)
    tables = [
        torchrec.EmbeddingBagConfig(name=f"t{i}", embedding_dim=8, num_embeddings=n, feature_names=[f"f{i}"])
        for i, n in enumerate((1000, 200))
    ]
    model = DLRM(torchrec.EmbeddingBagCollection(tables=tables), 3, [16, 8], [16, 1])
    dense, ids = torch.rand(512, 3), torch.stack([torch.randint(0, n, (512,)) for n in (1000, 200)])
    sparse = torchrec.KeyedJaggedTensor(["f0", "f1"], ids.reshape(-1), lengths=torch.ones(1024, dtype=torch.int64))
    labels = (ids.sum(0) % 3 == 0).float()

    def epoch(optimizer: Any) -> list[float]:
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(dense, sparse).squeeze(1), labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = epoch(optimizer)
    assert first[-1] < first[0]
    shape = model(dense, sparse).shape
    plan = rse.Plan.uniform(rse.Schema.from_model(model), "hash", budget="9KiB")
    report = compress_(model, plan, optimizer=optimizer)
    assert report.ratio > 4
    assert model(dense, sparse).shape == shape
    second = epoch(optimizer)
    assert second[-1] < second[0]
    copy.deepcopy(model)(dense, sparse)
