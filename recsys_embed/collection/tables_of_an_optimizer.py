"""Tables as the torch optimizer that steps them sees them: steps by the gradients in ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast
from weakref import ref

import torch
from torch import Tensor

from recsys_embed.collection import lost_gradients
from recsys_embed.collection.backward_steps import refuse_replicas
from recsys_embed.collection.tables_with_state import TablesWithState
from recsys_embed.errors import ConfigError, RecsysEmbedError
from recsys_embed.kernels.deferred_gradients import DeferredGradients
from recsys_embed.kernels.fused_gather import apply_update
from recsys_embed.kernels.native import lookup as native
from recsys_embed.kernels.native import row_steps
from recsys_embed.optim import FusedOptimizer, FusedTableOptimizer, RowGradient, rows_of
from recsys_embed.optim.replicas import Replicas
from recsys_embed.optim.row_gradient import is_dense
from recsys_embed.utils.dynamo import in_compiled_autograd


def nobody() -> None:
    """No optimizer of torch steps the tables."""


class TablesOfAnOptimizer(TablesWithState):
    """Tables that :func:`recsys_embed.optim.fused_optimizer` makes a torch optimizer of.

    Args:
        shapes, optimizer, device, dtype, backend: see :class:`TablesWithState`.
    """

    # Rule and rate before a torch optimizer changed them, and whether the state is one's.
    _built: tuple[FusedOptimizer, float] | None = None
    _state_is_anothers = False
    # Whether lookups in `eval()` give the tables no gradients, where the optimizer steps in backward.
    constant_in_eval = True
    check_finite = False

    def _start_alone(self) -> None:
        """Nobody but the tables' own backward steps them, yet."""
        self._replicas: Replicas | None = None
        # The torch optimizer that steps the tables, and the one that it steps besides.
        self._torch_optimizer: Callable[[], object] = nobody
        self._dense: Callable[[], object] = nobody
        # Whether a step of torch's has come while gradients waited for an optimizer that is not there.
        self._passed_over = self._told_of_given = False
        # Tables whose gradient was dense before the last lookup already.
        self._have_dense_gradients: frozenset[int] = frozenset()

    @property
    def takes_no_gradient(self) -> bool:
        """Whether lookups alone change the tables, so that no gradient comes to their ``.grad``."""
        return self.optimizer is not None and self._in_backward and (self.training or self.constant_in_eval)

    @property
    def _rate(self) -> float:
        """Learning rate of the next step."""
        return self._lr

    def before_lookup(self) -> None:
        """Before a lookup with gradients: replicas of the tables share them, or the lookup is refused."""
        if not self._in_backward:
            self._have_dense_gradients = frozenset(id(t) for t in self._weights() if is_dense(t.grad))
        if self._passed_over and self._torch_optimizer() is None:
            lost_gradients.refuse_lost(self._weights(), "the optimizer's that has stepped since")
        if self._replicas is not None:
            self._replicas.before_lookup()
        else:
            refuse_replicas()

    def _step_rows(self, storage: str, gradient: Tensor) -> None:
        """One step of a storage by its gradient, in place."""
        rule, weight, state = self.optimizer, self._parameters[storage], self._state(storage)
        if rule is None or weight is None:
            return
        log = self._step_logs[storage]
        log.advance(rule, self._rate)
        rows, values = rows_of(gradient)
        native_rows = self.backend == "native" and values.dtype is torch.float32 and native.runs_on(values, [weight])
        with self._step_or_none([storage]):
            if native_rows and native.knows(rule):
                row_steps.update_rows(rule, weight, state, rows, values, log)
            else:
                apply_update(rule, weight, state, rows, values, log, self.backend in ("native", "triton"))

    @contextmanager
    def _step_or_none(self, storages: Sequence[str]) -> Iterator[None]:
        """A step that is refused before it writes has not been made."""
        try:
            yield
        except (RecsysEmbedError, MemoryError):
            for name in storages:
                self._step_logs[name].retract()
            raise

    @property
    def _current_lr(self) -> float:
        optimizer = self._torch_optimizer()
        return optimizer.lr_of(self) if isinstance(optimizer, FusedTableOptimizer) else self._lr

    def leave_steps_to(self, optimizer: Callable[[], object], replicas: Replicas) -> None:
        """From now on gradients are left for ``step()`` of the optimizer that is called for."""
        if self._in_backward and self.optimizer is not None:
            self._built = self.optimizer, self._lr
        self._in_backward, self._expects_state = False, False
        self._torch_optimizer, self._replicas = optimizer, replicas
        dense = getattr(optimizer(), "dense", None)
        self._dense = nobody if dense is None else ref(dense)

    def begin_anew(self) -> tuple[FusedOptimizer, float]:
        """Rule and rate with which a new torch optimizer starts; it starts without the state that an earlier one left.

        What steps in backward have made stays.
        """
        rule, lr = self._built or (cast("FusedOptimizer", self.optimizer), self._lr)
        if self._state_is_anothers:
            # Deferred steps are those of the rule before.
            self.catch_up_()
            self.optimizer, self._lr = rule, lr
            self.reset_optimizer_()
        return rule, lr

    def is_stepped_by(self, optimizer: object) -> bool:
        """Whether the optimizer is the last one made of these tables."""
        return self._torch_optimizer() is optimizer

    def check_gradients_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step of an optimizer of torch: the gradients of the tables wait for it, or not for long.

        Raises:
            ConfigError: it would step tables that another steps, or the one for which they wait no longer exists.
        """
        for table in (tables := self._weights()):
            if table.grad is not None:
                break
        else:
            return
        if isinstance(optimizer, FusedTableOptimizer):
            return
        if self._in_backward:
            if self.takes_no_gradient:
                lost_gradients.refuse_given(tables, optimizer)
                self._told_of_given = self._told_of_given or lost_gradients.tell_of_given(tables)
            return
        lost_gradients.refuse_foreign(tables, optimizer)
        if self._dense() is optimizer and self._torch_optimizer() is None:
            lost_gradients.refuse_lost(tables, f"{type(optimizer).__name__}'s")

    def _note_step(self) -> None:
        """A step of an optimizer of torch has ended."""
        if not self._in_backward:
            self._passed_over = self._torch_optimizer() is None and any(t.grad is not None for t in self._weights())

    def refuse_stale(self, table: Tensor) -> None:
        """Refuse a gradient that came from outside a lookup, of a table that has been read with deferred steps."""
        if in_compiled_autograd():  # where gradients of lookups are dense
            return
        if self._has_missed_steps and id(table) not in self._have_dense_gradients and is_dense(table.grad):
            table.grad = None
            raise ConfigError(
                "a loss reads a table that somebody holds, outside a lookup, while steps of its rows are deferred "
                "(rows='all'); call catch_up_() of the collection before, or take the table from model.parameters() "
                "or the collection each time"
            )

    def _check_finite(self, gradients: Sequence[Tensor]) -> None:
        """Refuse gradients that are not finite, where ``check_finite`` asks for it, before a table changes."""
        if self.check_finite and not all(bool(torch.isfinite(g).all()) for g in gradients):
            raise ConfigError(
                "a gradient of the tables is not finite, and no table has been changed; lower the learning rate or "
                "look for NaN in the batch, or skip such steps by a GradScaler with recsys_embed.optim.fused_optimizer"
            )

    def check_gradients(self, rule: FusedOptimizer) -> None:
        """Refuse a step before it changes anything.

        Raises:
            ConfigError: the rule needs other state than the one the tables were made with, or a gradient can no longer
                be computed, or is not finite where ``check_finite`` asks for it.
            IdRangeError: a gradient has rows beyond its table.
        """
        if self.optimizer is not None and rule.formats != self.optimizer.formats:
            raise ConfigError(f"{rule} keeps other state than {self.optimizer}; build the collection with it")
        self._refuse_writes()
        for name, weight in zip(self.storages, self._weights(), strict=True):
            if self.check_finite and weight.grad is not None:
                self._check_finite([rows_of(weight.grad)[1]])
            if not isinstance(weight.grad, RowGradient):
                continue
            if isinstance(weight.grad.source, DeferredGradients):
                weight.grad.source.check()
            else:
                weight.grad.check_rows(name)

    def reset_optimizer_(self) -> None:
        """The optimizer's state becomes that before the first step."""
        self.catch_up_()
        with torch.no_grad():
            self._reset_steps()
        self._state_is_anothers = False

    @torch.no_grad()
    def apply_gradients(self, rule: FusedOptimizer, lr: float) -> None:
        """One step by the gradients in ``.grad``."""
        self._state_is_anothers = True
        if self.optimizer is not None and rule != self.optimizer:
            # Deferred steps are those of the rule before.
            self.catch_up_()
            self.optimizer = rule
        self._lr = lr
        own = self._weights()
        gradients = [t.grad for t in own]
        with self._lock:
            source = next((g.source for g in gradients if isinstance(g, RowGradient)), None)
            if isinstance(source, DeferredGradients) and source.is_of(own, gradients):
                for name, gradient in zip(self.storages, gradients, strict=True):
                    if gradient is not None:
                        self._step_logs[name].advance(rule, lr)
                stepped = [
                    name for name, gradient in zip(self.storages, gradients, strict=True) if gradient is not None
                ]
                with self._step_or_none(stepped):
                    source.step(rule, self._by_storage(list(self._all_states().values())), self._all_step_logs)
            else:
                for name, gradient in zip(self.storages, gradients, strict=True):
                    if gradient is not None:
                        self._step_rows(name, gradient)
            self._note_writes()

    def steps_taken(self, steps: Mapping[str, int] | None = None) -> dict[str, int]:
        """Steps of each storage so far; sets them where given, together with states that have no missed steps."""
        if steps is not None:
            self._count_steps(steps)
            self._state_is_anothers = True
        return {name: log.step for name, log in self._step_logs.items()}
