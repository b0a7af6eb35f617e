"""Checkpoints: written by some processes, read by others, by one machine, and after a crash in the middle of a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import recsys_embed as rse
from recsys_embed.errors import CheckpointError
from recsys_embed.optim import unfused_parameters
from recsys_embed.sharding import checkpoint, from_single, to_single
from tests.distributed.cases import RULES, Net, plan_for, schema_for, single, step
from tests.distributed.workers import Workers

CASES = [
    ("full", "rowwise_adagrad", "row_wise", "tables"),
    ("compositional", "adagrad", "mixed", "tables"),
    ("memcom", "rowwise_adagrad", "mixed", "ids"),
    ("lowdim", "adam", "data_parallel", "ids"),
    ("unified", "sgd", "row_wise", "ids"),
]


def unsharded(method: str, rule: str, seed: int = 8, dim: int = 16) -> Net:
    schema = schema_for((dim,))
    return Net(rse.EmbeddingCollection(schema, plan_for(schema, method), RULES[rule], seed=seed, backend="torch"))


@pytest.mark.parametrize(("method", "rule", "kind", "pool"), CASES)
def test_any_number_of_processes_goes_on(
    workers: Workers, tmp_path: Path, method: str, rule: str, kind: str, pool: str
) -> None:
    """Saved by 2, read by 4 under another plan and by 2: the same bits, and the same next step."""
    form: dict[str, Any] = {"method": method, "rule": rule, "pool": pool, "folder": str(tmp_path)}
    then, later = workers.run("save_net", 2, kind=kind, **form)[0]
    assert float((then - later).abs().max()) > 1e-4
    other = "data_parallel" if kind == "data_parallel" else "table_wise"
    for world, new in ((4, other), (2, kind)):
        for found, after, extra in workers.run("load_net", world, kind=new, **form):
            assert torch.equal(found, then)
            torch.testing.assert_close(after, later, atol=2e-6, rtol=1e-5)
            assert extra == {"note": 2}


@pytest.mark.parametrize(("method", "rule", "kind", "pool"), CASES)
def test_one_machine_goes_on(workers: Workers, tmp_path: Path, method: str, rule: str, kind: str, pool: str) -> None:
    """A distributed checkpoint reads into an unsharded model and back, optimizer state included."""
    form: dict[str, Any] = {"method": method, "rule": rule, "pool": pool}
    then, _ = workers.run("save_net", 2, kind=kind, folder=str(tmp_path / "many"), **form)[0]
    model = unsharded(method, rule)
    assert to_single(tmp_path / "many", model) == {"note": 2}
    assert torch.equal(model(single(99)), then)
    from_single(tmp_path / "one", model)
    dense = torch.optim.SGD(unfused_parameters(model), lr=0.0)
    step(model, dense, 50, 0, 1)
    after = model(single(99))
    back = workers.run("load_net", 2, kind=kind, folder=str(tmp_path / "one"), **form)[0]
    assert torch.equal(back[0], then)
    # The state of the tables' rule came along; the dense optimizer starts anew and is not compared.
    assert float((back[1] - then).abs().max()) > 1e-4
    again = unsharded(method, rule)
    to_single(tmp_path / "one", again)
    step(again, torch.optim.SGD(unfused_parameters(again), lr=0.0), 50, 0, 1)
    assert torch.equal(again(single(99)), after)


def test_the_state_of_padded_rows(workers: Workers, tmp_path: Path) -> None:
    """Rows of 6 numbers are stored as 8, over which fbgemm takes its means: fused, replicated and unsharded agree."""
    form: dict[str, Any] = {"method": "full", "rule": "rowwise_adagrad", "pool": "ids", "dim": 6}
    then, later = workers.run("save_net", 2, kind="row_wise", folder=str(tmp_path), **form)[0]
    copied = workers.run("load_net", 2, kind="data_parallel", folder=str(tmp_path), **form)[0]
    assert torch.equal(copied[0], then)
    torch.testing.assert_close(copied[1], later, atol=2e-6, rtol=1e-5)
    model = unsharded("full", "rowwise_adagrad", dim=6)
    to_single(tmp_path, model)
    fused = workers.run("load_net", 2, kind="table_wise", folder=str(tmp_path), **form)[0]
    torch.testing.assert_close(fused[1], later, atol=2e-6, rtol=1e-5)
    rows = model.embedding.optimizer_state_dict()["state"]["width6_sum"]
    from_single(tmp_path / "one", model)
    again = unsharded("full", "rowwise_adagrad", dim=6)
    to_single(tmp_path / "one", again)
    assert torch.equal(again.embedding.optimizer_state_dict()["state"]["width6_sum"], rows)


def test_exports_of_what_was_sharded(workers: Workers, tmp_path: Path) -> None:
    form: dict[str, Any] = {"method": "compositional", "rule": "adagrad", "pool": "tables"}
    then, _ = workers.run("save_net", 2, kind="mixed", folder=str(tmp_path / "many"), **form)[0]
    model = unsharded("compositional", "adagrad")
    to_single(tmp_path / "many", model, states=False)
    rse.export(model.embedding, tmp_path / "out.rse")
    served = rse.load(tmp_path / "out.rse")
    ids = single(99)
    torch.testing.assert_close(model.top(served(ids).tanh().sum(1)).squeeze(-1), then)


def test_a_crash_while_saving_leaves_the_last_checkpoint(workers: Workers, tmp_path: Path) -> None:
    form: dict[str, Any] = {"method": "full", "rule": "adagrad", "pool": "ids", "kind": "row_wise"}
    then, _ = workers.run("save_net", 2, folder=str(tmp_path), **form)[0]
    before = (tmp_path / checkpoint.LATEST).read_text()
    with pytest.raises(AssertionError, match="the disk is full"):
        workers.run("save_and_die", 2, folder=str(tmp_path), **form)
    assert (tmp_path / checkpoint.LATEST).read_text() == before
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2, "the torn save lies beside the whole one"
    assert torch.equal(workers.run("load_net", 2, folder=str(tmp_path), **form)[0][0], then)
    workers.run("save_net", 2, folder=str(tmp_path), **form)
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1, "the next save clears both away"


def test_other_models_are_refused(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete distributed checkpoint"):
        to_single(tmp_path, unsharded("full", "adagrad"))
    workers.run("save_net", 2, folder=str(tmp_path), method="full", rule="adagrad", pool="ids", kind="row_wise")
    with pytest.raises(CheckpointError, match="differs from the model in plan"):
        to_single(tmp_path, unsharded("hash", "adagrad"))
    with pytest.raises(CheckpointError, match="differs from the model in rule"):
        to_single(tmp_path, unsharded("full", "sgd"))
    with pytest.raises(CheckpointError, match="holds collections"):
        to_single(tmp_path, torch.nn.Linear(2, 2))
    at, _ = checkpoint.find(tmp_path)
    for data in at.glob("*.distcp"):
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot be read \(rank 0: RuntimeError: [^/]*zip"):
        to_single(tmp_path, unsharded("full", "adagrad"))
    for damage in (b"no pickle", b""):
        (at / ".metadata").write_bytes(damage)
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.tensors_in(at)
        with pytest.raises(CheckpointError, match="cannot be read"):
            to_single(tmp_path, unsharded("full", "adagrad"))
    (at / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read \(FileNotFoundError: .*\.metadata"):
        checkpoint.tensors_in(at)
