"""The model of these tests for Lightning; by itself, so that processes that are started import it."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from tests.integrations.models import loss_of, net, optimizer


class Lit(L.LightningModule):
    """One optimizer for the whole model, by one rule."""

    def __init__(self, rule: str, fused: bool, scheduled: bool = False) -> None:
        super().__init__()
        self.net, self.rule, self.fused, self.scheduled = net(rule, fused), rule, fused, scheduled

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, number: int) -> Tensor:
        return loss_of(self, *batch)

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("loss", loss_of(self, *batch))

    def configure_optimizers(self) -> Any:
        made = optimizer(self, self.rule, self.fused)
        return ([made], [torch.optim.lr_scheduler.StepLR(made, 1, 0.5)]) if self.scheduled else made


def trainer(**options: Any) -> L.Trainer:
    options = {"max_epochs": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0, "devices": 1, **options}
    return L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **options)
