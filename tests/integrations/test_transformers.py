"""Hugging Face's Trainer trains fused tables as it trains torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="the Trainer needs it")
pytest.importorskip("transformers")

import transformers as T

from tests.integrations.models import RULES, check_equal, net, optimizer, rows

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no clipping": {"max_grad_norm": 0.0},
    "clipping": {"max_grad_norm": 0.05},
    "accumulate": {"gradient_accumulation_steps": 2},
    "schedule": {"lr_scheduler_type": "linear", "warmup_steps": 3},
    "bf16": {"bf16": True},
}


class Model(nn.Module):
    """As the Trainer calls one."""

    def __init__(self, rule: str, fused: bool) -> None:
        super().__init__()
        self.net = net(rule, fused)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.net(x)
        return {"logits": out} if labels is None else {"loss": F.mse_loss(out, labels), "logits": out}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.x, self.y = rows()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


def trained(
    folder: Path, rule: str, fused: bool, steps: int = 10, resume: Path | None = None, **options: Any
) -> nn.Module:
    model = Model(rule, fused)
    arguments = T.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=steps,
        save_steps=5,
        use_cpu=True,
        report_to=[],
        seed=0,
        data_seed=0,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"lr_scheduler_type": "constant", **options},
    )
    trainer = T.Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer(model.net, rule, fused), None))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model.net


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, rule: str, tmp_path: Path) -> None:
    ours, theirs = (trained(tmp_path / str(fused), rule, fused, **OPTIONS[name]) for fused in (True, False))
    check_equal(ours, theirs, 1e-2 if name == "bf16" else 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_whole_run(rule: str, tmp_path: Path) -> None:
    options = OPTIONS["schedule"]
    whole = trained(tmp_path / "whole", rule, True, **options)
    resumed = trained(tmp_path / "again", rule, True, resume=tmp_path / "whole" / "checkpoint-5", **options)
    check_equal(resumed, whole, 0.0)
    check_equal(resumed, trained(tmp_path / "plain", rule, False, **options))
