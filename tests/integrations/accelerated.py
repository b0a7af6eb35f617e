"""What processes of Accelerate run; by itself, so that processes that are started import it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tests.integrations.models import Net, loader, loss_of, net, optimizer, values


def train(
    rule: str, fused: bool, size: int = 16, epochs: int = 1, accumulate: int = 1, clip: str = "", **options: Any
) -> tuple[Net, Accelerator, Any]:
    """A model, trained as Accelerate's documentation has it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
    model = net(rule, fused)
    prepared, step, batches = accelerator.prepare(model, optimizer(model, rule, fused), loader(size))
    run(accelerator, prepared, step, batches, epochs, clip)
    return model, accelerator, step


def run(accelerator: Accelerator, model: Any, step: Any, batches: Any, epochs: int = 1, clip: str = "") -> None:
    for _ in range(epochs):
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x, y))
                if clip and accelerator.sync_gradients:
                    if clip == "norm":
                        accelerator.clip_grad_norm_(model.parameters(), 0.05)
                    else:
                        accelerator.clip_grad_value_(model.parameters(), 0.01)
                step.step()
                step.zero_grad()


def process(rank: int, port: int, folder: str, rule: str, accumulate: int, clip: str) -> None:
    """One of two."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    model, accelerator, _ = train(rule, True, accumulate=accumulate, clip=clip)
    found: dict[str, Tensor] = values(model)
    torch.save(found, Path(folder) / f"{rank}.pt")
    assert accelerator.num_processes == 2
    accelerator.end_training()
