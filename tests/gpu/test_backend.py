"""On a GPU: the same bits for hashes and initial weights, and the same numbers for lookups and fused steps."""

from __future__ import annotations

import pytest
import torch

import recsys_embed as rse
from recsys_embed.core import hashing
from recsys_embed.testing import check_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCHEMA = rse.Schema([rse.FeatureSpec("a", 1000, 16), rse.FeatureSpec("b", 70_000, 16, pooling="mean")])


def test_the_torch_backend_equals_the_reference() -> None:
    check_backend("torch", "cuda")


def test_hashes_have_the_same_bits() -> None:
    ids = torch.randint(-(2**63), 2**63 - 1, (100_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(hashing.hash_rows(ids.cuda(), 7, 2**31 - 1).cpu(), hashing.hash_rows(ids, 7, 2**31 - 1))
    assert torch.equal(hashing.murmur3_words(ids.cuda(), 7).cpu(), hashing.murmur3_words(ids, 7))


@pytest.mark.parametrize("method", [m.name for m in rse.list_methods() if m.name != "full"])
@pytest.mark.parametrize("rule", [rse.SGD(0.1), rse.Adagrad(0.1), rse.RowwiseAdagrad(0.1), rse.Adam(0.1)], ids=repr)
def test_fused_steps_agree_with_the_cpu(method: str, rule: rse.SGD) -> None:
    plan = rse.Plan.uniform(SCHEMA, method, budget="1MiB")
    here, there = (rse.EmbeddingCollection(SCHEMA, plan, rule, device=d) for d in ("cpu", "cuda"))
    for name, weight in here.named_parameters():
        assert torch.equal(weight, there.get_parameter(name).cpu()), f"{name} starts with other bits"
    ids = torch.randint(0, 1000, (512, 2), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for coll in (here, there):
            coll(ids.to(next(coll.parameters()).device)).square().sum().backward()
    for name, weight in here.named_parameters():
        torch.testing.assert_close(there.get_parameter(name).cpu(), weight, rtol=1e-4, atol=1e-5)
