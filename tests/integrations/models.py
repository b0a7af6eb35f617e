"""One small model for all stacks: with fused tables, and with plain ones that torch's dense optimizer steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.optim import fused_optimizer, unfused_parameters

SCHEMA = rse.Schema([rse.FeatureSpec("u", 60, 4, init="uniform:0.5"), rse.FeatureSpec("i", 40, 4, init="uniform:0.5")])
# A fused rule, and torch's optimizer that does the same.
RULES: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "adagrad": (lambda: rse.Adagrad(lr=0.1, eps=1e-10), lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-10)),
    "adam": (lambda: rse.Adam(lr=0.05, rows="all"), lambda p: torch.optim.Adam(p, 0.05)),
}


class Net(nn.Module):
    """Two features, a compressed drop-in for one of them, and a head.

    Args:
        rule: of the fused tables; None for tables that torch steps.
    """

    def __init__(self, rule: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tables = rse.EmbeddingCollection(SCHEMA, None, rule, seed=0)
        self.item = nn.Embedding(40, 4)
        rse.compress_(self, {"item": rse.get_method("hash").config_cls(num_buckets=17)})
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.tables(x).flatten(1), self.item(x[:, 1])], 1)).squeeze(1)


class SharedRows(nn.Module):
    """Of torch alone: what a table compressed by hashing computes.

    Args:
        layer: the compressed table.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        with torch.no_grad():
            every, stored = layer(torch.arange(self.num_embeddings)), layer.stored_weight.detach().clone()
        self.rows = torch.cdist(every, stored).argmin(1)
        self.stored_weight = nn.Parameter(stored)
        with torch.no_grad():
            assert torch.equal(self.weight, every)

    @property
    def weight(self) -> Tensor:
        found = self.stored_weight[self.rows]
        if self.padding_idx is None:
            return found
        return found.masked_fill(torch.arange(len(found))[:, None] == self.padding_idx, 0.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


def with_shared_rows(model: nn.Module) -> nn.Module:
    """A copy of a model whose tables compressed by hashing are torch's alone."""
    other = copy.deepcopy(model)
    for path, layer in list(other.named_modules()):
        if hasattr(layer, "stored_weight"):
            parent, _, name = path.rpartition(".")
            parent_ = other.get_submodule(parent)
            setattr(parent_, name, SharedRows(layer))
    return other


def net(rule: str, fused: bool) -> Net:
    return Net(RULES[rule][0]() if fused else None)


def optimizer(model: nn.Module, rule: str, fused: bool) -> torch.optim.Optimizer:
    """One optimizer for the whole model, by one rule."""
    made = RULES[rule][1]
    if not fused:
        return made(model.parameters())
    return fused_optimizer(model, made(unfused_parameters(model)))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def rows(count: int = 96) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.stack([torch.randint(0, n, (count,), generator=g) for n in (60, 40)], 1)
    return x, torch.rand(count, generator=g) * 3


def data(count: int = 96) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(*rows(count))


def loader(size: int = 16, count: int = 96) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(data(count), batch_size=size, shuffle=False)


def values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, with the steps that ``rows="all"`` defers."""
    for module in model.modules():
        if isinstance(module, rse.EmbeddingCollection):
            module.catch_up_()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of two models' parameters."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max()) for n in ours)


def check_equal(ours: nn.Module, theirs: nn.Module, bound: float = 1e-5) -> None:
    """Both were trained, to the same parameters."""
    one, other = values(ours), values(theirs)
    start = values(net("adagrad", False)) if isinstance(theirs, Net) else None
    if start is not None:
        assert apart(other, start) > 1e-2, "the training moved nothing, so that it shows nothing"
    assert apart(one, other) <= bound
