"""Lookups and whole embedding steps on a GPU: bandwidth beside that of a copy, and FBGEMM's kernels beside ours.

Run: make bench-gpu, or: python benchmarks/bench_gpu.py [--out FILE] [--seconds 420] [--tune]

Tables of ten times the GPU's L2 cache, one id per sample and feature, four sets of ids in turn, uniform and Zipf(1.05).
Every case is compared with the torch backend before it is timed. Forward: the bytes that have to move (rows read,
vectors written, ids) by time, and that as a fraction of what a copy reaches in the same run. Step: forward, backward
and rowwise Adagrad. Beside it: FBGEMM's TBE for full tables, which gets its ids in its own layout for nothing; for
composed ones torch's index arithmetic and a TBE, with that arithmetic in the time. 16-bit tables are bfloat16 here and
float16 there. RECSYS_EMBED_FBGEMM names a folder to import fbgemm_gpu from; where it does not import, torch's own
gather stands in its place, and the row says so. Times are medians of GPU time; the CPU runs ahead.

``--smoke`` walks through it on tiny tables, also in triton's interpreter on a CPU: it prints no figures.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from measure import report
from torch import Tensor

import recsys_embed as rse
from recsys_embed import EmbeddingCollection, FeatureSpec, Plan, Schema
from recsys_embed.kernels.triton import status

FEATURES, SETS, ROUNDS = 8, 4, 12
RULE = rse.RowwiseAdagrad(lr=0.01)
Step = Callable[[int], Tensor]


@dataclass(frozen=True)
class Case:
    """A method on tables of one width and type; ``row_lookups`` rows per id."""

    method: str
    row_lookups: int
    dim: int
    dtype: torch.dtype
    skew: str
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize

    @property
    def name(self) -> str:
        return " ".join([self.method, *map(str, self.params.values())])


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tables, and of the vectors of a step."""

    tables: int
    vectors: int
    most_lookups: int


def cases() -> Iterator[Case]:
    types, skews = (torch.float32, torch.bfloat16), ("uniform", "zipf")
    for dtype, skew, dim in itertools.product(types, skews, (8, 16, 32, 64, 128, 256)):
        yield Case("full", 1, dim, dtype, skew)
    composed: list[tuple[str, int, dict[str, Any]]] = [
        ("hash", 1, {}),
        ("compositional", 2, {"combine": "mul"}),
        ("compositional", 2, {"combine": "sum"}),
        ("multihash", 4, {"num_hashes": 4}),
    ]
    for (method, row_lookups, params), dtype, skew, dim in itertools.product(composed, types, skews, (16, 64, 128)):
        yield Case(method, row_lookups, dim, dtype, skew, params)


def fbgemm() -> tuple[Any, str]:
    """FBGEMM's maker of tables, or None; and in words what stands beside our kernels."""
    folder = os.environ.get("RECSYS_EMBED_FBGEMM")
    if folder:
        sys.path.insert(0, folder)
    try:
        import fbgemm_gpu
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except (ImportError, OSError, AttributeError, RuntimeError) as e:
        return None, f"torch's gather: fbgemm_gpu does not import ({type(e).__name__}: {e})"

    def make(sizes: list[int], dim: int, dtype: torch.dtype) -> Any:
        kind = SparseType.FP32 if dtype == torch.float32 else SparseType.FP16
        return SplitTableBatchedEmbeddingBagsCodegen(
            [(n, dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA) for n in sizes],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=RULE.lr,
            eps=RULE.eps,
            weights_precision=kind,
            output_dtype=kind,
            stochastic_rounding=dtype != torch.float32,
            pooling_mode=PoolingMode.SUM,
        )

    return make, f"fbgemm_gpu {getattr(fbgemm_gpu, '__version__', '')}"


def built(case: Case, sizes: Sizes, device: str, backend: str, plan: Plan | None = None) -> EmbeddingCollection:
    """A collection with random tables, made where they are: the library's own initial values come from the CPU."""
    rows = max(FEATURES, sizes.tables // case.row_bytes // FEATURES)
    # Composed methods read tables of the same bytes, so they stand for more ids.
    ids = rows if case.method == "full" else min(8 * rows, 2**31 - 2)
    schema = Schema([FeatureSpec(f"C{i}", ids, case.dim) for i in range(FEATURES)])
    if plan is None:
        budget = rows * FEATURES * case.dim * 4
        plan = (
            Plan.full(schema)
            if case.method == "full"
            else Plan.uniform(schema, case.method, budget=budget, **case.params)
        )
    coll = EmbeddingCollection(schema, plan, RULE, device="meta", dtype=case.dtype, backend=backend).to_empty(
        device=device
    )
    with torch.no_grad():
        for name in coll.storages:
            getattr(coll, name).normal_()
            getattr(coll, f"{name}_sum").zero_()
    return coll


def ids_of(case: Case, coll: EmbeddingCollection, batch: int, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    size = coll.schema.features[0].num_embeddings
    out = []
    for _ in range(SETS):
        draws = torch.rand(batch, FEATURES, generator=generator, device=device, dtype=torch.float64)
        if case.skew == "zipf":
            e = 1.0 - 1.05
            rank = (((size + 1.0) ** e - 1.0) * draws + 1.0) ** (1.0 / e) - 1.0
            out.append((rank.long().clamp_(0, size - 1) * 2654435761 + 12345) % size)
        else:
            out.append((draws * size).long().clamp_(max=size - 1))
    return out


def beside(case: Case, coll: EmbeddingCollection, ids: list[Tensor], make: Any) -> Step | None:
    """What stands beside our kernels, with tables of the same sizes."""
    if case.method == "full":
        if make is None:
            storage = coll.storages[0]
            weight = getattr(coll, storage).detach()
            starts = torch.tensor([coll.places[f"C{i}.weight"].offset for i in range(FEATURES)], device=weight.device)
            return lambda turn: torch.nn.functional.embedding(ids[turn] + starts, weight)
        tables = make([coll.schema.features[0].num_embeddings] * FEATURES, case.dim, case.dtype)
        flat = [i.T.contiguous().view(-1) for i in ids]
        offsets = torch.arange(len(flat[0]) + 1, device=flat[0].device)
        return lambda turn: tables(flat[turn], offsets)
    groups = coll.bundle.kernel.groups
    if len(groups) != 1 or len(coll.storages) != 1:
        return None
    group, weight = groups[0], getattr(coll, coll.storages[0]).detach()
    tables = make([weight.shape[0]], case.dim, case.dtype) if make else None
    lookups = ids[0].numel() * case.row_lookups
    offsets = torch.arange(lookups + 1, device=weight.device)

    def run(turn: int) -> Tensor:
        arrays = coll.bundle.kernel.index.arrays
        asked = group.rows(ids[turn], None, arrays)
        rows = [r for _, r in asked]
        flat = torch.cat([r.reshape(-1) for r in rows])
        read = tables(flat, offsets) if tables else torch.nn.functional.embedding(flat, weight)
        values = [v.view(*r.shape, case.dim) for v, r in zip(read.split([r.numel() for r in rows]), rows, strict=True)]
        return group.combine(ids[turn], None, rows, values)

    return run


class Clock:
    """Medians of GPU time, in milliseconds."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds, self.warmup = device, rounds, 3 if rounds > 1 else 0

    def __call__(self, run: Callable[[int], Any]) -> float:
        times = []
        for turn in range(self.warmup + self.rounds):
            if self.device == "cpu":
                start = time.perf_counter()
                run(turn % SETS)
                times.append(1000 * (time.perf_counter() - start))
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # While the GPU idles here the CPU queues all launches, so that its own time is not measured.
            torch.cuda._sleep(2_000_000)
            begin.record()
            run(turn % SETS)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return median(times[self.warmup :])


def copy_bandwidth(clock: Clock, size: int) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.empty(size // 4, device=clock.device).normal_()
    to = torch.empty_like(source)
    return 2 * size / (clock(lambda turn: to.copy_(source)) / 1000)


def check(case: Case, coll: EmbeddingCollection, ids: Tensor, sizes: Sizes, device: str) -> None:
    """Raise unless some vectors are those of the torch backend."""
    oracle = EmbeddingCollection(coll.schema, coll.plan, device="meta", dtype=case.dtype, backend="torch")
    for name in coll.storages:
        setattr(oracle, name, torch.nn.Parameter(getattr(coll, name).detach()))
    oracle.bundle.to_empty(device=device)
    some = ids[:512]
    tolerance = 1e-5 if case.dtype == torch.float32 else 0.05
    torch.testing.assert_close(coll(some).detach(), oracle(some).detach(), rtol=tolerance, atol=tolerance)


def run(case: Case, sizes: Sizes, clock: Clock, bandwidth: float, make: Any, other: str) -> dict[str, Any]:
    """One case, measured."""
    device = clock.device
    coll = built(case, sizes, device, "triton")
    lookups = min(sizes.vectors // case.row_bytes, sizes.most_lookups)
    batch = max(1, lookups // FEATURES)
    ids = ids_of(case, coll, batch, device)
    check(case, coll, ids[0], sizes, device)
    upstream = torch.randn(batch, FEATURES, case.dim, device=device).to(case.dtype)

    def step(look_up: Step) -> Callable[[int], None]:
        given = upstream.to(look_up(0).dtype)

        def both(turn: int) -> None:
            out = look_up(turn)
            out.backward(given.view(out.shape))

        return both

    def eval_forward(look_up: Step) -> Callable[[int], Tensor]:
        def forward(turn: int) -> Tensor:
            with torch.no_grad():
                return look_up(turn)

        return forward

    moved = batch * FEATURES * ((case.row_lookups + 1) * case.row_bytes + 8)
    ours = {
        "forward": clock(eval_forward(lambda turn: coll(ids[turn]))),
        "step": clock(step(lambda turn: coll(ids[turn]))),
    }
    row: dict[str, Any] = {"case": case.name, "dim": case.dim, "dtype": str(case.dtype).removeprefix("torch.")}
    row |= {"row_lookups": case.row_lookups, "ids": case.skew, "batch": batch, "features": FEATURES}
    row |= {"row_bytes": case.row_bytes, "table_bytes": sum(getattr(coll, n).nbytes for n in coll.storages), "ms": ours}
    row["fraction_of_copy"] = moved / (ours["forward"] / 1000) / bandwidth
    found = beside(case, coll, ids, make)
    if found is not None:
        theirs = {"forward": clock(eval_forward(found))}
        if make is not None:
            theirs["step"] = clock(step(found))
        row |= {"beside": other, "beside_ms": theirs, "ratio": {k: theirs[k] / ours[k] for k in theirs}}
    return row


def tune(sizes: Sizes, clock: Clock) -> list[dict[str, Any]]:
    """Forward times over the size of tiles and warps, for whoever sets ``_TILE`` and ``_WARPS`` of the lookup."""
    from recsys_embed.kernels.triton import lookup

    rows = []
    for method, row_lookups, dim, dtype in itertools.product(
        ("full", "multihash"), (1,), (16, 64, 128), (torch.float32, torch.bfloat16)
    ):
        case = Case(method, 4 if method == "multihash" else row_lookups, dim, dtype, "uniform")
        row: dict[str, Any] = {"tune": case.name, "dim": dim, "dtype": str(dtype), "ms": {}}
        for tile, warps in itertools.product((1024, 2048, 4096, 8192), (2, 4, 8)):
            lookup._TILE, lookup._WARPS = tile, warps
            coll = built(case, sizes, clock.device, "triton")
            ids = ids_of(case, coll, min(sizes.vectors // case.row_bytes, sizes.most_lookups) // FEATURES, clock.device)
            with torch.no_grad():
                row["ms"][f"{tile} x {warps}"] = clock(lambda turn, coll=coll, ids=ids: coll(ids[turn]))
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument(
        "--seconds", type=float, default=420, help="cases that would begin later are left out, and named"
    )
    parser.add_argument("--tune", action="store_true", help="sweep tiles and warps instead")
    parser.add_argument("--smoke", action="store_true", help="tiny tables, no figures")
    given = parser.parse_args()
    why = status.why_not()
    if why is not None:
        sys.exit(f"nothing to measure: {why}")
    if status.interpreted() and not given.smoke:
        sys.exit("nothing to measure: kernels run in triton's interpreter (TRITON_INTERPRET=1)")
    device = "cpu" if status.interpreted() else "cuda"
    clock = Clock(device, 1 if given.smoke else ROUNDS)
    if given.smoke:
        sizes = Sizes(1 << 14, 1 << 12, 64)
    else:
        sizes = Sizes(10 * torch.cuda.get_device_properties(0).L2_cache_size, 1 << 29, 1 << 23)
    make, other = fbgemm() if device == "cuda" else (None, "torch's gather: on the CPU")
    start, rows, left = time.perf_counter(), [], []
    bandwidth = copy_bandwidth(clock, 1 << (16 if given.smoke else 30))
    if given.tune:
        rows = tune(sizes, clock)
    else:
        chosen = list(cases())
        if given.smoke:
            chosen = [Case("full", 1, 8, torch.float32, "zipf"), Case("hash", 1, 8, torch.bfloat16, "uniform")]
        for case in chosen:
            if time.perf_counter() - start > given.seconds:
                left.append(f"{case.name} {case.dim} {case.dtype} {case.skew}")
                continue
            rows.append(run(case, sizes, clock, bandwidth, make, other))
            if not given.smoke:
                print(rows[-1], file=sys.stderr, flush=True)
    if given.smoke:
        print(f"walked through {len(rows)} cases; nothing was measured")
        return
    gpu = torch.cuda.get_device_properties(0)
    import triton

    first: dict[str, Any] = {"gpu": gpu.name, "memory": gpu.total_memory, "l2": gpu.L2_cache_size}
    first |= {"cuda": torch.version.cuda, "triton": triton.__version__, "beside": other, "left_out": left}
    first |= {"copy_bytes_per_second": [bandwidth, copy_bandwidth(clock, 1 << 30)]}
    report("gpu", [first, *rows])


if __name__ == "__main__":
    main()
