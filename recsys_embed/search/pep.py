"""PEP end to end: train with rising soft thresholds, snapshot the kept elements at each budget, retrain them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys_embed.core.footprint import format_bytes
from recsys_embed.data.batch import Batch
from recsys_embed.data.data_source import BatchSource
from recsys_embed.errors import BudgetError, ConfigError
from recsys_embed.plan import Plan
from recsys_embed.registry import get_method
from recsys_embed.search.base import Search
from recsys_embed.search.checks import need_validation
from recsys_embed.search.extract import chunks, full_bytes, make_plan
from recsys_embed.search.layers import PepLayer, soft_threshold
from recsys_embed.search.pruning import choose_elements
from recsys_embed.search.registry import register_search
from recsys_embed.search.retrain import StartWeights
from recsys_embed.search.settings import PepSettings
from recsys_embed.search.supernet import Supernet, as_model
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.loop import Trainer

_BETWEEN = 0.25
"""Largest rise of the raw thresholds between two counts of the kept elements (counts at every step permitting)."""
_FELT = 1e-2
"""A threshold (sigmoid) of this size starts to prune weights of the usual size."""


class PepTrainer(Trainer):
    """Trains a supernet with a :class:`PepLayer` until ``check`` says that enough is pruned.

    Args:
        net: the supernet.
        data, config: see :class:`Trainer`.
        lr, decay: of thresholds that are not per row.
        check: called after every ``every`` steps; True ends the training.
        every: see ``check``.
        **options: see :class:`Trainer`.
    """

    def __init__(
        self,
        net: Supernet,
        data: BatchSource,
        config: TrainConfig,
        *,
        lr: float,
        decay: float,
        check: Callable[[], bool],
        every: int,
        **options: Any,
    ) -> None:
        self.net, self.threshold_lr, self.threshold_decay, self.check, self.every = net, lr, decay, check, every
        super().__init__(as_model(net), data, config, **options)

    def _dense_optimizer(self) -> tuple[torch.optim.Adam, list[nn.Parameter]]:
        optimizer, dense = super()._dense_optimizer()
        layer = cast("PepLayer", self.net.layer)
        if layer.few is not None:
            decay = self.threshold_decay
            optimizer.add_param_group({"params": [layer.few], "peak": self.threshold_lr, "weight_decay": decay})
        return optimizer, dense

    def _fused_collections(self) -> list[tuple[str, Any]]:
        many = cast("PepLayer", self.net.layer).many
        return [*super()._fused_collections(), *([("thresholds", many)] if many is not None else [])]

    def _step(self, batch: Batch) -> float:
        value = super()._step(batch)
        if self.state.step % self.every == 0 and self.check():
            self.state.stopped = True
        return value


@register_search
@dataclass
class PepSearch(Search):
    """One search; see :class:`Search` for what all have in common.

    >>> from tempfile import TemporaryDirectory
    >>> from recsys_embed.data import make_synthetic, open_dataset
    >>> from recsys_embed.search import PepSearch, PepSettings, run_search
    >>> from recsys_embed.train import TrainConfig
    >>> with TemporaryDirectory() as folder:
    ...     _ = make_synthetic(folder, rows=3000)
    ...     config = TrainConfig(model="dnn", model_args={"hidden": [8]}, embedding_dim=4, ratio=2, batch_size=100)
    ...     found = run_search(PepSearch, config, open_dataset(folder), PepSettings(check_every=1))
    >>> {found.plan[name].method for name in found.plan} <= {"pep", "full"}
    True
    """

    settings: PepSettings

    _left: int = field(default=0, init=False, repr=False)

    method = "pep"
    summary = "PEP: let thresholds rise until the budget is met, retrain the elements left from their initial weights."
    settings_cls = PepSettings
    stages = ("thresholds", "retrain")

    def check(self) -> None:
        """Refuse thresholds that would not reach the weights."""
        need_validation(self.data, self.config)
        if not self.limits:
            raise ConfigError("give a budget (or a compression), or `snapshots`: PEP prunes until one is met")
        least, limit = self._bytes([(0,) * f.embedding_dim for f in self.first_readers]), min(self.limits.values())
        if least > limit:
            raise BudgetError(
                f"even with nothing kept, the features take {format_bytes(least)}; {format_bytes(limit)} are available "
                "for the vectors. Ways out: 1. a larger budget; 2. fewer features"
            )
        s, steps = self.settings, self._steps()
        if s.threshold_lr is None and s.threshold_init >= _logit(_FELT):
            raise ConfigError(
                f"thresholds that begin at {s.threshold_init:g} are felt from the start (a sigmoid of "
                f"{_sigmoid(s.threshold_init):.1g}), so no rate follows from the way they have to go; set "
                f"`threshold_lr`, or a `threshold_init` below {_logit(_FELT):.1f}"
            )
        reached = s.threshold_init + self.threshold_lr * steps
        if reached < _logit(1e-4):
            raise ConfigError(
                f"thresholds of rate {self.threshold_lr:g} rise from {s.threshold_init:g} to at most {reached:.1f} in "
                f"{steps} steps, whose sigmoid ({_sigmoid(reached):.1g}) prunes nothing; raise `threshold_lr`, "
                "`threshold_init` or `epochs`"
            )

    def _steps(self) -> int:
        c = self.config
        per_epoch = len(self.data.batches("train", c.batch_size))
        return min(per_epoch * c.epochs, c.steps or per_epoch * c.epochs)

    @cached_property
    def threshold_lr(self) -> float:
        """Rate of the raw thresholds."""
        s = self.settings
        if s.threshold_lr is not None:
            return s.threshold_lr
        return (_logit(_FELT) - s.threshold_init) / max(1, self._steps() // 3)

    @cached_property
    def limits(self) -> dict[str, int]:
        """Bytes of the vectors of every snapshot, by name, largest first."""
        whole = full_bytes(self.schema)
        found = {f"snapshot_{ratio:g}x": int(whole / ratio) for ratio in self.settings.snapshots}
        if self.vector_budget is not None:
            found["snapshot"] = self.vector_budget
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @cached_property
    def net(self) -> Supernet:
        """The supernet, pruned to the smallest budget."""
        s = self.settings
        layer = PepLayer(
            self.schema, s.granularity, init=s.threshold_init, lr=self.threshold_lr, decay=s.threshold_decay
        )
        net = Supernet(self.full_model(), layer.to(self.device or "cpu"))
        every = max(1, min(s.check_every, int(_BETWEEN / self.threshold_lr)))
        options: dict[str, Any] = {"lr": self.threshold_lr, "decay": s.threshold_decay, "every": every}
        config = self.config.replace(patience=None, keep_best=False)
        trainer: PepTrainer = self.trainer(
            PepTrainer, net, "thresholds", config, check=lambda: self._snap(net, trainer.state.step), **options
        )
        self.run_stage("thresholds", trainer)
        return net

    @torch.no_grad()
    def _kept(self, net: Supernet, field: int) -> Tensor:
        """Elements of a table that the thresholds leave: bool ``[num_ids, D]`` on the CPU."""
        spec, layer = self.first_readers.features[field], cast("PepLayer", net.layer)
        table, raw = net.table(spec.name), layer.of(field, spec.table_name)
        per_row = layer.many is not None
        parts = [
            (part.abs() > (raw[start : start + len(part)] if per_row else raw).sigmoid()).cpu()
            for start, part in chunks(table)
        ]
        return torch.cat(parts)

    @property
    def _pruned(self) -> str:
        return "oov" if self.settings.shared else "zero"

    def _bytes(self, kept: Sequence[tuple[int, ...]]) -> int:
        """Of the vectors, with so many elements of each column of each field."""
        cls = get_method("pep").config_cls
        configs = [cls.from_params({"num_kept": k, "pruned": self._pruned, "order": "sets"}) for k in kept]
        return sum(c.footprint(s).serve for c, s in zip(configs, self.first_readers, strict=True))

    def _snap(self, net: Supernet, step: int) -> bool:
        """Write the plans of all budgets that are met by ``step``; True once all are."""
        # A process that was killed may have met some at steps that are done again from its last checkpoint.
        met = dict(self.folder.get("snapshots") or {})
        waiting = {
            name: size
            for name, size in self.limits.items()
            if self.folder.get(name) is None or met.get(name, step + 1) > step
        }
        if not waiting:
            return True
        kept = [self._kept(net, f) for f in range(len(self.first_readers))]
        size = self._bytes([tuple(k.sum(0).tolist()) for k in kept])
        if not any(bool(k.any()) for k in kept):
            left = format_bytes(self._left) if self._left else "all"
            raise BudgetError(
                f"the thresholds pruned everything at once: {left} of the vectors' bytes were left when they were last "
                f"counted, now no element is, and the budget is {format_bytes(max(waiting.values()))}. Ways out: 1. a "
                f"`threshold_lr` below {self.threshold_lr:.2g}, or a lower `threshold_init`; 2. more epochs or a "
                "smaller batch_size, so that thresholds rise in smaller steps; 3. a coarser budget"
            )
        for name in [n for n, limit in waiting.items() if size <= limit]:
            pruned = self._pruned
            chosen = {s.name: choose_elements(s, k, pruned) for s, k in zip(self.first_readers, kept, strict=True)}
            reasons = {
                s.name: f"kept {int(k.sum()):,} of {k.numel():,} elements"
                for s, k in zip(self.first_readers, kept, strict=True)
            }
            self.folder.put(name, make_plan(self.schema, chosen, reasons).to_dict())
            self.folder.put("snapshots", met := met | {name: step})
            del waiting[name]
        self._left = size
        return not waiting

    def search(self) -> Plan:
        """Training under thresholds; the plan is that of the search's budget, or of the smallest snapshot."""
        net = self.net
        self._snap(net, self._steps())
        name = "snapshot" if "snapshot" in self.limits else list(self.limits)[-1]
        found = self.folder.get(name)
        if found is None:
            raise BudgetError(
                f"after all steps the vectors still take {format_bytes(self._left)}; {format_bytes(self.limits[name])} "
                "are available. Ways out: 1. a larger budget; 2. a larger `threshold_lr` or `threshold_decay`; 3. more "
                "epochs"
            )
        return Plan.from_dict(found)

    def start_weights(self) -> StartWeights:
        """The true initial weights, or the thresholded tables beside the network as it was trained."""
        if self.settings.retrain_from == "init":
            return super().start_weights()
        net, layer = self.net, cast("PepLayer", self.net.layer)
        with torch.no_grad():
            tables = {
                spec.name: soft_threshold(net.table(spec.name), layer.of(field, spec.table_name))
                for field, spec in enumerate(self.first_readers)
            }
        return self.trained_weights(net, tables)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
