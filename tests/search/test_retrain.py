"""Retraining starts from the very weights the search began with, or goes on with those it ended with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recsys_embed.errors import CheckpointError
from recsys_embed.models import build_model
from recsys_embed.plan import Plan
from recsys_embed.search import DnisSearch, DnisSettings, OptembedSearch, OptembedSettings, Supernet
from recsys_embed.search.extract import choose, make_plan
from recsys_embed.search.folder import SearchFolder
from recsys_embed.search.retrain import (
    build_retrained,
    drawn_weights,
    initial_hashes,
    planned,
    share_rows,
    weights_hash,
)
from recsys_embed.train.build import model_from_config
from tests.train.toy import ToyData, toy_config

CONFIG = toy_config(embedding_weight_decay=1e-3, epochs=2, seed=5)


def plan_of(schema, pruned="zero"):
    kept = {s.name: torch.arange(s.num_ids) % 3 != 1 for s in schema}
    if pruned == "oov":
        # Of this field all rows died, and what they share is all that is left.
        kept["C1"][:] = False
    return kept, make_plan(schema, {s.name: choose(s, kept[s.name], 3, pruned) for s in schema})


def search_of(**settings) -> OptembedSearch:
    settings = OptembedSettings(generations=1, population=2, **settings)
    return OptembedSearch(CONFIG, ToyData(), settings, SearchFolder(None, {}))


def test_the_initial_weights_are_those_of_the_search_bit_for_bit() -> None:
    data = ToyData()
    schema = data.schema(4).with_init("normal:0.1")
    config = CONFIG.replace(embedding_init="normal:0.1")
    first = model_from_config(config, schema, 3)
    hashes = initial_hashes(first)
    kept, plan = plan_of(schema)
    model = build_retrained(planned(config, plan), schema, 3, hashes=hashes)
    for s in schema:
        began = first.vectors.table(f"{s.name}.weight")
        got = model.vectors.table(f"{s.name}.weight")
        assert weights_hash(got) == weights_hash(began[kept[s.name]][:, :3].contiguous())
    for name, values in drawn_weights(model).items():
        assert hashes[f"weight {name}"] == weights_hash(values)


def test_other_initial_weights_are_refused() -> None:
    schema = ToyData().schema(4)
    hashes = initial_hashes(model_from_config(CONFIG, schema, 3))
    _, plan = plan_of(schema)
    with pytest.raises(CheckpointError, match="not those the search began with: table C0"):
        build_retrained(planned(CONFIG.replace(seed=6), plan), schema, 3, hashes=hashes)
    changed = {**hashes, "weight bias": "0"}
    with pytest.raises(CheckpointError, match=r"with: weight bias; retrain"):
        build_retrained(planned(CONFIG, plan), schema, 3, hashes=changed)


@pytest.mark.parametrize("oov", [False, True])
def test_inherited_weights_give_what_the_masked_supernet_gave(oov: bool) -> None:
    search = search_of(retrain_from="supernet", oov=oov)
    net = search.net.eval()
    kept, plan = plan_of(search.schema, "oov" if oov else "zero")
    model = build_retrained(planned(CONFIG, plan), search.schema, 3, **search.start_weights()).eval()
    with torch.no_grad():
        for s in search.schema:
            net.table(s.name)[~kept[s.name]] = 0
        net.layer.thresholds.fill_(0.0)
        net.layer.widths = torch.tensor([3, 3, 3, 3])
    batch = next(iter(search.data.batches("valid", 64)))
    got, wanted = model.vectors(batch.ids), net.vectors(batch.ids)
    torch.testing.assert_close(got, wanted)
    # The network is the same; only first-order weights were squeezed into fewer rows.
    model.linear.forward = net.model.linear.forward
    torch.testing.assert_close(model(batch.dense, batch.ids), net(batch.dense, batch.ids))


def test_pruned_ids_begin_with_the_vector_that_the_supernet_began_with() -> None:
    search = search_of(oov=True)
    began = search.build().layer.oov.detach().clone()
    bound = (6 / (4 + 4)) ** 0.5
    assert bound / 2 < began.abs().max() <= bound, "Xavier-uniform over fields and columns"
    _, plan = plan_of(search.schema, "oov")
    torch.manual_seed(1)
    model = build_retrained(planned(CONFIG, plan), search.schema, 3, **search.start_weights()).eval()
    pruned = model.vectors(torch.tensor([[1, 1, 1, 1]]))[0]
    assert torch.equal(pruned[:, :3], began[:, :3])
    assert not pruned[:, 3].any()
    assert torch.equal(search_of(oov=True).build().layer.oov, began)


def test_a_selection_is_multiplied_into_the_tables_that_it_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched() -> Supernet:
        settings = DnisSettings(blocks=3, alpha_lr=0.05)
        return DnisSearch(CONFIG, ToyData(), settings, SearchFolder(None, {})).net.eval()

    merged = searched()
    with monkeypatch.context() as patch:
        patch.setattr(DnisSearch, "_merge", lambda self, net: None)
        apart = searched()
    alpha = apart.layer.alpha
    assert alpha.unique().numel() > 4
    for field, spec in enumerate(apart.vectors.schema):
        wanted = apart.table(spec.name) * alpha[apart.layer.blocks_of(field)]
        assert torch.equal(merged.table(spec.name), wanted)
    batch = next(iter(ToyData().batches("valid", 64)))
    torch.testing.assert_close(merged(batch.dense, batch.ids), apart(batch.dense, batch.ids))


@pytest.mark.parametrize("method", ["unified", "hash", "compositional"])
def test_plans_of_methods_without_rows_to_keep_begin_as_they_do(method: str) -> None:
    schema = ToyData().schema(4)
    plan = Plan.uniform(schema, method, budget=1600)
    model = build_retrained(planned(CONFIG, plan), schema, 3)
    for name, values in model_from_config(planned(CONFIG, plan), schema, 3).named_parameters():
        assert torch.equal(model.get_parameter(name), values), name


def test_rows_that_ids_share_are_their_weighted_means() -> None:
    schema = ToyData().schema(1)
    model = build_model("lr", schema, Plan.uniform(schema, "unified", budget=4 * 40), num_dense=3)
    g = torch.Generator().manual_seed(0)
    given = {
        s.name: (torch.randn(s.num_ids, 1, generator=g), torch.randint(0, 9, (s.num_ids,), generator=g)) for s in schema
    }
    coll = model.linear
    share_rows(coll, given)
    (table,) = coll.parameters()
    table.requires_grad_(True)
    loss = 0.0
    for f, s in enumerate(schema):
        ids = torch.zeros(s.num_ids, len(schema), dtype=torch.int64)
        ids[:, f] = torch.arange(s.num_ids)
        values, counts = given[s.name]
        loss = loss + (counts.unsqueeze(1) * (coll(ids)[:, f] - values) ** 2).sum()
    (grad,) = torch.autograd.grad(loss, table)
    assert grad.abs().max() < 1e-3, "least squares has no slope left"


@pytest.mark.parametrize("model", ["fm", "deepfm", "dnn"])
def test_a_budget_of_the_vectors_leaves_room_for_first_order_weights(model: str) -> None:
    config, data, budget = CONFIG.replace(model=model, model_args={}), ToyData(), 3000
    search = OptembedSearch(config, data, OptembedSettings(), SearchFolder(None, {}), budget=budget)
    schema = data.schema(4)
    plan = Plan.uniform(schema, "hash", budget=search.vector_budget)
    built = model_from_config(planned(config, plan, budget), schema, data.num_dense)
    first_order = 0 if built.linear is None else built.linear.footprint().serve
    assert (first_order > 0) == (model != "dnn")
    assert search.vector_budget == budget - first_order
    assert 0.95 * budget <= built.footprint().serve <= budget
    assert replace(search, budget=None).vector_budget is None
