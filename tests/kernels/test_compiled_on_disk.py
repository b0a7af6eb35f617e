"""Programs that torch.compile keeps on disk run for the lookup and the operators that they were compiled of."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import recsys_embed as rse
from recsys_embed.kernels.native import handles
from recsys_embed.kernels.native import library as native_library

SCHEMA = rse.Schema([rse.FeatureSpec("a", 100, 8)])


def _collection(
    monkeypatch: pytest.MonkeyPatch, order: str, rule: rse.FusedOptimizer | None, first: int
) -> rse.EmbeddingCollection:
    """Made as in another process, whose handles count from ``first``."""
    monkeypatch.setattr(handles, "_NUMBERS", count(first))
    plan = rse.Plan.uniform(SCHEMA, "freqcut", num_frequent=10, order=order)
    return rse.EmbeddingCollection(SCHEMA, plan, optimizer=rule)


def test_a_handle_names_the_operators_and_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    things = [type("Thing", (), {})() for _ in range(4)]
    monkeypatch.setattr(handles, "_NUMBERS", count(0))
    first, second = handles.handle_of(things[0], (8,)), handles.handle_of(things[1], (8,))
    assert second == first + 1
    assert 0 <= first < 2**63, "operators take int64"
    assert handles.KNOWN[first] is things[0]
    monkeypatch.setattr(handles, "_NUMBERS", count(0))
    assert handles.handle_of(things[2], (8, 8)) != first
    monkeypatch.setattr(handles, "_NUMBERS", count(0))
    monkeypatch.setattr(handles, "_operators", lambda: b"another version")
    assert handles.handle_of(things[3], (8,)) != first


@pytest.mark.skipif(isinstance(native_library.library(), str), reason="lookups without index arrays look alike")
@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, rse.SGD(lr=0.1)], ids=["dense", "fused"])
def test_a_cached_program_of_another_lookup_is_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rule: rse.FusedOptimizer | None
) -> None:
    """Two lookups of equal tables, of which one returns its index array too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    ids = torch.arange(12).view(-1, 1)
    hits = []
    for order in ("ids", "counts", "counts"):
        torch._dynamo.reset()
        counters.clear()
        # The compiled one counts as those of earlier rounds, whose programs are cached; no two living ones count alike.
        compiled, plain = (_collection(monkeypatch, order, rule, first) for first in (1 << 20, 1 << 21))
        for module, call in ((compiled, torch.compile(compiled)), (plain, plain)):
            call(ids).square().sum().backward()
            for p in module.parameters():
                if p.grad is not None:
                    p.data.sub_(p.grad)
        assert torch.equal(compiled.width8, plain.width8)
        hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 0, 1]
