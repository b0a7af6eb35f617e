"""Files of the version before heads: its states and exports load, and give the vectors that they gave there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema

GOLDEN = Path(__file__).parent / "golden" / "before_heads"
SCHEMA = Schema(
    [
        FeatureSpec("plain", 30, 8),
        FeatureSpec("path", 80, 8, pooling="mean"),
        FeatureSpec("pooled", 90, 8),
        FeatureSpec("low", 40, 8),
    ]
)
IDS = torch.stack([torch.arange(12) % f.num_embeddings * 7 % f.num_embeddings for f in SCHEMA], 1)
BAGS = IDS.t().reshape(-1), torch.arange(0, 49, 3)


def plan() -> Plan:
    import json

    return Plan.from_dict(json.loads((GOLDEN / "plan.json").read_text()))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_state_dict_loads(backend: str) -> None:
    saved = torch.load(GOLDEN / "collection.pt")
    coll = EmbeddingCollection(SCHEMA, plan(), backend=backend)
    coll.load_state_dict(saved["state"])
    torch.testing.assert_close(coll(IDS).detach(), saved["vectors"])
    torch.testing.assert_close(coll(*BAGS).detach(), saved["bags"])
    again = EmbeddingCollection(SCHEMA, plan(), seed=9)
    again.load_state_dict(coll.state_dict())
    torch.testing.assert_close(again(IDS).detach(), saved["vectors"])


def test_a_state_dict_that_lacks_rows_is_refused() -> None:
    saved = torch.load(GOLDEN / "collection.pt")["state"]
    saved["width8"] = saved["width8"][:-1]
    with pytest.raises(rse.errors.CheckpointError, match="'width8' must hold 30 rows"):
        EmbeddingCollection(SCHEMA, plan()).load_state_dict(saved)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_export_loads(precision: str, backend: Any) -> None:
    saved = torch.load(GOLDEN / f"collection_{precision}.pt")
    coll = rse.load(GOLDEN / f"collection_{precision}.safetensors", backend=backend)
    torch.testing.assert_close(coll(IDS), saved["vectors"])
    torch.testing.assert_close(coll(*BAGS), saved["bags"])


def test_a_drop_in_loads_and_draws_the_weights_it_drew() -> None:
    saved = torch.load(GOLDEN / "path.pt")
    emb = rse.get_method("compositional").embedding_cls(80, 8, config=plan()["path"], mode="sum")
    assert list(emb.state_dict()) == list(saved["state"])
    for name, values in emb.named_parameters():
        assert torch.equal(values, saved["state"][name]), f"{name}: another draw than before"
    emb.load_state_dict(saved["state"])
    torch.testing.assert_close(emb(torch.arange(80).view(20, 4)).detach(), saved["vectors"])


@pytest.mark.parametrize("options", [{"combine": "path"}, {"bag": "pooled"}], ids=str)
def test_features_that_such_methods_store_plainly_load(options: dict[str, str]) -> None:
    """Features below a threshold have a full table and no head; their module held it all the same."""
    schema = Schema([FeatureSpec("a", 30, 8), FeatureSpec("small", 20, 8), FeatureSpec("large", 60, 8)])
    config = Plan.uniform(schema, "compositional", num_collisions=4, threshold=25, **options)
    coll = EmbeddingCollection(schema, Plan({**config.configs, "a": Plan.full(schema)["a"]}), seed=3)
    state = coll.state_dict()
    for key in coll.places.keys() - {"a.weight"}:
        feature, _, table = key.partition(".")
        state[f"bundle.own.feature_{feature}.{table}"] = coll.table(key).detach().clone()
    state["width8"] = coll.table("a.weight").detach().clone()
    again = EmbeddingCollection(schema, coll.plan, seed=9)
    again.load_state_dict(state)
    ids = torch.tensor([[3, 19, 59], [29, 0, 7]])
    assert torch.equal(again(ids), coll(ids))


@pytest.mark.parametrize("rule", [rse.SGD(lr=0.1), rse.Adam(lr=0.1)], ids=repr)
def test_an_optimizer_state_of_tables_held_apart_is_refused_in_words(rule: Any) -> None:
    schema = Schema([FeatureSpec("a", 60, 8)])
    coll = EmbeddingCollection(schema, Plan.uniform(schema, "compositional", num_collisions=4, bag="pooled"), rule)
    saved = {**coll.optimizer_state_dict(), "steps": {}, "state": {}}
    with pytest.raises(rse.errors.CheckpointError, match="load the weights alone and start the optimizer anew"):
        coll.load_optimizer_state_dict(saved)
