"""Modules that graphs are made of: every method, every model, and a model that knows nothing of the library."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import recsys_embed as rse
from recsys_embed.exports import export, load
from recsys_embed.models import RetrievalModel, build_model, get_model, list_models
from recsys_embed.testing import example

DENSE = 3


def schema(width: int = 8, **options) -> rse.Schema:
    """A feature per registered method, named after it; tables large enough that a wrong row shows."""
    return rse.Schema([rse.FeatureSpec(m.name, 3001 + 100 * i, width, **options) for i, m in enumerate(methods())])


def methods() -> list[rse.MethodInfo]:
    return rse.list_methods()


def plan(of: rse.Schema) -> rse.Plan:
    """Every feature by the method it is named after, at half of a full table's bytes or as near as that allows."""
    configs = {}
    for spec in of:
        method = rse.get_method(spec.name)
        least = method.config_cls.sized(spec, 1).footprint(spec).serve
        half = spec.num_embeddings * spec.embedding_dim * 2
        configs[spec.name] = method.config_cls.for_budget(spec, max(half, least))
    return rse.Plan(configs)


def collection(optimizer=None, **options) -> rse.EmbeddingCollection:
    mixed = schema(**options)
    return rse.EmbeddingCollection(mixed, plan(mixed), optimizer)


def model(name: str, mixed: bool = True, **options) -> nn.Module:
    """A registered model with every method in it, or with two small full tables."""
    features = schema() if mixed else rse.Schema([rse.FeatureSpec(n, 50, 4) for n in "ab"])
    chosen = plan(features) if mixed else rse.Plan.full(features)
    return randomised(build_model(name, features, chosen, num_dense=DENSE, **finds(name, features), **options))


def finds(name: str, features: rse.Schema) -> dict[str, str]:
    """Of retrieval models, which feature is the item."""
    return {"item": features.names[-1]} if issubclass(get_model(name), RetrievalModel) else {}


def served(precision: str, folder: Path) -> nn.Module:
    """A collection as it is loaded from an export at a precision: tables with pruned rows and columns, and others."""
    names = {"range": "full", "bitmap": "full", "sorted": "full", "hash": "hash", "mixed": "mixeddim", "low": "lowdim"}
    features = rse.Schema([rse.FeatureSpec(name, 640, 8) for name in names])
    configs = [
        rse.get_method(m).config_cls.for_budget(f, "20KiB" if m == "full" else "12KiB")
        for f, m in zip(features, names.values(), strict=True)
    ]
    coll = rse.EmbeddingCollection(features, rse.Plan(dict(zip(names, configs, strict=True))))
    with torch.no_grad():
        coll.table("range.weight")[300:] = 0
        coll.table("bitmap.weight")[::2] = 0
        coll.table("bitmap.weight")[:, 3] = 0
        keep = coll.table("sorted.weight")[[7, 100, 639]].clone()
        coll.table("sorted.weight").zero_()[[7, 100, 639]] = keep
    export(coll, folder / "served.rse", precision)
    return load(folder / "served.rse")


def randomised(module: nn.Module) -> nn.Module:
    """Parameters without a zero among them, so that everything takes part in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.normal_(0.0, 0.1, generator=generator)
    return module


def models() -> list[str]:
    return [name for name in list_models() if not get_model(name).needs_history]


# Pooling is one operator whatever was looked up: one mode with every method, the others with two.
MODES = [("mean", ()), ("sum", ("full", "hash")), ("max", ("full", "hash"))]


class DropIns(nn.Module):
    """A drop-in of every method (or of those named) side by side, all given the same ids (and offsets)."""

    def __init__(self, mode: str | None = None, only: tuple[str, ...] = (), **options) -> None:
        super().__init__()
        chosen = [m for m in methods() if not only or m.name in only]
        self.parts = nn.ModuleDict({m.name: example(m, mode=mode, **options) for m in chosen})

    def forward(self, ids: Tensor, offsets: Tensor | None = None) -> dict[str, Tensor]:
        return {name: part(ids, offsets) for name, part in self.parts.items()}


class TwoTowers(nn.Module):
    """Somebody else's model: an embedding per side, a bag of the history, a dict and a keyword among its inputs."""

    def __init__(self, embedding=nn.Embedding, bag=nn.EmbeddingBag) -> None:
        super().__init__()
        self.user, self.item = embedding(500, 6), embedding(800, 6)
        self.history = bag(800, 6, mode="mean", padding_idx=0)
        self.top = nn.Sequential(nn.Linear(18, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, batch: dict[str, Tensor], scale: float = 2.0) -> tuple[Tensor, Tensor]:
        user, item = self.user(batch["user"]), self.item(batch["item"])
        logit = self.top(torch.cat([user, item, self.history(batch["history"])], 1)).squeeze(1)
        return logit * scale, (user * item).sum(1) > 0


def two_towers() -> nn.Module:
    """With drop-ins in place of its tables."""

    def embedding(rows: int, width: int) -> nn.Module:
        return rse.make_embedding("compositional", rows, width, budget="8KiB")

    def bag(rows: int, width: int, **options) -> nn.Module:
        return rse.make_embedding("multihash", rows, width, budget="8KiB", **options)

    return TwoTowers(embedding, bag)


def two_towers_batch(size: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(size)
    return {
        "user": torch.randint(500, (size,), generator=rng),
        "item": torch.randint(800, (size,), generator=rng),
        "history": torch.randint(800, (size, 4), generator=rng),
    }
