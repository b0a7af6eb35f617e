"""Bilevel training of DNIS: the embeddings step on training batches, the selection on batches of another split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys_embed.data.batch import Batch
from recsys_embed.data.data_source import BatchSource
from recsys_embed.search.layers import DnisLayer
from recsys_embed.search.supernet import Supernet, as_model
from recsys_embed.train.config import TrainConfig
from recsys_embed.train.loop import Trainer
from recsys_embed.train.loss import loss_of

_EPSILON = 1e-2
"""Length of the finite difference, over the gradient's norm (DARTS)."""


class BilevelTrainer(Trainer):
    """Trains a supernet with a :class:`DnisLayer`: its network stays as it is.

    Every step moves the embeddings (tables of vectors and of first-order weights, numeric vectors) on a training batch
    and then the selection on a batch of another split, in evaluation mode. Those batches go round and round, shuffled
    anew each time.

    Args:
        net: the supernet, warm.
        data, config: see :class:`Trainer`.
        upper: the split that the selection is fitted on.
        alpha_lr, l1, second_order: see :class:`DnisSettings`.
        **options: see :class:`Trainer`.
    """

    def __init__(
        self,
        net: Supernet,
        data: BatchSource,
        config: TrainConfig,
        *,
        upper: str,
        alpha_lr: float,
        l1: float,
        second_order: bool,
        **options: Any,
    ) -> None:
        self.upper = upper
        self.net, self.alpha_lr, self.l1, self.second_order = net, alpha_lr, l1, second_order
        self.layer = cast("DnisLayer", net.layer)
        model = net.model
        tables = {id(p) for c in model.collections().values() for p in c.parameters()}
        features = {
            id(p) for name in ("numeric", "linear_numeric", "bias") if (p := getattr(model, name, None)) is not None
        }
        for p in model.parameters():
            p.requires_grad_(p.requires_grad and id(p) in tables | features)
        super().__init__(as_model(net), data, config, **options)
        self._upper_batches: Iterator[Batch] | None = None

    def _dense_optimizer(self) -> tuple[torch.optim.Adam, list[nn.Parameter]]:
        if any(p.requires_grad for p in self.net.model.trainable()):
            return super()._dense_optimizer()
        # A model whose tables step inside backward may have nothing else that counts as an embedding.
        nothing = nn.Parameter(torch.zeros(0, device=self.device))
        return torch.optim.Adam([{"params": [nothing], "peak": 0.0}]), [nothing]

    def _next_upper(self) -> Batch:
        """The selection's batch of this step."""
        c = self.config
        count = len(self.data.batches(self.upper, c.batch_size, shuffle=True, seed=c.seed))
        epoch, at = divmod(self.state.step, count)
        if self._upper_batches is None or at == 0:
            options: dict[str, Any] = {"shuffle": True, "seed": c.seed, "epoch": epoch, "device": self.device}
            self._upper_batches = iter(self.data.batches(self.upper, c.batch_size, start_batch=at, **options))
        return next(self._upper_batches)

    def _step(self, batch: Batch) -> float:
        # The position of this step, before it counts as done.
        unseen = self._next_upper()
        value = super()._step(batch)
        begin = time.perf_counter()
        self._select(batch, unseen)
        self.state.seconds += time.perf_counter() - begin
        return value

    def _loss(self, batch: Batch) -> Tensor:
        return loss_of(self.model, batch, loss=self.config.loss, args=self.loss_args)

    def _select(self, train: Batch, unseen: Batch) -> None:
        """Move the selection."""
        alpha = self.layer.alpha
        second = None
        alpha.requires_grad_(True)
        try:
            if self.second_order:
                with self._open() as weights:
                    grad, *grads = torch.autograd.grad(self._loss(unseen), [alpha, *weights])
                    second = self._second(train, weights, grads)
            else:
                with self.net.network_evaluated():
                    (grad,) = torch.autograd.grad(self._loss(unseen), [alpha])
        finally:
            alpha.requires_grad_(False)
        self.layer.step(grad + self.l1 * alpha.detach().sign(), self.alpha_lr, second)

    @contextmanager
    def _open(self) -> Iterator[list[nn.Parameter]]:
        """The tables of the vectors, with gradients; in evaluation mode, where those do not step their optimizer."""
        collection = self.net.eval().vectors
        weights = [collection.get_parameter(name) for name in collection.storages]
        collection.constant_in_eval = False
        try:
            yield weights
        finally:
            collection.constant_in_eval = True
            self.net.train()

    def _second(self, train: Batch, weights: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> Tensor:
        """Second-order term: gradient of the loss on unseen rows through the embeddings' next step (DARTS, eq. 8)."""
        norm = torch.sqrt(sum((g.square().sum() for g in grads), torch.zeros(())))
        if not float(norm) > 0:
            return torch.zeros_like(self.layer.alpha)
        length = _EPSILON / float(norm)
        found: list[Tensor] = []
        for sign in (1.0, -2.0, 1.0):
            with torch.no_grad():
                for w, g in zip(weights, grads, strict=True):
                    w.add_(g, alpha=sign * length)
            if len(found) < 2:
                found += torch.autograd.grad(self._loss(train), [self.layer.alpha])
        rate = self.optimizer.param_groups[0]["lr"] if not self.fused else self.net.embedding_lr
        return -rate * (found[0] - found[1]) / (2 * length)
