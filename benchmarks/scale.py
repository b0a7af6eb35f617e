"""Criteo 1TB on 8 to 512 GPUs on paper, and the paper's small cases against processes of this machine.

Run: python benchmarks/scale.py [--out FILE] [--quick] [--ratio 10] [--batch-size 8192]

``paper``: per-rank bytes, bytes sent and the tables' part of a step, at width 128, for full tables and for a plan of
``--ratio`` times fewer bytes, by TorchRec's planner and the byte counts of :mod:`recsys_embed.sharding.placement`.
``here``: the same predictions for 2 and 4 processes on gloo, scaled-down tables, beside what these processes allocate,
send and take. The planner is given the bandwidths that are measured here first, so that its step times are predictions
and not datasheets. Every assumption is printed.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import report

import recsys_embed as rse
from recsys_embed.sharding import Optimizers, ShardableCollection, shard
from recsys_embed.sharding.placement import Cluster, Placement, place

# Rows of the 26 tables, days 0 to 23, capped at 40 million: those of MLPerf's DLRM.
ROWS = (40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209,
        11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36)  # fmt: skip
WIDTH, HBM, PER_HOST = 128, "80GiB", 8
RULE = rse.RowwiseAdagrad(lr=0.01)
SMALL_WIDTH, SHRINK = 32, 400
ASSUMPTIONS = [
    f"26 tables of {sum(ROWS):,} rows, width {WIDTH}, float32; one id per feature and sample",
    f"devices of {HBM}, {PER_HOST} per host, 15 % of each left to layers, activations and the allocator",
    "bandwidths of TorchRec's planner: 600 GiB/s within a host, 12.5 GiB/s between hosts, 897 GiB/s of memory; an H100 "
    "reads its memory about four times as fast, so steps bound by memory are overestimated",
    "row-wise Adagrad inside backward, its state one float per row, in the bytes",
    "a step's time is that of the tables on the slowest rank: ids out, look-up, vectors back, gradients, update; dense "
    "layers are not in it, and nothing overlaps",
    "bytes sent are what a rank sends on average if no id occurs twice in a batch; look-ups by id (pool ids) send rows "
    "that occur often once, which is not counted in their favour",
    "here, a step takes a fixed part, measured at 16 samples, and the planner's estimate times a factor, fitted on the "
    "first case of 2 processes alone; on paper neither is added",
    "the compressed plan is that of recsys_embed.plan_for_budget with Zipf curves for frequencies",
]


def criteo(width: int, shrink: int = 1) -> rse.Schema:
    return rse.Schema([rse.FeatureSpec(f"C{i}", max(3, n // shrink), width) for i, n in enumerate(ROWS, 1)])


def line(found: Placement) -> dict[str, Any]:
    if not found.fits:
        return {"fits": False, "why": found.why}
    kinds: dict[str, int] = {}
    for table in found.tables:
        kinds[table.kind] = kinds.get(table.kind, 0) + 1
    return {
        "fits": True,
        "one_copy_gib": round(found.total / 2**30, 3),
        "largest_rank_gib": round(max(found.weights) / 2**30, 3),
        "largest_rank_with_inputs_gib": round(max(found.memory) / 2**30, 3),
        "sent_mib_per_rank_step": round(sum(found.sent.values()) / 2**20, 1),
        "step_ms": round(found.step_ms, 2),
        "kinds": kinds,
    }


def paper(sizes: list[int], ratio: float, batch: int) -> list[dict[str, Any]]:
    schema = criteo(WIDTH)
    plain = 4 * sum(s.num_embeddings * s.embedding_dim for s in schema)
    plan = rse.plan_for_budget(schema, int(plain / ratio), optimizer="rowwise_adagrad")
    rows = []
    for world in sizes:
        cluster = Cluster(world, hosts=max(1, world // PER_HOST), hbm=HBM, batch_size=batch)
        for name, one in (("full", None), (f"planned {ratio:g}x", plan)):
            for pool in ("tables", "ids"):
                found = line(place(schema, one, cluster, optimizer=RULE, pool=pool))
                known = {"part": "paper", "devices": world, "plan": name, "pool": pool, "batch_per_device": batch}
                rows.append({**known, **found})
                print(rows[-1], file=sys.stderr)
    return rows


# -- processes of this machine ----------------------------------------------------------------------------------------


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Bytes that this process hands to collectives for others, by collective."""
    sent: dict[str, int] = {}
    real = {name: getattr(dist, name) for name in ("all_to_all_single", "reduce_scatter", "reduce_scatter_tensor",
                                                   "all_gather", "all_gather_into_tensor")}  # fmt: skip

    def add(name: str, count: float) -> None:
        sent[name] = sent.get(name, 0) + int(count)

    def all_to_all(output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None,
                   *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        rank, world = dist.get_rank(), dist.get_world_size()
        kept = input.shape[0] // world if not input_split_sizes else input_split_sizes[rank]
        add("all_to_all", input.nbytes - kept * (input.nbytes // max(1, input.shape[0])))
        return real["all_to_all_single"](output, input, output_split_sizes, input_split_sizes, *args, **kwargs)

    def to_all(name: str, parts: Any) -> Any:
        def run(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            add(name, parts(output, input))
            return real[name](output, input, *args, **kwargs)

        return run

    def scattered(output: Any, input: Any) -> float:
        return sum(t.nbytes for t in input) - output.nbytes

    others = dist.get_world_size() - 1
    dist.all_to_all_single = all_to_all
    dist.reduce_scatter = to_all("reduce_scatter", scattered)
    dist.reduce_scatter_tensor = to_all("reduce_scatter_tensor", lambda out, given: given.nbytes - out.nbytes)
    dist.all_gather = to_all("all_gather", lambda _, given: given.nbytes * others)
    dist.all_gather_into_tensor = to_all("all_gather_into_tensor", lambda _, given: given.nbytes * others)
    try:
        yield sent
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def bandwidths(rank: int, world: int) -> tuple[float, float]:
    """Bytes per second that a rank sends in an all-to-all, and reads of random rows, all ranks being busy."""
    data = torch.zeros(world * (1 << 20))
    out, table = torch.empty_like(data), torch.rand(200_000, SMALL_WIDTH)
    rows = torch.randint(0, len(table), (100_000,))
    links, reads = [], []
    for _ in range(7):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(out, data)
        links.append(data.nbytes * (world - 1) / world / (time.perf_counter() - start))
        dist.barrier()
        start = time.perf_counter()
        table.index_select(0, rows)
        reads.append(rows.numel() * SMALL_WIDTH * 4 / (time.perf_counter() - start))
    both = torch.tensor([statistics.median(links), statistics.median(reads)], dtype=torch.float64)
    dist.all_reduce(both)
    link, memory = (both / world).tolist()
    return link, memory


def measured(rank: int, world: int, batch: int, steps: int) -> list[dict[str, Any]]:
    schema = criteo(SMALL_WIDTH, SHRINK)
    plain = 4 * sum(s.num_embeddings * s.embedding_dim for s in schema)
    plans = {"full": None, "planned 10x": rse.plan_for_budget(schema, plain // 10, optimizer="rowwise_adagrad")}
    plans["unified 10x"] = rse.Plan.uniform(schema, "unified", budget=plain // 10)
    link, memory = bandwidths(rank, world)
    cluster = Cluster(world, batch_size=batch, device="cpu", intra=link, inter=link, memory=memory)
    rows = []
    for name, plan in plans.items():
        for kind in ("table_wise", "row_wise"):
            for pool in ("tables", "ids"):
                found = place(schema, plan, cluster, optimizer=RULE, kinds=kind, pool=pool)
                coll = ShardableCollection(schema, plan, RULE, pool=pool, device="meta")
                model = shard(coll, kind, topology=cluster.topology())
                optimizers = Optimizers(model, lambda params: torch.optim.SGD(params, lr=0.01))
                rows.append({"part": "here", "devices": world, "plan": name, "kind": kind, "pool": pool,
                             "batch_per_device": batch, **compare(model, coll, optimizers, found, rank, batch, steps),
                             "link_mb_s": round(link / 1e6), "memory_mb_s": round(memory / 1e6)})  # fmt: skip
    return rows


def compare(
    model: Any, coll: ShardableCollection, optimizers: Optimizers, found: Placement, rank: int, batch: int, steps: int
) -> dict[str, Any]:
    """Predicted beside measured, the latter summed or maximised over ranks as the former is."""
    world = dist.get_world_size()
    held = sum(s.tensor.nbytes for s in coll.shards())
    for states in optimizers.fused.state_dict()["state"].values():
        held += sum(s.tensor.nbytes for v in states.values() for s in v.local_shards())
    fixed, _ = timed(model, coll, optimizers, rank, 16, steps)
    took, sent = timed(model, coll, optimizers, rank, batch, steps)
    all_of = torch.zeros(world, 4, dtype=torch.float64)
    all_of[rank] = torch.tensor([held, sent, fixed, took])
    dist.all_reduce(all_of)
    size, traffic, least, whole = all_of.unbind(1)
    predicted = sum(found.sent.values())
    return {
        "rank_bytes": {"predicted": max(found.weights), "measured": int(size.max())},
        "sent_bytes": {"predicted": round(predicted), "measured": round(float(traffic.mean())),
                       "ratio": round(float(traffic.mean()) / predicted, 3)},
        "step_ms": {"planner": round(found.step_ms, 3), "fixed": round(float(least.max()), 2),
                    "measured": round(float(whole.max()), 2)},
    }  # fmt: skip


def timed(
    model: Any, coll: ShardableCollection, optimizers: Optimizers, rank: int, batch: int, steps: int
) -> tuple[float, float]:
    """Median milliseconds, and mean bytes sent, of a step of this rank."""
    g = torch.Generator().manual_seed(rank)
    ids = [torch.stack([torch.randint(0, s.num_embeddings, (batch,), generator=g) for s in coll.schema], 1)
           for _ in range(4)]  # fmt: skip
    times = []
    with counting() as sent:
        for number in range(steps + 2):
            if number == 2:
                sent.clear()
            dist.barrier()
            start = time.perf_counter()
            model(ids[number % 4]).sum().backward()
            optimizers.step()
            optimizers.zero_grad()
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:]), sum(sent.values()) / steps


def fit(rows: list[dict[str, Any]]) -> None:
    """Fit the one factor on the first case, and predict the others with it."""
    first = rows[0]["step_ms"]
    factor = max(0.0, (first["measured"] - first["fixed"]) / first["planner"])
    for number, row in enumerate(rows):
        step = row["step_ms"]
        step["predicted"] = round(step["fixed"] + factor * step["planner"], 2)
        step["ratio"] = round(step["measured"] / step["predicted"], 2)
        step["fitted"] = number == 0


def work(rank: int, world: int, port: int, batch: int, steps: int, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = measured(rank, world, batch, steps)
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def here(sizes: list[int], batch: int, steps: int) -> list[dict[str, Any]]:
    rows = []
    for world in sizes:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(work, args=(world, port, batch, steps, results), nprocs=world, join=True)
        rows += results.get()
    fit(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--quick", action="store_true", help="8 and 64 devices, and 2 processes here")
    parser.add_argument("--ratio", type=float, default=10.0)
    parser.add_argument("--batch-size", type=int, default=8192)
    options = parser.parse_args()
    for text in ASSUMPTIONS:
        print(f"assumed: {text}", file=sys.stderr)
    sizes = [8, 64] if options.quick else [8, 16, 32, 64, 128, 256, 512]
    rows: list[dict[str, Any]] = [{"part": "assumptions", "assumptions": ASSUMPTIONS}]
    rows += here([2] if options.quick else [2, 4], 4096, 5)
    rows += paper(sizes, options.ratio, options.batch_size)
    report("scale", rows)


if __name__ == "__main__":
    main()
