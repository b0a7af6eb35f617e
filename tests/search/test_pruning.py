"""Merged tables, pruned: targets are hit, what is kept is exact, what is pruned stays zero, bytes are those stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed.errors import BudgetError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import Adam
from recsys_embed.search import DnisLayer, Supernet
from recsys_embed.search.extract import choose, make_plan, take_rows
from recsys_embed.search.frequency_blocks import block_maps, block_sizes, cut, order_of
from recsys_embed.search.pruning import (
    FieldBlocks,
    choose_elements,
    importance_of,
    keep_columns,
    keep_elements,
    most_within,
)

SCHEMA = Schema([FeatureSpec("a", 70, 6), FeatureSpec("b", 300, 6), FeatureSpec("c", 1, 6), FeatureSpec("d", 129, 6)])


def tables(seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s.num_ids, 6, generator=g) for s in SCHEMA]


def counts(seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 1000, (s.num_ids,), generator=g) ** 2 for s in SCHEMA]


def fields_of(found: list[torch.Tensor], seen: list[torch.Tensor], blocks: int = 3) -> list[FieldBlocks]:
    out = []
    for spec, table, c, sizes in zip(SCHEMA, found, seen, block_sizes(seen, blocks, "field", "mass"), strict=True):
        order = order_of(c)
        members = list((torch.arange(spec.num_ids) if order is None else order).split(sizes))
        out.append(FieldBlocks(spec, sizes, members, order, importance_of(table, members)))
    return out


def loaded(plan: rse.Plan, found: list[torch.Tensor], optimizer=None) -> rse.EmbeddingCollection:
    coll = rse.EmbeddingCollection(SCHEMA, plan, optimizer)
    for spec, table in zip(SCHEMA, found, strict=True):
        take_rows(coll, spec.name, table)
    return coll


def vectors(coll: rse.EmbeddingCollection, f: int) -> torch.Tensor:
    spec = SCHEMA.features[f]
    ids = torch.zeros(spec.num_ids, len(SCHEMA), dtype=torch.int64)
    ids[:, f] = torch.arange(spec.num_ids)
    return coll.eval()(ids)[:, f].detach()


def stored_bytes(coll: rse.EmbeddingCollection) -> int:
    return sum(v.nbytes for k, v in coll.state_dict().items() if not k.endswith("_extra_state"))


@settings(max_examples=25, deadline=None)
@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 99), ties=st.booleans())
def test_a_target_sparsity_is_hit_and_the_largest_elements_stay(sparsity: float, seed: int, ties: bool) -> None:
    found = tables(seed)
    if ties:
        found = [t.mul(3).round() for t in found]
    kept = keep_elements(SCHEMA, found, "zero", budget=None, sparsity=sparsity)
    total, count = sum(t.numel() for t in found), sum(int(k.sum()) for k in kept)
    assert abs(count / total - (1 - sparsity)) <= 1 / total
    if 0 < count < total:
        assert min(t.abs()[k].min() for t, k in zip(found, kept, strict=True) if k.any()) >= max(
            t.abs()[~k].max() for t, k in zip(found, kept, strict=True) if not k.all()
        )


@pytest.mark.parametrize("columns", range(5))
def test_columns_that_meet_a_share_or_a_budget_exactly_are_kept(columns: int) -> None:
    field = FieldBlocks(FeatureSpec("a", 8, 4), [8], [torch.arange(8)], None, torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    config = field.config(torch.arange(4).unsqueeze(0) < columns, "zero")
    budget = config.footprint(field.spec).serve
    for limit in ({"budget": None, "sparsity": 1 - columns / 4}, {"budget": budget, "sparsity": 0.0}):
        assert keep_columns([field], "zero", **limit)["a"][0] == config


@pytest.mark.parametrize("kind", ["rows", "blocks", "elements"])
@pytest.mark.parametrize("pruned", ["zero", "oov"])
@pytest.mark.parametrize("share", [0.6, 0.15])
def test_a_budget_is_kept_in_the_bytes_that_are_stored(kind: str, pruned: str, share: float) -> None:
    found, budget = tables(), int(share * 4 * 500 * 6)
    if kind == "rows":
        kept = [torch.arange(s.num_ids) % 3 == 0 for s in SCHEMA]
        chosen = {s.name: choose(s, k, 4 if share > 0.5 else 1, pruned) for s, k in zip(SCHEMA, kept, strict=True)}
        wanted = [
            t * k.unsqueeze(1) * (torch.arange(6) < (4 if share > 0.5 else 1)) for t, k in zip(found, kept, strict=True)
        ]
    elif kind == "blocks":
        fields = fields_of(found, counts())
        chosen = keep_columns(fields, pruned, budget=budget, sparsity=0.0)
        wanted = []
        for f, table in zip(fields, found, strict=True):
            config, mask = chosen[f.spec.name][0], torch.ones_like(table)
            if config.method != "full":
                ranks = torch.empty(f.spec.num_ids, dtype=torch.int64)
                ranks[f.order if f.order is not None else torch.arange(f.spec.num_ids)] = torch.arange(f.spec.num_ids)
                edges = torch.tensor(config.blocks or ()).cumsum(0)
                bits = torch.tensor(config.columns)[torch.searchsorted(edges, ranks, right=True)]
                mask = (bits.unsqueeze(1) >> torch.arange(6)) & 1
            wanted.append(table * mask)
    else:
        masks = keep_elements(SCHEMA, found, pruned, budget=budget, sparsity=0.0)
        chosen = {s.name: choose_elements(s, k, pruned) for s, k in zip(SCHEMA, masks, strict=True)}
        wanted = [t * k for t, k in zip(found, masks, strict=True)]
    plan = make_plan(SCHEMA, chosen)
    coll = loaded(rse.Plan.from_dict(plan.to_dict()), found)
    assert stored_bytes(coll) == plan.footprint(SCHEMA).serve == coll.footprint().serve
    if kind != "rows":
        assert 0.6 * budget < stored_bytes(coll) <= budget
    for f, table in enumerate(wanted):
        got = vectors(coll, f)
        if pruned == "oov":
            got, table = (
                got[(table != 0).any(1)] if kind == "rows" else got,
                table[(table != 0).any(1)] if kind == "rows" else table,
            )
        torch.testing.assert_close(got, table)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), share=st.floats(0.02, 1.05), pruned=st.sampled_from(["zero", "oov"]))
@example(seed=0, share=1.0, pruned="zero")
def test_no_larger_number_of_columns_fits_the_budget(seed: int, share: float, pruned: str) -> None:
    g = torch.Generator().manual_seed(seed)
    fields = []
    for name, sizes in (("a", [2, 998]), ("b", [5, 300])):
        # A column of the few ids costs less than what the set of all others takes, which it makes needless.
        spec, order = FeatureSpec(name, sum(sizes), 4), torch.randperm(sum(sizes), generator=g)
        importance = torch.rand(2, 4, generator=g, dtype=torch.float64)
        fields.append(FieldBlocks(spec, sizes, list(order.split(sizes)), order, importance))
    budget = int(share * sum(4 * f.importance.shape[1] * f.spec.num_ids for f in fields))
    ranked = torch.cat([f.importance.reshape(-1) for f in fields]).argsort(descending=True, stable=True)
    fitting = []
    for count in range(len(ranked) + 1):
        kept = torch.zeros(len(ranked), dtype=torch.bool)
        kept[ranked[:count]] = True
        parts = kept.split([f.importance.numel() for f in fields])
        columns = [k.view_as(f.importance) for f, k in zip(fields, parts, strict=True)]
        configs = {f.spec.name: f.config(k, pruned) for f, k in zip(fields, columns, strict=True)}
        if sum(configs[f.spec.name].footprint(f.spec).serve for f in fields) <= budget:
            fitting.append(configs)
    found = keep_columns(fields, pruned, budget=budget, sparsity=0.0)
    assert {name: config for name, (config, _) in found.items()} == fitting[-1]


@given(st.lists(st.booleans(), max_size=40))
def test_what_is_most_within_a_limit(later: list[bool]) -> None:
    fits = [True, *later]
    top = len(later)
    found = most_within(top, fits.__getitem__, 100)
    assert fits[found]
    assert found == top or not (fits[found + 1] or fits[top])
    if fits == sorted(fits, reverse=True):
        assert found == sum(fits) - 1
    with pytest.raises(BudgetError, match="even with nothing kept"):
        most_within(top, lambda n: False, 100)


@pytest.mark.parametrize("kind", ["rows", "blocks", "elements"])
def test_what_is_pruned_stays_zero_in_training(kind: str) -> None:
    found = tables(1)
    if kind == "rows":
        kept = [torch.arange(s.num_ids) % 3 == 1 for s in SCHEMA]
        chosen = {s.name: choose(s, k, 4) for s, k in zip(SCHEMA, kept, strict=True)}
    elif kind == "blocks":
        chosen = keep_columns(fields_of(found, counts()), "zero", budget=None, sparsity=0.7)
    else:
        masks = keep_elements(SCHEMA, found, "zero", budget=None, sparsity=0.7)
        chosen = {s.name: choose_elements(s, k, "zero") for s, k in zip(SCHEMA, masks, strict=True)}
    coll = loaded(make_plan(SCHEMA, chosen), found, Adam(lr=0.05, weight_decay=0.01, rows="all"))
    before = [vectors(coll, f) for f in range(4)]
    coll.train()
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        ids = torch.stack([torch.randint(0, s.num_ids, (64,), generator=g) for s in SCHEMA], 1)
        ((coll(ids) - 1) ** 2).sum().backward()
    for f, old in enumerate(before):
        new = vectors(coll, f)
        assert torch.equal(new[old == 0], torch.zeros(int((old == 0).sum())))
        assert (new[old != 0] != old[old != 0]).all() or SCHEMA.features[f].num_ids == 1


def test_the_merged_table_gives_what_the_supernet_gave() -> None:
    seen = counts(3)
    sizes = block_sizes(seen, 3, "field", "mass")
    model = rse_model()
    net = Supernet(model, DnisLayer(block_maps(seen, sizes, "field"), 6)).eval()
    layer = net.layer
    with torch.no_grad():
        layer.alpha.copy_(torch.rand(layer.alpha.shape))
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(0, s.num_ids, (64,), generator=g) for s in SCHEMA], 1)
    dense = torch.randn(64, 2)
    wanted = net(dense, ids)
    with torch.no_grad():
        for f, s in enumerate(SCHEMA):
            net.table(s.name).mul_(layer.alpha[layer.blocks_of(f)])
        layer.alpha.fill_(1)
    torch.testing.assert_close(net(dense, ids), wanted, rtol=1e-6, atol=1e-6)


def rse_model():
    from recsys_embed.models import build_model

    return build_model("dcnv2", SCHEMA.with_init("normal:1"), rse.Plan.full(SCHEMA), num_dense=2, hidden=(8,))


# -- blocks ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(1, 8), st.sampled_from(["mass", "count"]))
def test_blocks_cover_all_ids_and_balance(values: list[int], blocks: int, balance: str) -> None:
    ordered = torch.tensor(sorted(values, reverse=True))
    sizes = cut(ordered, blocks, balance)
    assert sum(sizes) == len(values)
    assert min(sizes) >= 1
    assert len(sizes) <= blocks
    if balance == "count":
        assert max(sizes) - min(sizes) <= 1
    elif sum(values):
        heads = torch.stack([part.sum() for part in ordered.split(sizes)])[:-1]
        assert (heads >= 0).all()
        assert ((heads - ordered.sum() / blocks).abs() <= ordered.max() + ordered.sum() / blocks).all()


@pytest.mark.parametrize("scope", ["field", "global"])
def test_blocks_go_by_count(scope: str) -> None:
    seen = counts(5)
    sizes = block_sizes(seen, 4, scope, "mass")
    assert [sum(row) for row in sizes] == [s.num_ids for s in SCHEMA]
    maps = block_maps(seen, sizes, scope)
    for c, block in zip(seen, maps, strict=True):
        order = c.argsort(descending=True, stable=True)
        assert (block[order].diff() >= 0).all()
    if scope == "global":
        joined, block = torch.cat(seen), torch.cat(maps)
        mass = torch.bincount(block, joined.double(), minlength=4)
        assert (mass / mass.sum() - 0.25).abs().max() < 0.02
        assert all(joined[block == b].min() >= joined[block == b + 1].max() for b in range(3))
    else:
        assert len(torch.cat(maps).unique()) == sum(len(row) for row in sizes)


def test_a_budget_below_the_sets_of_ids_is_refused() -> None:
    with pytest.raises(BudgetError, match="even with nothing kept"):
        keep_elements(SCHEMA, tables(), "zero", budget=3, sparsity=0.0)
