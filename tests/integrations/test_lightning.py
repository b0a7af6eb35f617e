"""Lightning trains fused tables as it trains torch's: one optimizer, whatever the Trainer is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

from recsys_embed.errors import ConfigError
from tests.integrations.lit import Lit, trainer
from tests.integrations.models import RULES, apart, check_equal, loader, values

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "accumulate": lambda: {"accumulate_grad_batches": 2},
    "clip by norm": lambda: {"gradient_clip_val": 0.05},
    "clip by value": lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate and clip": lambda: {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": lambda: {
        "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    },
    "swa": lambda: {
        "max_epochs": 4,
        "callbacks": [StochasticWeightAveraging(swa_lrs=0.03, swa_epoch_start=2, annealing_epochs=1)],
    },
    "finetuning": lambda: {"max_epochs": 3, "callbacks": [Finetuning()]},
    "gradient check": lambda: {"detect_anomaly": True},
}


class Finetuning(BaseFinetuning):
    """Tables are frozen for an epoch, and the drop-in for two."""

    def freeze_before_training(self, module: Lit) -> None:
        self.freeze([module.net.tables, module.net.item])

    def finetune_function(self, module: Lit, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        lr = optimizer.param_groups[0]["lr"]
        for when, part in ((1, module.net.tables), (2, module.net.item)):
            if epoch == when:
                self.unfreeze_and_add_param_group(part, optimizer, lr=lr, initial_denom_lr=1)


def fitted(rule: str, fused: bool, options: dict[str, Any], **more: Any) -> Lit:
    module = Lit(rule, fused, **more)
    trainer(**options).fit(module, loader())
    return module


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_trainer(name: str, rule: str) -> None:
    ours, theirs = (fitted(rule, fused, OPTIONS[name]()) for fused in (True, False))
    # Products in bfloat16 round a last bit of difference up to their own precision.
    check_equal(ours.net, theirs.net, 1e-2 if "16" in name else 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_schedules(rule: str) -> None:
    ours, theirs = (fitted(rule, fused, {"max_epochs": 3}, scheduled=True) for fused in (True, False))
    check_equal(ours.net, theirs.net)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_whole_run(rule: str, tmp_path: Path) -> None:
    whole = fitted(rule, True, {"max_epochs": 3}, scheduled=True)
    first = Lit(rule, True, scheduled=True)
    half = trainer(max_epochs=1)
    half.fit(first, loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Lit(rule, True, scheduled=True)
    trainer(max_epochs=3).fit(resumed, loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    check_equal(resumed.net, whole.net, 0.0)
    check_equal(resumed.net, fitted(rule, False, {"max_epochs": 3}, scheduled=True).net)
    loaded = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert apart({n: loaded["state_dict"][f"net.{n}"] for n in values(first.net)}, values(first.net)) == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_moving_averages(rule: str) -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks", reason="of an older Lightning")
    found = []
    for fused in (True, False):
        callback = averaging.EMAWeightAveraging(decay=0.9)
        module = Lit(rule, fused)
        trainer(callbacks=[callback]).fit(module, loader(), loader())
        found.append(module)
    check_equal(found[0].net, found[1].net)


@pytest.mark.parametrize(("rule", "accumulate"), [("adagrad", 2), ("adam", 1)])
def test_two_processes(rule: str, accumulate: int) -> None:
    found = []
    for fused in (True, False):
        module = Lit(rule, fused)
        options: dict[str, Any] = {"devices": 2, "strategy": "ddp_spawn", "accumulate_grad_batches": accumulate}
        trainer(max_epochs=1, **options).fit(module, loader())
        found.append(module.net)
    check_equal(*found)


@pytest.mark.parametrize("whole", [False, True])
def test_accumulation_is_refused_where_tables_step_in_backward(whole: bool) -> None:
    class Inside(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters() if whole else self.net.head.parameters(), 0.1)

    with pytest.raises(ConfigError, match="fused_optimizer"):
        trainer(accumulate_grad_batches=2).fit(Inside("adagrad", True), loader())
