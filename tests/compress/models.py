"""Models of the tests, and what is asked of all of them."""

from typing import Any

import pytest
import torch
from torch import nn

import recsys_embed as rse

METHODS = [m.name for m in rse.list_methods()]
# Networks take seconds to fit.
CASES = [pytest.param(m, marks=pytest.mark.slow) if m == "dhe" else m for m in METHODS]


class Model(nn.Module):
    """Tables as attributes, in lists and dictionaries, one of them twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.user = nn.Embedding(400, 8, **options)
        self.fields = nn.ModuleList([nn.Embedding(300, 8, **options), nn.EmbeddingBag(200, 8, mode="sum", **options)])
        self.tower = nn.Sequential(nn.ModuleDict({"item": nn.Embedding(100, 8, padding_idx=3, **options)}))
        self.again = self.user
        self.head = nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of ids ``[B]`` below 100."""
        bags = self.fields[1](ids.unsqueeze(1))
        rows = self.user(ids) + self.fields[0](ids) + bags + self.tower[0]["item"](ids) + self.again(ids)
        return self.head(rows).squeeze(1)


def uniform(model: nn.Module, method: str, share: float = 0.5, **params: Any) -> rse.Plan:
    schema = rse.Schema.from_model(model)
    budget = int(share * sum(4 * f.num_embeddings * f.embedding_dim for f in schema))
    return rse.Plan.uniform(
        schema, method, **({} if method == "full" else {"budget": budget, "full_below": 0}), **params
    )


def snapshot(model: nn.Module) -> Any:
    """What must not change when an attempt fails."""
    modules = [(path, id(m)) for path, m in model.named_modules(remove_duplicate=False)]
    return modules, [(k, v._version) for k, v in model.state_dict().items()], [id(p) for p in model.parameters()]
