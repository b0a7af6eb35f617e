"""Tables with a fused optimizer: their parameters, its state, and the steps that rows outside a batch defer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from recsys_embed.errors import CheckpointError, ConfigError, raise_faults
from recsys_embed.kernels.deferred_steps import StepLog, catch_up
from recsys_embed.kernels.fused_gather import apply_update
from recsys_embed.kernels.native import lookup as native
from recsys_embed.kernels.native.autograd import NativeStep
from recsys_embed.kernels.native.handles import handle_of
from recsys_embed.kernels.native.lookup import Ids, NativeLookup
from recsys_embed.kernels.storage import allocate
from recsys_embed.optim import FusedOptimizer, is_rate
from recsys_embed.utils.deprecated import warn_renamed
from recsys_embed.utils.types import JSON


class _Lock:
    """A reentrant lock; a copy or a pickle of it is a new one, not held."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Lock, ()


class OneStep:
    """Counts one step of a table that several parts of a lookup update in one backward: the first advances it."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], int] = {}
        self._steps: dict[str, int] = {}

    def begins(self, storage: str, who: str) -> bool:
        """Whether ``who`` is the first part to update ``storage`` in this backward."""
        run = self._runs[storage, who] = self._runs.get((storage, who), 0) + 1
        if run <= self._steps.get(storage, 0):
            return False
        self._steps[storage] = run
        return True


class FusedTables(nn.Module):
    """Storages ``[rows, width]`` as parameters, each with the state of a fused optimizer, or None.

    Args:
        shapes: of each storage by name.
        optimizer: None leaves ordinary gradients.
        backend: ``"native"`` or another.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        optimizer: FusedOptimizer | None,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        super().__init__()
        self.optimizer, self.storages, self.backend = optimizer, tuple(shapes), backend
        for name, (rows, width) in shapes.items():
            weight = allocate(rows, width, device, dtype)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=optimizer is None))
            for key, kind in optimizer.tensors.items() if optimizer else ():
                number = torch.int32 if kind == "step" else torch.float32
                state = allocate(rows, width if kind == "element" else 1, device, number)
                self.register_buffer(f"{name}_{key}", state, persistent=False)
        self._keys = tuple(optimizer.tensors) if optimizer else ()
        self._lr = optimizer.lr if optimizer else 0.0
        self._step_logs = {name: StepLog() for name in self.storages}
        # Several threads may train at once, and kernels read rows that another thread's step would change.
        self._lock = _Lock()
        # Autograd runs a backward only towards something that wants a gradient; fused tables do not.
        self._anchor = torch.zeros(0, requires_grad=True)
        self._handle = handle_of(self)

    def __setstate__(self, state: JSON) -> None:
        super().__setstate__(state)
        self._handle = handle_of(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Sums of squares overflow half precision and stall bfloat16, so state keeps float32 whatever weights become.
        kept = {f"{name}_{key}": getattr(self, f"{name}_{key}") for name, key in self._states()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype:
                setattr(self, name, before.to(moved.device))
        return self

    def _weights(self) -> list[Tensor]:
        """The storages."""
        held = self._parameters  # as attributes torch finds them last of all, ten times slower
        return [held[name] if name in held else getattr(self, name) for name in self.storages]  # type: ignore[misc]

    def _states(self) -> list[tuple[str, str]]:
        return [(name, key) for name in self.storages for key in self._keys]

    def _state(self, storage: str) -> dict[str, Tensor]:
        return {key: getattr(self, f"{storage}_{key}") for key in self._keys}

    def _reset_steps(self) -> None:
        """Reset the optimizer state to that before the first step."""
        for name, key in self._states():
            if self.optimizer is not None:
                state, weight = getattr(self, f"{name}_{key}"), getattr(self, name)
                self.optimizer.reset_state_(key, state, weight.detach())
        self._step_logs = {name: StepLog() for name in self.storages}

    # -- steps ----------------------------------------------------------------------------------------------------

    @property
    def _stepping(self) -> bool:
        """Whether a backward of what is looked up now steps the optimizer."""
        return self.optimizer is not None and self.training and torch.is_grad_enabled()

    @torch.no_grad()
    def _update(self, storage: str, rows: Tensor, grad: Tensor, once: OneStep | None = None) -> None:
        if self.optimizer is None:
            return
        with self._lock:
            if once is None or once.begins(storage, "torch"):
                self._step_logs[storage].advance(self.optimizer, self._lr)
            weight, kernels = getattr(self, storage), self.backend in ("native", "triton")
            apply_update(self.optimizer, weight, self._state(storage), rows, grad, self._step_logs[storage], kernels)

    @property
    def _native_step(self) -> NativeStep:
        states = [getattr(self, f"{name}_{key}") for name, key in self._states()]
        lazy = self.optimizer is not None and self.optimizer.lazy
        return NativeStep(self._anchor, self._catch_up_native, self._update_native, states, self._handle, lazy)

    @property
    def _all_step_logs(self) -> list[StepLog]:
        return [self._step_logs[name] for name in self.storages]

    @torch.no_grad()
    def _update_native(
        self,
        lookup: NativeLookup,
        ids: Ids,
        grads: Sequence[Tensor],
        kept: Tensor | None,
        once: OneStep | None = None,
    ) -> None:
        tables, states = self._weights(), self._native_step.states
        self.step_native(lookup, ids, tables, states, grads, kept, once)

    @torch.no_grad()
    def step_native(
        self,
        lookup: NativeLookup,
        ids: Ids,
        tables: Sequence[Tensor],
        states: Sequence[Tensor],
        grads: Sequence[Tensor],
        kept: Tensor | None,
        once: OneStep | None = None,
    ) -> None:
        """One step on ``tables`` and the flat list of their ``states``, in place."""
        if self.optimizer is not None:
            with self._lock:
                for name, log in zip(self.storages, self._all_step_logs, strict=True):
                    if once is None or once.begins(name, "fused"):
                        log.advance(self.optimizer, self._lr)
                lookup.update(ids, tables, grads, kept, self.optimizer, self._by_storage(states), self._all_step_logs)

    def _by_storage(self, states: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        count = len(self._keys)
        return [dict(zip(self._keys, states[i * count :], strict=False)) for i in range(len(self.storages))]

    # -- deferred steps -------------------------------------------------------------------------------------------

    @property
    def _has_missed_steps(self) -> bool:
        """Whether rows may have missed steps."""
        return self.optimizer is not None and self.optimizer.lazy and any(p.rates for p in self._all_step_logs)

    @torch.no_grad()
    def _catch_up_native(self, lookup: NativeLookup, ids: Ids) -> None:
        """Apply the steps missed by the rows that ids read."""
        if self._has_missed_steps:
            self.catch_up_native(lookup, ids, self._weights(), self._native_step.states)

    @torch.no_grad()
    def catch_up_native(
        self, lookup: NativeLookup, ids: Ids, tables: Sequence[Tensor], states: Sequence[Tensor]
    ) -> None:
        """Apply the steps missed by the rows of ``tables`` that ids read, in place."""
        if self._has_missed_steps and self.optimizer is not None:
            with self._lock:
                lookup.catch_up(ids, tables, self.optimizer, self._by_storage(states), self._all_step_logs)

    @torch.no_grad()
    def _catch_up_rows(self, storage: str, rows: Tensor | None = None) -> None:
        """Apply missed steps to rows of a storage with torch's operations; -1 is no row, by default all rows."""
        if self._has_missed_steps and self.optimizer is not None:
            rows = None if rows is None else rows[rows >= 0].unique()
            with self._lock:
                log = self._step_logs[storage]
                catch_up(self.optimizer, getattr(self, storage), self._state(storage), rows, log, log.step)

    @torch.no_grad()
    def catch_up_(self) -> Self:
        """Apply all deferred steps; does nothing unless the optimizer has ``rows="all"``.

        A step updates the rows of its batch and is deferred for the others. A row catches up when it is next read,
        and all rows do before they are evaluated, saved, served or returned by ``table``. Call this before you read
        the parameters directly.

        >>> from recsys_embed import Adam, EmbeddingCollection, FeatureSpec, Schema
        >>> coll = EmbeddingCollection(Schema([FeatureSpec("C1", 10, 4)]), optimizer=Adam(weight_decay=0.1, rows="all"))
        >>> coll(torch.tensor([[3]])).sum().backward()
        >>> before = coll.width4[5].clone()
        >>> bool((coll.catch_up_().width4[5] != before).all())
        True
        """
        if self._has_missed_steps and self.optimizer is not None:
            with self._lock:
                for name, log in self._step_logs.items():
                    table = getattr(self, name)
                    if self.backend == "native" and native.runs_on(table.detach(), [table]):
                        native.catch_up(self.optimizer, table, self._state(name), log)
                    else:
                        self._catch_up_rows(name)
                    log.clear()
        return self

    def settle_(self) -> Self:
        """The earlier name of :meth:`catch_up_`."""
        warn_renamed("method of EmbeddingCollection", "settle_", "catch_up_")
        return self.catch_up_()

    def _catch_up_before_reading(self) -> None:
        if self.optimizer is None or not self.optimizer.lazy:
            return
        if not torch.compiler.is_compiling():
            self.catch_up_()
        elif self.training:
            # A compiled graph does not know which rows missed steps; eval() has applied them all.
            raise ConfigError("compiled lookups without gradients need eval() where the optimizer has rows='all'")

    def train(self, mode: bool = True) -> Self:
        if not mode:
            self.catch_up_()
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.catch_up_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        # Missed steps belong to the weights that are replaced, not to those that are loaded.
        self.catch_up_()
        super()._load_from_state_dict(*args)

    # -- the optimizer, as users see it ---------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """Learning rate of the fused optimizer; set it to follow a schedule."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        if self.optimizer is None:
            raise ConfigError("this collection has no fused optimizer; its learning rate is that of your optimizer")
        if not is_rate(value):
            raise ConfigError(f"`lr` must be a finite number >= 0; got {value!r}")
        self._lr = float(value)

    @property
    def _rule(self) -> str:
        """The update rule without its learning rate, which a resumed run may change and the state carries anyway."""
        return repr(replace(self.optimizer, lr=0.0)) if self.optimizer else "None"

    def optimizer_state_dict(self) -> JSON:
        """State of the fused optimizer: tensors by storage and name, step counts, learning rate, and its rule."""
        self.catch_up_()
        return {
            "rule": self._rule,
            "lr": self._lr,
            "steps": {name: log.step for name, log in self._step_logs.items()},
            "state": {f"{name}_{key}": getattr(self, f"{name}_{key}").detach() for name, key in self._states()},
        }

    def load_optimizer_state_dict(self, saved: JSON) -> None:
        """Inverse of :meth:`optimizer_state_dict`.

        Raises:
            CheckpointError: the state is of another rule, or its tensors are missing or of another shape.
        """
        parts = saved if isinstance(saved, Mapping) else {}
        kinds: dict[str, type | tuple[type, ...]] = {
            "rule": str,
            "lr": (int, float),
            "steps": Mapping,
            "state": Mapping,
        }
        wrong = [k for k, kind in kinds.items() if not isinstance(parts.get(k), kind)]
        if wrong or not is_rate(saved["lr"]) or not all(isinstance(n, int) for n in saved["steps"].values()):
            raise CheckpointError(f"an optimizer state is what optimizer_state_dict() returns; got {saved!r:.80}")
        if saved["rule"] != self._rule:
            raise CheckpointError(f"optimizer state is of {saved['rule']}; this collection uses {self._rule}")
        wanted = {f"{name}_{key}" for name, key in self._states()}
        state = saved["state"]
        wrong = [f"{k} is missing" for k in sorted(wanted - state.keys())]
        wrong += [f"{k} belongs to no table" for k in sorted(state.keys() - wanted)]
        for k in sorted(wanted & state.keys()):
            have, shape = getattr(self, k).shape, getattr(state[k], "shape", None)
            if shape != have:
                wrong.append(f"{k} has shape {None if shape is None else tuple(shape)}, not {tuple(have)}")
        if saved["steps"].keys() != self._step_logs.keys():
            wrong.append(f"it counts steps of {sorted(saved['steps'])}, not of {sorted(self._step_logs)}")
        raise_faults(
            wrong,
            "an optimizer state that does not fit the tables; where an earlier version saved it, which kept tables "
            "behind networks or pooled combinations apart, load the weights alone and start the optimizer anew",
            CheckpointError,
        )
        for key in wanted:
            getattr(self, key).copy_(state[key])
        self._lr, self._step_logs = float(saved["lr"]), {name: StepLog(saved["steps"][name]) for name in self.storages}
