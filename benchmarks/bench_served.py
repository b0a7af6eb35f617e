"""Served rows: quantised tables looked up as `load` serves them, beside FBGEMM's inference tables of the same rows.

Run: python benchmarks/bench_served.py [--out FILE] [--quick] [--threads 1,2] [--widths 8,16] [--folder FOLDER]

26 tables of Criteo's sizes, cut to about 700 MB at int8; Zipf ids. ``plain``: an id per feature and sample. ``pooled``:
sums of bags of 0 to 40 ids, 20 on average. Both write float32 ``[batch, 26 * width]``; FBGEMM gets its ids feature by
feature, as int32, beforehand. Contenders: ``native``, the file as it is loaded by default; ``read``, with mmap=False;
``compiled``, the former in a compiled program; ``tbe``, as FBGEMM allocates its tables; ``tbe huge``, on huge pages.
The last two and ``compiled`` are left out of the largest batch. Results are compared first. Times are the least of a
turn's calls, ratios those of one turn.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measure import report, summary
from torch import Tensor, nn
from workload import ALL_ROWS, FIELDS, Case, zipf

import recsys_embed as rse
from recsys_embed import EmbeddingCollection
from recsys_embed.exports.pack import Packed
from recsys_embed.kernels.storage import advise_huge_pages

PRECISIONS, WIDTHS, BATCHES = ("int8", "int4"), (8, 16, 32, 64, 128), (16, 512, 8192, 65536)
LONGEST = 40
BYTES = 700 << 20
Lookup = Callable[[int], Any]


def _random_rows(table: Packed, search: str) -> Iterator[Tensor]:
    """Stored rows of random codes between -1 and 1."""
    layout = table.part.layout
    step = torch.tensor([2.0 / ((1 << (layout.bits or 8)) - 1), -1.0]).half().view(torch.uint8)
    codes = torch.randint(0, 256, (1 << 16, layout.items), dtype=torch.uint8)
    codes[:, :4] = step
    for start in range(0, table.part.count, len(codes)):
        yield codes[: table.part.count - start]


def exported(width: int, precision: str, rows: int, folder: Path) -> tuple[Path, rse.Schema]:
    """The file of one case, kept in ``folder``."""
    schema = Case("full", width, rows).schema()
    path = folder / f"{precision}_{width}_{rows}.safetensors"
    if not path.exists():
        # Encoding this many rows takes minutes, so that they are drawn.
        with patch.object(Packed, "stored", _random_rows), patch.object(EmbeddingCollection, "reset_parameters"):
            rse.export(rse.EmbeddingCollection(schema), path, precision, prune=False, search="minmax")
    return path, schema


def fbgemm_tables(schema: rse.Schema, width: int, precision: str, stored: Tensor, huge: bool) -> nn.Module:
    """FBGEMM's tables of the same stored rows."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    tables = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(s.name, s.num_embeddings, width, SparseType(precision), EmbeddingLocation.HOST) for s in schema],
        device="cpu",
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM,
    )
    tables.initialize_weights()
    if huge:
        tables.weights_host = torch.empty_like(tables.weights_host)
        advise_huge_pages(tables.weights_host)
        tables.weight_initialized = True
    start = 0
    for spec, (weights, _) in zip(schema, tables.split_embedding_weights(split_scale_shifts=False), strict=True):
        weights.copy_(stored[start : start + spec.num_embeddings].view(torch.uint8))
        start += spec.num_embeddings
    return tables


def plain_ids(sizes: Sequence[int], batch: int, count: int) -> list[Tensor]:
    rng = np.random.default_rng(batch)
    return [torch.from_numpy(np.stack([zipf(batch, n, rng) for n in sizes], 1)) for _ in range(count)]


def bags_of(sizes: Sequence[int], batch: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Ids and offsets of bags, feature by feature."""
    rng, found = np.random.default_rng(batch), []
    for _ in range(count):
        lengths = rng.integers(0, LONGEST + 1, (FIELDS, batch))
        ids = np.concatenate([zipf(int(n.sum()), size, rng) for n, size in zip(lengths, sizes, strict=True)])
        offsets = np.concatenate([[0], lengths.reshape(-1).cumsum()])
        found.append((torch.from_numpy(ids), torch.from_numpy(offsets)))
    return found


def in_turns(lookups: dict[str, Lookup], rounds: int, count: int, burst: int) -> dict[str, list[float]]:
    """Least microseconds of ``burst`` calls, by turn."""
    times: dict[str, list[float]] = {name: [] for name in lookups}
    names = list(lookups)
    gc.disable()
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                look_up, least = lookups[name], float("inf")
                for call in range(burst):
                    start = time.perf_counter()
                    look_up((turn * burst + call) % count)
                    least = min(least, time.perf_counter() - start)
                if turn:
                    times[name].append(least * 1e6)
    gc.enable()
    return times


def lookups_of(
    modules: dict[str, nn.Module], sizes: Sequence[int], batch: int, pooled: bool
) -> tuple[dict[str, Lookup], int, int]:
    """A lookup per module, compared with each other; numbers of their batches and of the calls in a burst."""
    number = batch * FIELDS * (LONGEST // 2 if pooled else 1)
    count = max(1, min(8, 4_000_000 // number))
    lookups: dict[str, Lookup] = {}
    if pooled:
        bags = bags_of(sizes, batch, count)
        theirs = [(ids.int(), offsets.int()) for ids, offsets in bags]
    else:
        ids = plain_ids(sizes, batch, count)
        theirs = [(i.T.contiguous().view(-1).int(), torch.arange(i.numel() + 1, dtype=torch.int32)) for i in ids]
    for name, module in modules.items():
        if name.startswith("tbe"):
            lookups[name] = lambda turn, m=module: m(*theirs[turn])
        elif pooled:
            lookups[name] = lambda turn, m=module: m(*bags[turn])
        else:
            lookups[name] = lambda turn, m=module: m(ids[turn])
    with torch.no_grad():
        wanted = lookups["tbe"](0).view(batch, -1)[-512:].clone()
        for name, look_up in lookups.items():
            found = look_up(0).view(batch, -1)[-512:]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=name)
    return lookups, count, max(1, min(64, 200_000 // number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds, small batches")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--batches", default="")
    parser.add_argument("--forms", default="plain,pooled")
    parser.add_argument("--contenders", default="native,read,compiled,tbe,tbe huge")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--folder", help="keep the exported files there")
    given = parser.parse_args()
    batches = tuple(map(int, given.batches.split(","))) if given.batches else BATCHES[:2] if given.quick else BATCHES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        for precision in given.precisions.split(","):
            for width in map(int, given.widths.split(",")):
                number = min(ALL_ROWS, BYTES // (width + 4)) // (64 if given.quick else 1)
                path, schema = exported(width, precision, number, folder)
                modules: dict[str, nn.Module] = {"native": rse.load(path, verify=False)}
                modules["read"] = rse.load(path, verify=False, mmap=False)
                modules["compiled"] = torch.compile(modules["native"], fullgraph=True, dynamic=True)
                (stored,) = modules["read"].served.direct(list(modules["read"].storages))
                for name in ("tbe", "tbe huge"):
                    modules[name] = fbgemm_tables(schema, width, precision, stored, name != "tbe")
                modules = {n: modules[n] for n in given.contenders.split(",")}
                sizes = [s.num_embeddings for s in schema]
                for form in given.forms.split(","):
                    for batch in batches:
                        some = {n: m for n, m in modules.items() if batch < BATCHES[-1] or n in ("native", "tbe")}
                        lookups, count, burst = lookups_of(some, sizes, batch, form == "pooled")
                        for threads in map(int, given.threads.split(",")):
                            torch.set_num_threads(threads)
                            rounds = given.rounds or (5 if given.quick else 21)
                            times = in_turns(lookups, rounds if batch < BATCHES[-1] else 3, count, burst)
                            about = {"case": f"{form} {precision}", "dim": width, "batch": batch, "rows": sum(sizes)}
                            about |= {"phase": "served", "unit": "us", "threads": threads}
                            about["load"] = round(os.getloadavg()[0], 2)
                            found = [{**about, "contender": n} | summary(v, times["native"]) for n, v in times.items()]
                            rows += found
                            line = ", ".join(f"{r['contender']} {r['time']['median']} ({r['ratio']})" for r in found)
                            print(f"{form} {precision} {width} {batch} x{threads}: {line}", file=sys.stderr)
                        del lookups
                del modules, stored
                gc.collect()
    report("served", rows)


if __name__ == "__main__":
    main()
