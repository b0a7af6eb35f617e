"""The parameters and the optimizer state of tables: deferred steps, state dicts, and the optimizer's own state dict."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from recsys_embed.collection.optimizer_state import (
    ELSEWHERE,
    LR,
    STEPS,
    SavedState,
    check_state,
    forget_state,
    saved_lr,
    state_entries,
    take_state,
    without_state,
)
from recsys_embed.collection.writes import note_writes, refuse_writes
from recsys_embed.core.row_format import RowFormat
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.deferred_steps import StepLog, catch_up
from recsys_embed.kernels.derivatives import catching_up
from recsys_embed.kernels.gather_ops import catch_up_all
from recsys_embed.kernels.low_precision_states import allocate_table, apply_apart, load_stored, save_stored
from recsys_embed.kernels.native import lookup as native
from recsys_embed.kernels.native import row_steps
from recsys_embed.kernels.native.lookup import Ids, NativeLookup
from recsys_embed.kernels.storage import allocate
from recsys_embed.optim import FusedOptimizer, is_rate
from recsys_embed.optim.state_format import copy_state, reset_state
from recsys_embed.utils.deprecated import warn_renamed
from recsys_embed.utils.lock import Lock as _Lock
from recsys_embed.utils.types import JSON

# Modules of torch that list parameters without reading them.
_READ_NO_VALUES = ("torch.nn.utils.clip_grad", "torch.nn.modules.module")


class _UpToDate(dict[str, nn.Parameter | None]):
    """The parameters of tables whose rows may have deferred steps, which are applied when something lists them.

    Averages of weights, norms and copies by hand go through ``model.parameters()``, which lists every module's.
    """

    owner: TablesWithState

    def items(self) -> ItemsView[str, nn.Parameter | None]:  # type: ignore[override]
        if self.owner._has_missed_steps:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_name in _LISTERS and frame.f_globals is vars(module):
                frame = frame.f_back
            if frame is not None and frame.f_globals.get("__name__") not in _READ_NO_VALUES:
                self.owner.catch_up_()
        return super().items()


_LISTERS = ("_named_members", "named_parameters", "parameters", "<lambda>", "<genexpr>")


class TablesWithState(nn.Module):
    """Storages ``[rows, width]`` as parameters, each with the state of a fused optimizer, or None.

    Args:
        shapes: of each storage by name.
        optimizer: None leaves ordinary gradients.
        backend: ``"native"`` or another.
        formats: of storages whose rows are stored in few bits.
        seed: of the random bits with which these are rounded.
    """

    # Storages whose state `to_empty` has given memory that nothing has filled since.
    _unfilled: frozenset[str] = frozenset()
    # Of state dicts: from 2 on they hold the state of an optimizer that steps in backward.
    _version = 2

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        optimizer: FusedOptimizer | None,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        formats: Mapping[str, RowFormat] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        formats = formats or {}
        self.optimizer, self.storages, self.backend = optimizer, tuple(shapes), backend
        for name, (rows, width) in shapes.items():
            weight = allocate_table(name, rows, width, device, dtype, formats.get(name), seed)
            self.register_parameter(name, nn.Parameter(weight))
            of_state = optimizer.formats if optimizer else {}
            for key, kind in optimizer.tensors.items() if optimizer else ():
                state = allocate(rows, width if kind == "element" else 1, device, of_state[key].dtype)
                self.register_buffer(f"{name}_{key}", state, persistent=False)
        self._keys = tuple(optimizer.tensors) if optimizer else ()
        self._lr = optimizer.lr if optimizer else 0.0
        self._start_logs()
        # Several threads may train at once, and kernels read rows that another thread's step would change.
        self._lock = _Lock()
        # Whether backward steps the optimizer, rather than leave that to a torch optimizer; and whether weights were
        # loaded whose state is in another dict.
        self._in_backward, self._expects_state = True, False
        # Whether the user sets `lr`, so that it follows nothing else.
        self._sets_lr = False
        if optimizer is not None and optimizer.lazy:
            listed = _UpToDate(self._parameters)
            listed.owner = self
            self.__dict__["_parameters"] = listed
        self._own_parameters()

    def __setstate__(self, state: JSON) -> None:
        super().__setstate__(state)
        self._forget_writes()

    def _start_logs(self) -> None:
        """No steps so far; seeds leave room for those of the states of a table."""
        self._step_logs = {name: StepLog(seed=16 * i) for i, name in enumerate(self.storages)}

    def _own_parameters(self) -> None:
        """Remember which tensors are this module's, for others may stand in their place while it runs."""
        self.__dict__["_owned"] = tuple(self._parameters.get(name) for name in self.storages)
        self._forget_writes()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Sums of squares overflow half precision and stall bfloat16, so state keeps its format whatever weights become.
        kept = self._all_states()
        # As torch names it: memory that nothing has filled holds no state, and has missed no steps.
        if "to_empty" in getattr(fn, "__qualname__", ""):
            self._unfilled = frozenset(self.storages)
            self._start_logs()
        with apply_apart(self, fn):
            super()._apply(fn, recurse)
        self._own_parameters()
        for name, before in kept.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype:
                setattr(self, name, before.to(moved.device))
        return self

    def _weights(self) -> list[Tensor]:
        """The storages."""
        held = self._parameters  # as attributes torch finds them last of all, ten times slower
        return [held[name] if name in held else getattr(self, name) for name in self.storages]  # type: ignore[misc]

    def _table(self, storage: str) -> Tensor:
        """A storage, whose rows may have deferred steps."""
        weight: Tensor | None = self._parameters.get(storage)
        return getattr(self, storage) if weight is None else weight

    def _weight(self, storage: str) -> Tensor:
        weight = self._table(storage)
        return weight.detach() if self._constant else weight

    @property
    def _owns_its_tables(self) -> bool:
        """Whether the tables are this module's, rather than tensors that stand in their place while it runs."""
        return all(map(operator.is_, self._weights(), self.__dict__["_owned"]))

    def _states(self) -> list[tuple[str, str]]:
        return [(name, key) for name in self.storages for key in self._keys]

    def _all_states(self) -> dict[str, Tensor]:
        return {f"{name}_{key}": getattr(self, f"{name}_{key}") for name, key in self._states()}

    def _state(self, storage: str) -> dict[str, Tensor]:
        return {key: getattr(self, f"{storage}_{key}") for key in self._keys}

    def _reset_steps(self, storages: Sequence[str] | None = None) -> None:
        """Reset the optimizer state of storages, by default of all, to that before the first step."""
        for name in self.storages if storages is None else storages:
            for key in self._keys:
                state, weight = getattr(self, f"{name}_{key}"), self._table(name)
                if state.device != weight.device:
                    # Weights were assigned to a module built on the meta device.
                    state = torch.empty_like(state, device=weight.device)
                    setattr(self, f"{name}_{key}", state)
                reset_state(cast("FusedOptimizer", self.optimizer), key, state, weight.detach())
            self._count_steps({name: 0})
        self._expects_state = False

    def _count_steps(self, steps: Mapping[str, int]) -> None:
        """The states of storages are those after so many steps, and no row has missed one."""
        for name, count in steps.items():
            self._step_logs[name].restart(count)
        self._unfilled -= steps.keys()

    @property
    def _all_step_logs(self) -> list[StepLog]:
        return [self._step_logs[name] for name in self.storages]

    def _by_storage(self, states: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        count = len(self._keys)
        return [dict(zip(self._keys, states[i * count :], strict=False)) for i in range(len(self.storages))]

    # -- deferred steps -------------------------------------------------------------------------------------------

    @property
    def _has_missed_steps(self) -> bool:
        """Whether rows may have missed steps."""
        return self.optimizer is not None and self.optimizer.lazy and any(p.rates for p in self._all_step_logs)

    def _refuse_writes(self) -> None:
        if self._has_missed_steps:
            refuse_writes(self._step_logs, self.__dict__["_owned"])

    def _note_writes(self) -> None:
        if self.optimizer is not None and self.optimizer.lazy:
            note_writes(self._step_logs, self.__dict__["_owned"])

    @contextmanager
    def _by_compiled_code(self) -> Iterator[None]:
        """Compiled code changes tables, and counts as their writes what it gives and what it writes back afterwards."""
        self._forget_writes()
        try:
            yield
        finally:
            self._forget_writes()

    def _forget_writes(self) -> None:
        for log in self._step_logs.values():
            log.writes = None

    @torch.no_grad()
    def _catch_up_native(self, lookup: NativeLookup, ids: Ids) -> None:
        """Apply the steps missed by the rows that ids read."""
        if self._has_missed_steps:
            self._replay_native(lookup, ids, self._weights(), list(self._all_states().values()))

    @torch.no_grad()
    def catch_up_native(
        self, lookup: NativeLookup, ids: Ids, tables: Sequence[Tensor], states: Sequence[Tensor]
    ) -> None:
        """What a compiled lookup does first: apply the steps missed by the rows of ``tables`` that ids read."""
        with self._by_compiled_code():
            if self._has_missed_steps:
                self._replay_native(lookup, ids, tables, states)

    def _replay_native(
        self, lookup: NativeLookup, ids: Ids, tables: Sequence[Tensor], states: Sequence[Tensor]
    ) -> None:
        if self.optimizer is not None:
            with self._lock:
                self._refuse_writes()
                lookup.catch_up(ids, tables, self.optimizer, self._by_storage(states), self._all_step_logs)
                self._note_writes()

    @torch.no_grad()
    def _catch_up_rows(self, storage: str, rows: Tensor | None = None) -> None:
        """Apply missed steps to rows of a storage; -1 is no row, by default all rows."""
        self._replay(storage, rows, self._table(storage), self._state(storage))

    def _replay(self, storage: str, rows: Tensor | None, table: Tensor, state: dict[str, Tensor]) -> None:
        if self._has_missed_steps and self.optimizer is not None:
            rows = None if rows is None else rows[rows >= 0].unique()
            with self._lock:
                self._refuse_writes()
                self._replay_locked(self._step_logs[storage], rows, table, state)
                self._note_writes()

    def _replay_locked(self, log: StepLog, rows: Tensor | None, table: Tensor, state: Mapping[str, Tensor]) -> None:
        if self.optimizer is None:
            return
        # By the same kernels whoever asks, so that bits do not depend on when a table was last read as a whole.
        native_rows = self.backend == "native" and native.runs_on(table.detach(), [table])
        with catching_up(table):
            if native_rows and native.knows(self.optimizer):
                row_steps.catch_up(self.optimizer, table, state, log, rows)
            else:
                catch_up(self.optimizer, table, state, rows, log, log.step)

    @torch.no_grad()
    def catch_up_(self) -> Self:
        """Apply all deferred steps; does nothing unless the optimizer has ``rows="all"``.

        A step updates the rows of its batch and is deferred for the others. A row catches up when it is next read,
        and all rows do before they are evaluated, saved, served or returned by ``table``. Call this before you read
        the parameters directly.

        >>> from recsys_embed import Adam, EmbeddingCollection, FeatureSpec, Schema
        >>> coll = EmbeddingCollection(Schema([FeatureSpec("C1", 10, 4)]), optimizer=Adam(weight_decay=0.1, rows="all"))
        >>> coll(torch.tensor([[3]])).sum().backward()
        >>> coll.catch_up_() is coll
        True
        """
        if self._has_missed_steps:
            self._replay_all(self._weights(), list(self._all_states().values()))
        return self

    @torch.no_grad()
    def catch_up_all(self, tables: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """What compiled code does where it reads everything: apply all deferred steps; ``states`` are in a row."""
        with self._by_compiled_code():
            if self._has_missed_steps:
                self._replay_all(tables, states)

    def _replay_all(self, tables: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        with self._lock:
            self._refuse_writes()
            for log, table, state in zip(self._all_step_logs, tables, self._by_storage(states), strict=True):
                self._replay_locked(log, None, table, state)
                log.clear()

    def settle_(self) -> Self:
        """The earlier name of :meth:`catch_up_`."""
        warn_renamed("method of EmbeddingCollection", "settle_", "catch_up_")
        return self.catch_up_()

    def _catch_up_before_reading(self) -> None:
        if self.optimizer is None or not self.optimizer.lazy:
            return
        if not torch.compiler.is_compiling():
            self.catch_up_()
        elif torch.compiler.is_exporting() and self.training:
            # An exported program knows no optimizer; eval() has applied all steps.
            raise ConfigError("exported lookups need eval() where the optimizer has rows='all'")
        elif self.training:
            with torch.no_grad():
                catch_up_all(self._weights(), list(self._all_states().values()), self._handle)

    def train(self, mode: bool = True) -> Self:
        if not mode:
            self.catch_up_()
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.catch_up_()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_stored(self, destination, prefix)
        if self.optimizer is None:
            return
        self._count_copied_steps()
        if without_state():
            # As earlier versions did, which saved the state apart.
            getattr(destination, "_metadata", {}).get(prefix[:-1], {}).pop("version", None)
        else:
            # A torch optimizer has the state in a dict of its own.
            state = self._all_states() if self._in_backward else {}
            state = {k: t if keep_vars else t.detach() for k, t in state.items()}
            destination.update({prefix + k: v for k, v in {**state, **self._numbers()}.items()})

    def _count_copied_steps(self) -> None:
        """Count the steps of a state that was copied here from another module, as averages of weights do buffers."""
        if self.optimizer is not None and self.optimizer.lazy:
            for name in self.storages:
                last = self._state(name)["last"]
                known = last.is_meta or not last.numel() or int(last[0]) == self._step_logs[name].step
                if not known and bool((last == last[0]).all()):
                    self._count_steps({name: int(last[0])})

    def _numbers(self) -> dict[str, Tensor]:
        """Entries of a state dict beside weights and optimizer state: steps and the learning rate."""
        steps = {
            name: log.live_count() if self._in_backward else torch.tensor(ELSEWHERE)
            for name, log in self._step_logs.items()
        }
        return state_entries({}, steps, self._lr if self._in_backward and self._sets_lr else None)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("storages", ()):
            self._catch_up_before_reading()
        # torch.distributed.checkpoint asks for what a state dict names by its name.
        if name.endswith((f"_{STEPS}", f"_{LR}")) and self.__dict__.get("optimizer") is not None:
            numbers = self._numbers()
            if name in numbers:
                return numbers[name]
        return super().__getattr__(name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        # Missed steps belong to the weights that are replaced, not to those that are loaded.
        self.catch_up_()
        loaded = [name for name in self.storages if prefix + name in state_dict]
        saved, lr = dict[str, SavedState](), saved_lr(state_dict, prefix, self.storages)
        if self.optimizer is None:
            forget_state(state_dict, prefix, self.storages)
        elif loaded:
            # An optimizer of torch brings the state in a dict of its own.
            lacking = missing if self._in_backward else []
            version = metadata.get("version") if self._in_backward else 2
            states = {name: self._state(name) for name in self.storages}
            saved = take_state(state_dict, prefix, self.optimizer, states, version, lacking)
        load_stored(self, state_dict, prefix, metadata)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        self._own_parameters()
        if self.optimizer is not None and loaded:
            self._load_state(loaded, saved)
            if lr is not None and self._in_backward:
                self.lr = lr

    @torch.no_grad()
    def _load_state(self, loaded: Sequence[str], saved: Mapping[str, SavedState]) -> None:
        """Take over the state that came with weights; without one, that of other weights starts anew in backward.

        At ``step()`` it stays, as that of torch's optimizers does: it is the torch optimizer's, which may have been
        loaded before.
        """
        brought = {name: found for name, found in saved.items() if found.steps != ELSEWHERE}
        anew = [name for name in loaded if name not in brought and (self._in_backward or not self._holds_state(name))]
        self._reset_steps(anew)
        for name, (tensors, steps) in brought.items():
            for key, value in tensors.items():
                have = getattr(self, f"{name}_{key}")
                if have.is_meta and not value.is_meta:
                    have = torch.empty_like(have, device=value.device)
                    setattr(self, f"{name}_{key}", have)
                copy_state(cast("FusedOptimizer", self.optimizer), key, have, value)
            self._count_steps({name: steps})
        self._expects_state = self._in_backward and any(found.steps == ELSEWHERE for found in saved.values())

    def _holds_state(self, storage: str) -> bool:
        """Whether memory of the optimizer's state has been filled, where the table is."""
        device = self._table(storage).device
        return storage not in self._unfilled and all(state.device == device for state in self._state(storage).values())

    # -- the optimizer, as users see it ---------------------------------------------------------------------------

    @property
    def _current_lr(self) -> float:
        return self._lr

    @property
    def lr(self) -> float:
        """Learning rate of the fused optimizer; set it to follow a schedule.

        Until it is set, tables that step in backward follow the schedule of a torch optimizer that was given them: they
        scale it by the part of its start or peak that the schedule is at. At ``step()`` it is that of the param group.
        """
        return self._current_lr

    @lr.setter
    def lr(self, value: float) -> None:
        if self.optimizer is None:
            raise ConfigError("this collection has no fused optimizer; its learning rate is that of your optimizer")
        if not is_rate(value):
            raise ConfigError(f"`lr` must be a finite number >= 0; got {value!r}")
        if not self._in_backward:
            raise ConfigError("an optimizer of torch steps this collection: set `lr` in its param_groups")
        self._lr, self._sets_lr = float(value), True

    @property
    def _rule(self) -> str:
        """The update rule without what a resumed run may change: learning rate and precision of the state."""
        return repr(replace(self.optimizer, lr=0.0, state_precision="fp32")) if self.optimizer else "None"

    def optimizer_state_dict(self) -> JSON:
        """State of the fused optimizer: tensors by storage and name, step counts, learning rate, and its rule."""
        self.catch_up_()
        return {
            "rule": self._rule,
            "lr": self.lr,
            "sets_lr": self._sets_lr,
            "steps": {name: log.step for name, log in self._step_logs.items()},
            "state": {key: state.detach() for key, state in self._all_states().items()},
        }

    def load_optimizer_state_dict(self, saved: JSON) -> None:
        """Inverse of :meth:`optimizer_state_dict`.

        Raises:
            CheckpointError: the state is of another rule, or its tensors are missing or of another shape.
        """
        have = self._all_states()
        check_state(saved, self._rule, self.optimizer, have, self.storages)
        # Missed steps belong to the weights that there are.
        self.catch_up_()
        for storage, key in self._states():
            name = f"{storage}_{key}"
            copy_state(cast("FusedOptimizer", self.optimizer), key, have[name], saved["state"][name])
        self._expects_state = False
        self._lr = float(saved["lr"])
        # States of earlier versions do not say it: their rate was a schedule's only where somebody set it.
        self._sets_lr = bool(saved.get("sets_lr", self._sets_lr))
        self._count_steps(saved["steps"])
