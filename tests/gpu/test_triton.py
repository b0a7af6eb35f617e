"""What only a GPU shows of its kernels: real sizes, the same bits in every run, late errors, moving between devices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.errors import IdRangeError
from recsys_embed.kernels.triton import status
from recsys_embed.testing import check_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(status.interpreted(), reason="in triton's interpreter"),
]
METHODS = pytest.mark.parametrize("method", rse.list_methods(), ids=lambda m: m.name)
SCHEMA = Schema([FeatureSpec(f"C{i}", n, 16) for i, n in enumerate((3, 1000, 70_000, 400_000))])
BATCH = 4096


def plan_of(method: Any) -> Plan:
    need = sum(method.config_cls.sized(s, 1).footprint(s).serve for s in SCHEMA)
    whole = sum(4 * s.num_embeddings * s.embedding_dim for s in SCHEMA)
    return Plan.uniform(SCHEMA, method.name, budget=max(need, whole // 4), full_below=1)


def zipf(seed: int, batch: int = BATCH) -> Tensor:
    """Ids of which a few are very frequent, as in click logs."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(batch, len(SCHEMA), generator=generator, dtype=torch.float64)
    sizes = torch.tensor([s.num_embeddings for s in SCHEMA])
    return ((sizes.double() + 1) ** draws).long().sub(1).clamp(max=sizes - 1).cuda()


def test_auto_chooses_the_kernels() -> None:
    assert status.why_not() is None
    assert EmbeddingCollection(SCHEMA, device="cuda").backend == "triton"
    check_backend("auto", "cuda")


@METHODS
def test_steps_of_real_size(method: Any) -> None:
    rule = rse.RowwiseAdagrad(lr=0.1)
    ours = EmbeddingCollection(SCHEMA, plan_of(method), rule, device="cuda", backend="triton")
    oracle = EmbeddingCollection(SCHEMA, ours.plan, rule, device="cuda", backend="torch").double()
    for step in range(2):
        ids = zipf(step)
        got, wanted = ours(ids), oracle(ids)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
        upstream = torch.randn(got.shape, dtype=torch.float64, device="cuda")
        got.backward(upstream.float())
        wanted.backward(upstream)
    for name in ours.storages:
        # Sums of thousands of gradients in float32.
        torch.testing.assert_close(getattr(ours, name).double(), getattr(oracle, name), rtol=1e-3, atol=1e-3)


@METHODS
def test_deterministic_algorithms_give_the_same_bits(method: Any) -> None:
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            coll = EmbeddingCollection(SCHEMA, plan_of(method), rse.Adam(lr=0.1), device="cuda", backend="triton")
            for step in range(2):
                out = coll(zipf(step))
                out.backward(torch.cos(torch.arange(out.numel(), device="cuda")).view_as(out))
            results.append([getattr(coll, name).clone() for name in coll.storages])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_an_error_comes_late_and_the_process_lives_on() -> None:
    coll = EmbeddingCollection(SCHEMA, optimizer=rse.SGD(lr=1.0), device="cuda")
    before = coll.width16.clone()
    ids = zipf(0)
    ids[7, 1] = 1000
    out = coll(ids)
    torch.cuda.synchronize()
    with pytest.raises(IdRangeError, match=r"\[0, 1000\); got 1000 \(feature 'C1'\)"):
        out.sum().backward()
    assert torch.equal(coll.width16, before)
    ids[7, 1] = 999
    coll(ids).sum().backward()
    assert not torch.equal(coll.width16, before)


def test_tables_move_between_devices() -> None:
    rule = rse.Adam(lr=0.1)
    coll = EmbeddingCollection(SCHEMA, optimizer=rule)
    twin = copy.deepcopy(coll)
    for step in range(4):
        device = ("cpu", "cuda")[step % 2]
        coll = coll.to(device)
        for one, where in ((coll, device), (twin, "cpu")):
            one(zipf(step, 64).to(where)).square().sum().backward()
    torch.testing.assert_close(coll.width16.cpu(), twin.width16, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coll.width16_exp_avg.cpu(), twin.width16_exp_avg, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_for_optimizers_of_torch(sparse: bool) -> None:
    coll = EmbeddingCollection(SCHEMA, device="cuda", backend="triton", sparse=sparse)
    oracle = EmbeddingCollection(SCHEMA, device="cuda", backend="torch", sparse=sparse)
    for one in (coll, oracle):
        out = one(zipf(0))
        out.backward(torch.cos(torch.arange(out.numel(), device="cuda")).view_as(out))
    assert coll.width16.grad is not None
    assert oracle.width16.grad is not None
    torch.testing.assert_close(coll.width16.grad.to_dense(), oracle.width16.grad.to_dense(), rtol=1e-3, atol=1e-3)


def test_rows_beyond_two_to_the_thirty_one_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    rows = 34_000_000
    if free < 3 * rows * 64 * 2:
        pytest.skip("needs 13 GB of GPU memory")
    schema = Schema([FeatureSpec("a", rows, 64), FeatureSpec("b", 10, 64)])
    coll = EmbeddingCollection(schema, optimizer=rse.SGD(lr=1.0), device="meta", dtype=torch.bfloat16)
    coll = coll.to_empty(device="cuda")
    with torch.no_grad():
        coll.width64.zero_()
        coll.width64[rows - 1] = 3.0
        coll.width64[rows + 9] = 5.0
    out = coll(torch.tensor([[rows - 1, 9], [0, 0]], device="cuda"))
    assert out[:, :, 0].tolist() == [[3.0, 5.0], [0.0, 0.0]]
    out.sum().backward()
    assert [float(coll.width64[r, 63]) for r in (0, rows - 2, rows - 1, rows + 8, rows + 9)] == [
        -1.0,
        0.0,
        2.0,
        0.0,
        4.0,
    ]


def test_sixteen_bits() -> None:
    coll = EmbeddingCollection(SCHEMA, optimizer=rse.SGD(lr=1.0), device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        coll.width16.fill_(1.0)
    ids = torch.arange(3 * 4096, device="cuda").view(-1, 1) % 400_000
    out = coll(torch.cat([ids % 3, ids % 1000, ids % 70_000, ids], 1))
    out[:, 3].backward(torch.full_like(out[:, 3], -0.002))
    moved = coll.table("C3.weight")[: 3 * 4096].double()
    assert set(moved.unique().tolist()) <= {1.0, 1.0078125}
    assert abs(float(moved.mean()) - 1.002) < 2e-4, "steps below the spacing of bfloat16 count on average"
