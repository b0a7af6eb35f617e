"""Ids without bound in bounded tables: rows that change hands start afresh, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import recsys_embed as rse
from recsys_embed.errors import ConfigError
from recsys_embed.sharding import ManagedEBC, shard
from tests.distributed.cases import managed_rows
from tests.distributed.workers import Workers


@pytest.mark.parametrize("policy", ["lfu", "lru", "distance_lfu"])
@pytest.mark.parametrize("form", ["in_backward", "watched"])
def test_one_process(policy: str, form: str) -> None:
    found = managed_rows(None, 0, 1, "adagrad", policy, form=form)
    assert found["kept"] > 100
    assert found["renewed"] > 20
    assert found["trained"] > 0
    assert found["stable"]
    assert found["frozen"]


@pytest.mark.parametrize("policy", ["lfu", "lru"])
@pytest.mark.parametrize(("rule", "world"), [("rowwise_adagrad", 2), ("adagrad", 4)])
def test_sharded(workers: Workers, policy: str, rule: str, world: int) -> None:
    found = workers.run("managed_rows", world, rule=rule, policy=policy)
    for rank in found:
        assert rank["kept"] > 50
        assert rank["renewed"] > 5
        assert rank["trained"] > 0
        assert rank["stable"]
        assert rank["frozen"]
        assert torch.equal(rank["out"], found[0]["out"]), "an id is the same vector whoever asks"


def test_faults_are_named() -> None:
    bad = rse.Schema([rse.FeatureSpec("a", 1, 8), rse.FeatureSpec("b", 9, 6, pooling="max")])
    with pytest.raises(
        ConfigError, match=r"(?s)5 faults.*multiple of 4; got 6.*got 'max'.*2 rows.*`policy`.*`interval`"
    ):
        ManagedEBC(bad, policy="fifo", interval=0)  # type: ignore[arg-type]
    good = rse.Schema([rse.FeatureSpec("a", 9, 8)])
    with pytest.raises(ConfigError, match="built without `optimizer`"):
        ManagedEBC(good).optimize()
    with pytest.raises(ConfigError, match="no process group"):
        shard(ManagedEBC(good))


def test_no_optimizer_no_sharding(workers: Workers) -> None:
    with pytest.raises(AssertionError, match="needs an `optimizer` that runs inside backward on cpu"):
        workers.run("managed_rows", 2, rule="adam", policy="lfu")


def test_checkpoints_hold_who_owns_which_row(workers: Workers, tmp_path: Path) -> None:
    saved = workers.run("managed_checkpoint", 2, folder=str(tmp_path), reads=False)
    read = workers.run("managed_checkpoint", 2, folder=str(tmp_path), reads=True)
    assert torch.equal(saved[0], read[0])
    assert len(saved[0].unique()) > 10
