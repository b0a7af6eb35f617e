"""optembed, dnis and pep as stored: a lookup gives the masked full table, to the bit, and costs what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recsys_embed as rse
from recsys_embed import DnisConfig, FeatureSpec, OptembedConfig, PepConfig
from recsys_embed.errors import ConfigError
from recsys_embed.search.extract import choose, make_plan, take_rows
from recsys_embed.search.pruning import choose_elements


def collection(spec: FeatureSpec, found) -> rse.EmbeddingCollection:
    schema = rse.Schema([spec])
    coll = rse.EmbeddingCollection(schema, make_plan(schema, {spec.name: found}))
    return coll


def dense_of(coll: rse.EmbeddingCollection, spec: FeatureSpec) -> torch.Tensor:
    return coll(torch.arange(spec.num_ids).unsqueeze(1))[:, 0].detach()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 200), width=st.integers(1, 6))
def test_rows_and_width(data: st.DataObject, n: int, width: int) -> None:
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    dim = data.draw(st.integers(1, width))
    spec = FeatureSpec("a", n, width)
    found = choose(spec, kept, dim)
    coll, table = collection(spec, found), torch.randn(n, width)
    take_rows(coll, "a", table)
    wanted = table * kept.unsqueeze(1) * (torch.arange(width) < dim)
    assert torch.equal(dense_of(coll, spec), wanted)
    count = int(kept.sum())
    if count > 0:
        assert found[0].footprint(spec).weights == 4 * count * dim
    front = count in (0, n) or bool(kept[:count].all())
    assert (found[0].footprint(spec).index == 0) == front


@settings(max_examples=40, deadline=None)
@given(data=st.data(), width=st.integers(1, 6), order=st.sampled_from(["ids", "counts"]))
def test_blocks_of_columns(data: st.DataObject, width: int, order: str) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    columns = [data.draw(st.integers(0, 2**width - 1)) for _ in sizes]
    n = sum(sizes)
    config = DnisConfig(columns=tuple(columns), blocks=tuple(sizes[:-1]) or None, pruned="zero", order=order)
    emb = rse.DnisEmbedding(n, width, config=config)
    counts = torch.randperm(n) if order == "counts" else torch.arange(n, 0, -1)
    emb.assign_(counts)
    block = torch.empty(n, dtype=torch.int64)
    block[counts.argsort(descending=True)] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mask = ((torch.tensor(columns)[block].unsqueeze(1) >> torch.arange(width)) & 1).bool()
    assert torch.equal(emb.materialize() != 0, mask)
    gaps = emb.footprint().weights - 4 * int(mask.sum())
    assert gaps in (0, 4), "columns that nobody has cost one number at most"
    emb(torch.arange(n)).sum().backward()
    assert sum(int(p.grad.count_nonzero()) for name, p in emb.named_parameters() if name != "gap") == int(mask.sum())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 150), width=st.integers(1, 5))
def test_single_elements(data: st.DataObject, n: int, width: int) -> None:
    share = data.draw(st.sampled_from([0.0, 0.02, 0.3, 0.95, 1.0]))
    kept = torch.rand(n, width, generator=torch.Generator().manual_seed(n)) < share
    spec = FeatureSpec("a", n, width)
    found = choose_elements(spec, kept, "zero")
    coll, table = collection(spec, found), torch.randn(n, width)
    take_rows(coll, "a", table)
    assert torch.equal(dense_of(coll, spec), table * kept)
    footprint = found[0].footprint(spec)
    assert footprint.weights - 4 * int(kept.sum()) in (0, 4)
    assert footprint.index <= 12 * width * -(-n // 64)


@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_plans_with_sets_ship_as_they_are(kind: str, tmp_path: Path) -> None:
    spec, g = FeatureSpec("a", 2000, 8, init="normal:1"), torch.Generator().manual_seed(0)
    if kind == "rows":
        found = choose(spec, torch.rand(2000, generator=g) < 0.3, 5)
    else:
        found = choose_elements(spec, torch.rand(2000, 8, generator=g) < 0.1, "zero")
    coll = collection(spec, found).eval()
    path = tmp_path / "model.safetensors"
    rse.export(coll, path)
    served = rse.load(path)
    ids = torch.arange(2000).unsqueeze(1)
    torch.testing.assert_close(served(ids), coll(ids))
    size = coll.footprint().serve
    assert size <= path.stat().st_size < 1.01 * size + 16_384


def test_faults_are_named() -> None:
    spec = FeatureSpec("a", 10, 4)
    for config, text in (
        (OptembedConfig(num_kept=11), r"`num_kept` must be in \[0, 10\]"),
        (OptembedConfig(num_kept=1, dim=5), r"`dim` must be in \[1, 4\]"),
        (DnisConfig(columns=(16,)), r"1 numbers below 2\^4"),
        (DnisConfig(columns=(1,), blocks=(3,)), "must be 2 numbers"),
        (PepConfig(num_kept=(1, 2)), "must be 4 numbers"),
        (PepConfig(num_kept=(1, 2, 3, 11)), r"in \[0, 10\]"),
    ):
        with pytest.raises(ConfigError, match=text):
            config.program(spec)
