"""A model with a fused optimizer, the data it trains on, and a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.kernels.native import library as native_library
from recsys_embed.optim import FusedOptimizer, unfused_parameters

NATIVE = not isinstance(native_library.library(), str)
BACKENDS = ["native", "torch"] if NATIVE else ["torch"]
SCHEMA = Schema([FeatureSpec("C1", 300, 8), FeatureSpec("C2", 40, 8), FeatureSpec("C3", 3, 8)])
# A rule of the library, and torch's for dense tables.
PAIRS: dict[str, tuple[FusedOptimizer, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (rse.SGD(lr=0.5, weight_decay=0.01, rows="all"), lambda p: torch.optim.SGD(p, 0.5, weight_decay=0.01)),
    "adagrad": (rse.Adagrad(lr=0.3, eps=1e-8), lambda p: torch.optim.Adagrad(p, 0.3, eps=1e-8)),
    "adam": (
        rse.Adam(lr=0.1, weight_decay=0.05, rows="all", eps=1e-3),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.05, eps=1e-3),
    ),
}
DATA = torch.Generator().manual_seed(5)
IDS = torch.stack([torch.randint(0, s.num_embeddings, (96,), generator=DATA) for s in SCHEMA], 1)
LABELS = torch.rand(96, generator=DATA)


def plan_of(method: str) -> Plan:
    return Plan.full(SCHEMA) if method == "full" else Plan.uniform(SCHEMA, method, budget="6KiB", full_below=1)


class Model(nn.Module):
    def __init__(self, rule: FusedOptimizer | None, method: str = "full", backend: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tables = EmbeddingCollection(SCHEMA, plan_of(method), rule, seed=0, backend=backend)
        self.head = nn.LazyLinear(1)
        with torch.no_grad():
            self(IDS[:2])

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tables(ids).flatten(1)).squeeze(1)  # type: ignore[no-any-return]


def loss_of(model: nn.Module, at: slice) -> Tensor:
    return F.mse_loss(model(IDS[at]), LABELS[at])


def one_step(model: Model, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    rows = slice(16 * number, 16 * number + 16)
    F.mse_loss(model(IDS[rows]), LABELS[rows].to(model.head.weight.dtype)).backward()
    optimizer.step()


def plain(model: Model, optimizer: torch.optim.Optimizer) -> None:
    for i in range(5):
        optimizer.zero_grad()
        loss_of(model, slice(16 * i, 16 * i + 16)).backward()
        optimizer.step()


def weights(model: Model) -> dict[str, Tensor]:
    model.tables.catch_up_()
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def dense(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(unfused_parameters(model), 0.1)
