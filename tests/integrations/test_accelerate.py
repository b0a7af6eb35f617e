"""Accelerate trains fused tables as it trains torch's."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.integrations.accelerated import process, run, train
from tests.integrations.models import RULES, apart, check_equal, loader, net, optimizer, values

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "clip by norm": {"clip": "norm"},
    "clip by value": {"clip": "value"},
    "accumulate and clip": {"accumulate": 3, "clip": "norm"},
    "bf16": {"mixed_precision": "bf16"},
}


@pytest.fixture(autouse=True)
def _state_of_its_own() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, rule: str) -> None:
    ours, theirs = (train(rule, fused, **OPTIONS[name])[0] for fused in (True, False))
    check_equal(ours, theirs, 1e-2 if name == "bf16" else 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_whole_run(rule: str, tmp_path: Path) -> None:
    whole = train(rule, True, epochs=2)[0]
    _, accelerator, _ = train(rule, True)
    accelerator.save_state(str(tmp_path))
    AcceleratorState._reset_state(True)
    accelerator, model = Accelerator(cpu=True), net(rule, True)
    prepared, step, batches = accelerator.prepare(model, optimizer(model, rule, True), loader())
    accelerator.load_state(str(tmp_path))
    run(accelerator, prepared, step, batches)
    check_equal(model, whole, 0.0)
    check_equal(model, train(rule, False, epochs=2)[0])


@pytest.mark.parametrize(("accumulate", "clip"), [(1, ""), (2, "norm")])
@pytest.mark.parametrize("rule", RULES)
def test_two_processes(rule: str, accumulate: int, clip: str, tmp_path: Path) -> None:
    """Each with half of the rows, as one process with all of them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(tmp_path), rule, accumulate, clip), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert apart(first, second) == 0.0
    # Accelerate deals batches to processes in turn.
    one = train(rule, False, size=32, accumulate=accumulate, clip=clip)[0]
    assert apart(first, values(one)) <= 1e-5
    assert apart(first, values(net(rule, True))) > 1e-2
