"""Replicas of fused tables under DistributedDataParallel and FSDP train as one process with torch's optimizer does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.workers import Workers
from tests.tiers import slow_but

CASES = "tests.distributed.replica_cases"
HABITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "twice": {},
    "accumulate": {},
    "clip": {},
    "scaler": {},
    "empty": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "static bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
}


def check(found: list[dict[str, float]], bound: float = 2e-6) -> None:
    for rank in found:
        assert rank["moved"] > 1e-2, "the steps moved nothing, so they show nothing"
        assert rank["apart"] == 0.0
        assert rank["one"] <= bound


@pytest.mark.crossed
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("habit", HABITS)
def test_habits(workers: Workers, habit: str, rule: str, when: str) -> None:
    check(workers.run("replicas", module=CASES, habit=habit, rule=rule, when=when, **HABITS[habit]), 1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_replicas_begin_as_the_first_one(workers: Workers, when: str) -> None:
    check(workers.run("replicas", module=CASES, habit="other start", when=when))


@pytest.mark.crossed
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("method", ["full", "hash", "compositional", "memcom", "mixeddim"])
def test_methods(workers: Workers, method: str, rule: str) -> None:
    plan = {"method": method} if method == "full" else {"method": method, "budget": "1KiB"}
    check(workers.run("replicas", module=CASES, plan=plan, rule=rule), 1e-5)


@pytest.mark.parametrize("compiled", slow_but(["inside", "outside"]))
def test_compiled(workers: Workers, compiled: str) -> None:
    check(workers.run("two_replicas", module=CASES, compiled=compiled))


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_fsdp(workers: Workers, kind: str, rule: str) -> None:
    check(workers.run("sharded", module=CASES, kind=kind, rule=rule), 1e-5)


@pytest.mark.parametrize("kind", ["ddp", "drop-in", "fsdp2"])
@pytest.mark.parametrize("quantization", ["lpt", "alpt", "lsq"])
def test_replicas_of_few_bits_are_equal(workers: Workers, quantization: str, kind: str) -> None:
    for rank in workers.run("few_bits", module=CASES, quantization=quantization, kind=kind):
        assert rank["moved"] > 100
        assert rank["apart"] == 0.0


WAYS_OUT = {
    "ddp": "fused_optimizer",
    "ddp compiled": "fused_optimizer",
    "ddp alone late": "process_group",
    "fsdp1": "process_group",
    "fsdp2": "process_group",
    "fsdp2 step": "process_group",
    "fsdp1 ignored": "process_group",
    "fsdp2 ignored": "process_group",
    "fsdp1 ignored step": "process_group",
    "fsdp2 ignored step": "process_group",
}


@pytest.mark.parametrize("kind", WAYS_OUT)
def test_tables_that_nobody_would_exchange_are_refused(workers: Workers, kind: str) -> None:
    for message in workers.run("refused", module=CASES, kind=kind):
        assert WAYS_OUT[kind] in message


def test_copies_of_a_model_are_no_replicas(workers: Workers) -> None:
    first, second = workers.run("copies", module=CASES)
    assert first["same"] == second["same"] == 0.0
    assert first["apart"] == second["apart"] == 0.0
    assert first["left"] > 0.0
    assert second["left"] == 0.0
