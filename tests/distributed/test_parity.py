"""Sharded collections compute what unsharded ones do: same bits at the start, same updates, nothing left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed.sharding import ShardableCollection
from tests.distributed.cases import SIZES, found_plan, plan_for, schema_for
from tests.distributed.workers import Workers

METHODS = [m.name for m in rse.list_methods()]
RULES = ("sgd", "adagrad", "rowwise_adagrad")


def check(found: list[dict[str, Any]], bits: bool = True, method: str = "") -> None:
    # A network's products of matrices have other last bits for other batches, which its steps multiply.
    bits, near = (False, 1e-3) if method == "dhe" else (bits, 2e-6)
    for rank in found:
        assert rank["shape"]
        assert rank["equal"] if bits else rank["start"] <= 1e-6
        assert rank["moved"] > 1e-2, "the steps did not change the output, so they show nothing"
        assert rank["after"] <= near * max(1.0, rank["moved"])
        assert rank["still"] == []


@pytest.mark.crossed
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks(workers: Workers, method: str, kind: str) -> None:
    rule = RULES[(METHODS.index(method) + len(kind)) % 3]
    rule = "adagrad" if kind == "column_wise" and rule == "rowwise_adagrad" else rule
    check(workers.run("parity", 2, method=method, kind=kind, rule=rule), method=method)


@pytest.mark.crossed
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_bags_on_two_ranks(workers: Workers, method: str, kind: str) -> None:
    """Bags pooled after a row per id have the bits of the unsharded collection; pooled in shards, they cannot."""
    options: dict[str, Any] = {"form": "jagged", "pooling": ("sum", "mean", "max")}
    check(workers.run("parity", 2, method=method, kind=kind, pool="ids", **options), method=method)
    if kind == "mixed":
        check(workers.run("parity", 2, method=method, kind=kind, **options), bits=False, method=method)


@pytest.mark.crossed
@pytest.mark.parametrize("kind", ["row_wise", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_four_ranks(workers: Workers, method: str, kind: str) -> None:
    check(workers.run("parity", 4, method=method, kind=kind, rule="rowwise_adagrad"), method=method)


@pytest.mark.parametrize("kind", ["table_wise", "column_wise"])
@pytest.mark.parametrize("method", ["full", "compositional", "memcom"])
def test_four_ranks_in_other_ways(workers: Workers, method: str, kind: str) -> None:
    check(workers.run("parity", 4, method=method, kind=kind, rule="adagrad", form="jagged", pool="ids"))


@pytest.mark.crossed
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("method", ["lowdim", "memcom", "pep"])
def test_replicated_tables_follow_the_fused_rule(workers: Workers, method: str, rule: str) -> None:
    check(workers.run("parity", 2, method=method, kind="data_parallel", rule=rule))


@pytest.mark.parametrize("kind", [None, "table_wise"])
@pytest.mark.parametrize("dims", [(6, 6, 6, 6), (8, 16, 3, 2)])
def test_any_width(workers: Workers, dims: tuple[int, ...], kind: str | None) -> None:
    """Padded rows train as they would without padding, row-wise state included."""
    for pool in ("tables", "ids"):
        check(workers.run("parity", 2, method="full", kind=kind, dims=dims, rule="rowwise_adagrad", pool=pool))


@pytest.mark.parametrize("unseen", ["zero", "oov", "hash"])
def test_policies_for_unseen_ids(workers: Workers, unseen: str) -> None:
    for method in ("full", "compositional"):
        check(workers.run("parity", 2, method=method, kind="mixed", form="jagged", pool="ids", spec={"unseen": unseen}))


def test_weighted_bags(workers: Workers) -> None:
    for method, kind in (("full", "row_wise"), ("compositional", "mixed"), ("memcom", "table_wise")):
        found = workers.run("parity", 2, method=method, kind=kind, form="jagged", weighted=True)
        check(found, bits=False)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *[("compositional", {"combine": c, "num_collisions": 7}) for c in ("mul", "sum", "concat", "feature", "path")],
        ("compositional", {"combine": "mul", "num_collisions": 7, "bag": "pooled"}),
        ("compositional", {"partition": "chinese_remainder", "combine": "sum", "moduli": (17, 19, 23)}),
        ("multihash", {"num_buckets": 60, "combine": "mean", "separate": True, "sign": True}),
        ("multihash", {"num_buckets": 60, "weights": "indep", "append_weights": "outside"}),
        ("unified", {"num_buckets": 500, "combine": "sum", "num_hashes": 3}),
        ("unified", {"num_buckets": 500, "num_tables": 2, "dim": 4}),
    ],
)
def test_forms_of_methods(workers: Workers, method: str, options: dict[str, Any]) -> None:
    """Among them programs that multiply, signs, learned weights, several vectors per feature, and one that computes."""
    check(workers.run("parity", 2, method=method, options=options, kind="mixed", pool="ids", form="jagged"))
    check(workers.run("parity", 2, method=method, options=options, kind="row_wise", rule="adagrad"))


@pytest.mark.parametrize("method", ["optembed", "dnis", "pep"])
def test_plans_of_searches(workers: Workers, method: str) -> None:
    """Which ids a search kept, a set in the plan, goes to every process, from the meta device too."""
    assert found_plan(schema_for(), method).sets.keys() == set(SIZES)
    check(workers.run("parity", 2, method=method, kind="mixed", found=True))
    options: dict[str, Any] = {"form": "jagged", "pool": "ids", "pooling": ("sum", "mean"), "rule": "adagrad"}
    check(workers.run("parity", 2, method=method, kind="row_wise", found=True, device="cpu", **options))


@pytest.mark.parametrize("sizes", [[5, 0], [0, 3], [2, 7]])
@pytest.mark.parametrize("pool", ["tables", "ids"])
def test_processes_with_batches_of_other_sizes(workers: Workers, pool: str, sizes: list[int]) -> None:
    """Also none at all; where TorchRec pools, gloo cannot send the gradients back, so only outputs are compared."""
    for found, wanted in workers.run("uneven", 2, pool=pool, sizes=sizes):
        torch.testing.assert_close(found, wanted)


def test_weights_that_are_there_are_kept(workers: Workers) -> None:
    """Sharding from CPU memory keeps the weights, which TorchRec by itself replaces by new ones."""
    check(workers.run("parity", 2, method="hash", kind="mixed", device="cpu"))


def test_features_that_share_a_table_go_one_way(workers: Workers) -> None:
    """One feature pools by maximum, so all that read its table are looked up by id; the table exists once."""
    options: dict[str, Any] = {"form": "jagged", "pooling": ("sum", "max")}
    check(workers.run("parity", 2, method="unified", kind="row_wise", rule="adagrad", **options), bits=False)
    coll = ShardableCollection(schema_for(pooling=("sum", "max")), plan_for(schema_for(), "unified"))
    assert sorted(s.physical.key for s in coll.shards()) == sorted(coll.physical_tables)


@pytest.mark.parametrize("pool", ["tables", "ids"])
@pytest.mark.parametrize("method", ["full", "compositional", "memcom"])
def test_tables_of_several_features(workers: Workers, method: str, pool: str) -> None:
    """One table of TorchRec, stepped once by all of its readers."""
    options: dict[str, Any] = {"form": "jagged", "pooling": ("sum", "mean"), "rule": "adagrad"}
    found = workers.run("parity", 2, method=method, kind="row_wise", pool=pool, spec={"shared": True}, **options)
    check(found, bits=pool == "ids")
