"""PyTorch Geometric's models train with compressed embeddings as with a table that shares the same rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch_geometric.nn import LightGCN, Node2Vec

import recsys_embed as rse
from tests.integrations.models import with_shared_rows

USERS, ITEMS, WIDTH = 60, 90, 8
NODES = USERS + ITEMS


def hashed(model: nn.Module) -> nn.Module:
    rse.compress_(model, {"embedding": rse.get_method("hash").config_cls(num_buckets=20)}, init="fresh")
    return model


def edges() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, USERS, (400,), generator=g), torch.randint(USERS, NODES, (400,), generator=g)


def light_gcn(model: nn.Module) -> tuple[list[float], Tensor]:
    users, items = edges()
    graph = torch.stack([torch.cat([users, items]), torch.cat([items, users])])
    g = torch.Generator().manual_seed(1)
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.05), []
    for _ in range(10):
        wrong = torch.randint(USERS, NODES, (400,), generator=g)
        pairs = torch.cat([torch.stack([users, items]), torch.stack([users, wrong])], 1)
        good, bad = model(graph, pairs).chunk(2)
        loss = model.recommendation_loss(good, bad, node_id=torch.cat([users, items]).unique())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model.recommend(graph, src_index=torch.arange(5), dst_index=torch.arange(USERS, NODES), k=3)


def test_light_gcn() -> None:
    torch.manual_seed(0)
    ours = hashed(LightGCN(NODES, WIDTH, 2))
    theirs = with_shared_rows(ours)
    (losses, best), (wanted, wanted_best) = light_gcn(ours), light_gcn(theirs)
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert losses[-1] < losses[0]
    assert torch.equal(best, wanted_best)
    assert torch.allclose(ours.embedding.weight[:7], theirs.embedding.weight[:7], atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_node2vec(sparse: bool) -> None:
    users, items = edges()
    graph = torch.stack([torch.cat([users, items]), torch.cat([items, users])])
    options = {"embedding_dim": WIDTH, "walk_length": 5, "context_size": 3, "num_nodes": NODES, "sparse": sparse}
    try:
        torch.manual_seed(0)
        ours = Node2Vec(graph, **options)
    except ImportError as error:
        pytest.skip(str(error))
    hashed(ours)
    theirs = with_shared_rows(ours)
    losses = []
    for model in (ours, theirs):
        optimizer, found, g = torch.optim.SGD(model.parameters(), 0.1), [], torch.Generator().manual_seed(2)
        for _ in range(5):
            good, bad = (torch.randint(0, NODES, (64, 3), generator=g) for _ in range(2))
            loss = model.loss(good, bad)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(ours().detach(), theirs().detach(), atol=1e-5)
