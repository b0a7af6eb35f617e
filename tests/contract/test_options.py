"""Options of the methods over features of unlike size: the torch backend and a fused step equal the reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_embed import SGD, EmbeddingCollection, FeatureSpec, Plan, Schema

SCHEMA = Schema(
    [
        FeatureSpec("a", 40, 8),
        FeatureSpec("b", 77, 8, pooling="mean"),
        FeatureSpec("c", 300, 8),
        FeatureSpec("d", 51, 8, pooling="max"),
    ]
)
COUNTS = {s.name: torch.randperm(s.num_embeddings, generator=torch.Generator().manual_seed(1)) for s in SCHEMA}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("lowdim", {"dim": 3}),
    ("hash", {"num_buckets": 9, "sign": True}),
    ("hash", {"num_buckets": 9, "hash": "mod"}),
    ("multihash", {"num_buckets": 9, "preset": "thinc"}),
    ("unified", {"num_buckets": 11, "num_hashes": 3, "dim": 4}),
]
OPTIONS += [
    ("multihash", {"num_buckets": 9, "combine": combine, "separate": separate, "sign": sign})
    for combine, separate, sign in product(("sum", "mean", "concat"), (False, True), (False, True))
]
OPTIONS += [
    ("multihash", {"num_buckets": 9, "num_weights": 13, "weights": form, "append_weights": append, "combine": combine})
    for form, append, combine in product(
        ("original", "indep", "flat"), (None, "inside", "outside"), ("sum", "mean", "concat")
    )
]
OPTIONS += [
    ("multihash", {"num_buckets": 9, "num_frequent": 5, "combine": combine, "separate": separate})
    for combine, separate in (("sum", False), ("sum", True), ("concat", True))
]
OPTIONS += [
    (
        "compositional",
        {"num_collisions": 6, "partition": partition, "num_partitions": k, "combine": combine, "affine": a},
    )
    for (partition, k), combine, a in product(
        (("quotient_remainder", 2), ("generalized", 3), ("chinese_remainder", 2)),
        ("mul", "sum", "concat", "feature"),
        (False, True),
    )
]
OPTIONS += [
    ("unified", {"num_buckets": 11, "num_hashes": 2, "combine": combine, "num_tables": tables})
    for combine, tables in product(("sum", "concat"), (1, 3))
]
OPTIONS += [
    ("memcom", {"num_buckets": 9, "hash": h, "bias": b}) for h, b in product(("mod", "splitmix64"), (False, True))
]
OPTIONS += [
    ("robe", {"num_elements": 23, "block_size": block, "wrap": wrap, "sign": sign})
    for block, wrap, sign in product((1, 3, 8), (True, False), (False, True))
]
OPTIONS += [
    ("mixeddim", {"dims": dims, "blocks": (5, 20)[: len(dims) - 1] or None, "order": order})
    for dims, order in product(((8,), (3,), (8, 2), (8, 3, 1), (5, 2, 1)), ("ids", "counts"))
]
OPTIONS += [
    ("adaptive", {"num_frequent": hot, "num_buckets": 7, "order": o})
    for hot, o in product((0, 9, 33), ("ids", "counts"))
]
OPTIONS += [("freqcut", {"num_frequent": kept, "order": o}) for kept, o in product((0, 9, 39), ("ids", "counts"))]


def inputs() -> tuple[tuple[Tensor, ...], ...]:
    """One id per sample and feature, and bags of 0 to 3 ids."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([s.num_embeddings for s in SCHEMA])
    single = (torch.rand(17, 4, generator=generator) * sizes).long()
    lengths = torch.randint(0, 4, (4, 17), generator=generator)
    owner = torch.repeat_interleave(torch.arange(4), lengths.sum(1))
    values = (torch.rand(len(owner), generator=generator) * sizes[owner]).long()
    return (single,), (values, torch.nn.functional.pad(lengths.reshape(-1).cumsum(0), (1, 0)))


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=lambda x: x if isinstance(x, str) else str(x)[1:-1])
def test_backends_agree(method: str, options: dict[str, Any]) -> None:
    plan = Plan.uniform(SCHEMA, method, **options)
    for arguments in inputs():
        after: dict[str, dict[str, Tensor]] = {}
        outputs = {}
        for kind, given in (("torch", {}), ("reference", {"backend": "reference"}), ("fused", {"optimizer": SGD(0.1)})):
            coll = EmbeddingCollection(SCHEMA, plan, dtype=torch.float64, **given)
            coll.assign_(COUNTS)
            outputs[kind] = coll(*arguments)
            outputs[kind].square().sum().backward()
            with torch.no_grad():
                after[kind] = {n: p if p.grad is None else p - 0.1 * p.grad for n, p in coll.named_parameters()}
        for kind in ("torch", "fused"):
            torch.testing.assert_close(outputs[kind], outputs["reference"])
            torch.testing.assert_close(after[kind], after["reference"])
