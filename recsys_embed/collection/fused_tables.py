"""Tables whose fused optimizer steps in backward, or at ``step()`` of a torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from recsys_embed.collection import lost_gradients
from recsys_embed.collection.backward_steps import (
    BackwardSteps,
    LookupRecord,
    refuse_parts,
)
from recsys_embed.collection.optimizer_watch import Backwards, watch
from recsys_embed.collection.schedules import Schedules
from recsys_embed.collection.tables_of_an_optimizer import TablesOfAnOptimizer, nobody
from recsys_embed.core.row_format import RowFormat
from recsys_embed.errors import ConfigError
from recsys_embed.kernels import pointers
from recsys_embed.kernels.fused_gather import apply_update
from recsys_embed.kernels.gather_ops import gather
from recsys_embed.kernels.native.autograd import NativeStep
from recsys_embed.kernels.native.handles import handle_of
from recsys_embed.kernels.native.lookup import Ids, NativeLookup
from recsys_embed.kernels.recording import refuse_scripting
from recsys_embed.optim import FusedOptimizer, FusedTableOptimizer, RowGradient, fused_optimizer
from recsys_embed.optim.replicas import inside_fsdp
from recsys_embed.utils.dynamo import uncompiled
from recsys_embed.utils.types import JSON

# What copies and pickles start anew.
_LEFT_BEHIND = (
    "_backward_steps", "_replicas", "_torch_optimizer", "_dense", "_schedules", "_looked", "_handle", "_compiled_at",
    "_compiled_lookups", "_passed_over", "_told_of_given", "_have_dense_gradients",
    "warned", "_told_of_eval", "_read_in_eval",
)  # fmt: skip


def _part_of_step(rows: Tensor, grad: Tensor, table: Tensor) -> RowGradient:
    """Gradients that are summed into one step, in float32 at least, as :func:`apply_update` sums those of a lookup."""
    return RowGradient(rows, grad.to(torch.promote_types(table.dtype, torch.float32)), table.shape[0])


class FusedTables(TablesOfAnOptimizer):
    """Tables whose fused optimizer steps in backward, or at ``step()`` of a torch optimizer.

    It steps in backward until :func:`recsys_embed.optim.fused_optimizer` makes a torch optimizer of it, whose
    ``step()`` then does; backward leaves a :class:`recsys_embed.optim.RowGradient` in ``.grad`` of each storage.

    Attributes:
        constant_in_eval: where the optimizer steps in backward, lookups in ``eval()`` give the tables no gradients.
        check_finite: steps first look whether all gradients are finite, and raise a ConfigError if not.
    """

    __prepare_scriptable__ = refuse_scripting

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
        super().__init__(shapes, optimizer, device, dtype, backend, formats, seed)
        self.check_finite = False
        self._start_watching()

    def _start_watching(self) -> None:
        self._start_alone()
        self._handle = handle_of(self)
        self._backward_steps = BackwardSteps(self._apply_collected)
        self._schedules, self._looked = Schedules(self.__dict__["_owned"]), False
        # Where tables and state lay when a compiled model last looked them up.
        self._compiled_at: list[int] = []
        # Compiled lookups since the last step: the gradients of several wait for the end of their backward.
        self._compiled_lookups = 0
        self.warned = self._told_of_eval = False
        # The backwards before the last lookup in eval(), until an optimizer steps.
        self._read_in_eval: int | None = None
        if self.optimizer is not None:
            watch(self)
            lost_gradients.refuse_outside_lookups(self, self.__dict__["_owned"])

    def __getstate__(self) -> JSON:
        return {k: v for k, v in self.__dict__.items() if k not in _LEFT_BEHIND}

    def __setstate__(self, state: JSON) -> None:
        super().__setstate__(state)
        self._start_watching()

    # -- steps ----------------------------------------------------------------------------------------------------

    @property
    def _stepping(self) -> bool:
        """Whether a backward of what is looked up now steps the optimizer, or leaves gradients for ``step()``."""
        if self.optimizer is None or not torch.is_grad_enabled() or not (self.training or not self._in_backward):
            return False
        if not self._looked and self._in_backward and not torch.compiler.is_compiling():
            # Before this lookup holds the tables, too.
            self._looked = True
            self._schedules.find_optimizers()
        tables = self._weights()
        if not any(t.requires_grad for t in tables):
            return False
        if torch.compiler.is_compiling():
            return not torch.compiler.is_exporting()
        if not self._owns_its_tables:
            # Others' tensors get ordinary gradients, as `torch.func.functional_call` expects.
            if any(isinstance(t, nn.Parameter) for t in tables) or inside_fsdp():
                raise ConfigError(
                    "the tables of this collection are not its own parameters (FSDP, or functional_call with "
                    "parameters of another model), so that its fused optimizer cannot step them; leave the collection "
                    "out (FSDP: ignored_params=set(collection.parameters()), and fused_optimizer(model, "
                    "process_group=...)), or build it with optimizer=None"
                )
            return False
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        self.before_lookup()
        return True

    def before_compiled_gather(self) -> None:
        """As :meth:`before_lookup`, of a compiled model that reads one storage by torch's operations."""
        self.before_lookup()
        lost_gradients.refuse_hooks(self._weights(), self._in_backward)

    def before_compiled_lookup(self) -> None:
        """As :meth:`before_lookup`, of a compiled model."""
        self.before_compiled_gather()
        self._backward_steps.begin_compiled()
        self._compiled_at = self._in_memory()
        self._compiled_lookups += 1

    def _in_memory(self) -> list[int]:
        """Where the tables and the optimizer's state lie."""
        return [pointers.memory_of(t) for t in (*self._weights(), *self._all_states().values())]

    @property
    def _constant(self) -> bool:
        """Whether lookups take its own tables for constants: in ``eval()``, where the optimizer steps in backward."""
        if self.optimizer is None or not self._in_backward or self.training or not torch.is_grad_enabled():
            return False
        if not self.constant_in_eval:
            return False
        if torch.compiler.is_compiling():
            return True
        self._read_in_eval = self._backward_steps.count.so_far
        return self._owns_its_tables

    def _record(self, deferred: bool) -> LookupRecord | None:
        """Of a lookup whose backward steps the optimizer."""
        if not self._in_backward or torch.compiler.is_compiling():
            return None
        if self._expects_state:
            self._expects_state = False
            warnings.warn(
                "the weights were loaded from a state dict without the state of the fused optimizer, which starts "
                "anew: a torch optimizer (recsys_embed.optim.fused_optimizer) or an earlier version has saved it "
                "apart; load it into that optimizer, or by load_optimizer_state_dict",
                stacklevel=4,
            )
        lost_gradients.refuse_hooks(self._weights(), in_backward=True)
        return self._backward_steps.begin(deferred)

    @property
    def steps_in_backward(self) -> bool:
        """Whether backward steps the fused optimizer, rather than leave that to ``step()`` of a torch optimizer."""
        return self._in_backward

    def backwards_before(self, optimizer: torch.optim.Optimizer) -> Backwards | None:
        """Backwards that stepped the tables before a step of an optimizer of torch, which begins or ends."""
        return self._backward_steps.count.before_step(optimizer)

    def gradients_changed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether others have changed an optimizer's gradients since the backward that stepped the tables; once."""
        count = self._backward_steps.count
        changed = self._in_backward and count.changed_since_backward(optimizer)
        count.changes_are_known |= changed
        return changed

    def expect_changed_gradients(self) -> None:
        """Do not warn that gradients of other parameters are changed between backward and step: it is meant so."""
        self._backward_steps.count.changes_are_known = True

    def after_step_of(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of an optimizer of torch has ended."""
        self._backward_steps.count.after_step(optimizer)
        self._note_step()

    def _tell_of_eval(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of an optimizer begins: say once where it was given the tables and they are not trained in eval()."""
        read, self._read_in_eval = self._read_in_eval, None
        if read is None or self._told_of_eval or read != self._backward_steps.count.so_far:
            return
        if self._schedules.are_of(optimizer) and any(log.step for log in self._step_logs.values()):
            self._told_of_eval = True
            warnings.warn(
                "lookups in eval() do not train tables that step in backward; to train them in eval mode call train() "
                "of their collection after model.eval(); to evaluate, use torch.no_grad()",
                stacklevel=5,
            )

    def find_schedules(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of torch was given parameters: the next lookup follows its schedule, if they are the tables."""
        if self._looked and self._in_backward and self._schedules.are_of(optimizer):
            self._looked = False

    def follow_schedule_of(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of an optimizer of torch begins: its schedule is followed, if it was given the tables."""
        if self._in_backward:
            if self._read_in_eval is not None:
                self._tell_of_eval(optimizer)
            self._schedules.follow(optimizer)
            self._backward_steps.count.step_begins(optimizer)

    @property
    def _rate(self) -> float:
        """Learning rate of the next step: in backward, by the schedule of an optimizer that was given the tables."""
        return self._lr * self._schedules.factor() if self._in_backward and not self._sets_lr else self._lr

    def _check_owned(self, tables: Sequence[Tensor], storages: Sequence[str], gradient: Tensor) -> None:
        """Refuse a backward whose tables are no longer those of the lookup, or of another type than its gradients."""
        if not all(t is self._parameters.get(name) for t, name in zip(tables, storages, strict=True)):
            raise ConfigError(
                "the tables have been replaced between a lookup and its backward (load_state_dict(assign=True), or a "
                "new Parameter); look up again"
            )
        for table, name in zip(tables, storages, strict=True):
            if table.dtype is not gradient.dtype or table.device != gradient.device:
                pointers.check(pointers.faults(table, (gradient.dtype,), 0, f"table {name!r}", device=gradient.device))
            if table.requires_grad:
                refuse_parts(table)

    @uncompiled
    @torch.no_grad()
    def _update(self, storage: str, record: LookupRecord, weight: Tensor, rows: Tensor, grad: Tensor) -> None:
        """What a gather by torch's operations does in backward."""
        if self.optimizer is None or not weight.requires_grad:  # frozen since the lookup
            return
        self._check_owned([weight], [storage], grad)
        self._check_finite([grad])
        if self._backward_steps.collects(record, [f"gather of {storage}"]):
            self._backward_steps.collect({storage: _part_of_step(rows, grad, weight)})
            return
        with self._lock:
            self._refuse_writes()
            log, kernels = self._step_logs[storage], self.backend in ("native", "triton")
            log.advance(self.optimizer, self._rate)
            with self._step_or_none([storage]):
                apply_update(self.optimizer, weight, self._state(storage), rows, grad, log, kernels)
            self._note_writes()

    @torch.no_grad()
    def step_rows(self, storage: str, rows: Tensor, grad: Tensor, table: Tensor, states: Sequence[Tensor]) -> None:
        """What a compiled gather does in backward: its gradients are part of a step, or are left for ``step()``."""
        self._forget_writes()
        own = self._parameters[storage]
        if own is None or not own.requires_grad:  # frozen since the lookup
            return
        gradient = _part_of_step(rows, grad, table) if self._in_backward else RowGradient(rows, grad, table.shape[0])
        self._leave({storage: gradient})

    def _leave(self, gradients: Mapping[str, Tensor | None]) -> None:
        if self._in_backward:
            self._backward_steps.collect(gradients)
            return
        for name, gradient in gradients.items():
            weight = self._parameters[name]
            if gradient is not None and weight is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        if self._replicas is not None:
            self._replicas.after_gradient()

    def catch_up_rows(self, storage: str, rows: Tensor, table: Tensor, states: Sequence[Tensor]) -> None:
        """What a compiled gather does first: apply the steps missed by rows of ``table``; -1 is no row."""
        with self._by_compiled_code():
            self._replay(storage, rows, table, dict(zip(self._keys, states, strict=True)))

    def _compiled_gather(self, storage: str, rows: Tensor, partial_rows: bool) -> Tensor:
        states = list(self._state(storage).values())
        lazy = self.optimizer is not None and self.optimizer.lazy
        return gather(rows, self._table(storage), states, partial_rows, storage, self._handle, lazy)

    @torch.no_grad()
    def _apply_collected(self, collected: Mapping[str, Tensor]) -> None:
        """Step the optimizer by the gradients of all lookups of a backward."""
        self._compiled_lookups = 0
        with self._lock:
            self._refuse_writes()
            for name in self.storages:
                if name in collected:
                    self._step_rows(name, collected[name])
            self._note_writes()

    def _native_step(self, record: LookupRecord | None, collects: bool) -> NativeStep:
        """What kernels do for a lookup, before it and in its backward."""
        states = list(self._all_states().values())
        lazy = self.optimizer is not None and self.optimizer.lazy
        update = None if record is None else partial(self._update_native, record)
        return NativeStep(self._catch_up_native, update, states, self._handle, lazy, collects)

    # Torch's compiler also compiles what a backward calls in a function that it compiles, such as a whole train step.
    @uncompiled
    @torch.no_grad()
    def _update_native(
        self,
        record: LookupRecord,
        lookup: NativeLookup,
        ids: Ids,
        tables: Sequence[Tensor],
        grads: Sequence[Tensor],
        kept: Tensor | None,
    ) -> None:
        """What a lookup by kernels does in backward."""
        self._check_owned(tables, self.storages, grads[0])
        self._check_finite(grads)
        trained = [name for name, t in zip(self.storages, tables, strict=True) if t.requires_grad]
        # Of the calls of one lookup, which read different rows, the first one counts the step.
        counts = not record.stepped
        if self._backward_steps.collects(record, [f"{id(lookup)}: {name}" for name in trained]):
            wanted = [t.requires_grad for t in tables]
            found = lookup.gradients(ids, tables, grads, kept, "rows", wanted)
            self._backward_steps.collect(dict(zip(self.storages, found, strict=True)))
        else:
            states = list(self._all_states().values())
            self._step_native(lookup, ids, tables, states, grads, kept, trained, counts)

    def _step_native(
        self,
        lookup: NativeLookup,
        ids: Ids,
        tables: Sequence[Tensor],
        states: Sequence[Tensor],
        grads: Sequence[Tensor],
        kept: Tensor | None,
        trained: Sequence[str],
        counts: bool = True,
    ) -> None:
        """Step the rows that a lookup read; ``counts``: as a new step, or as a part of the last one."""
        if self.optimizer is None:
            return
        with self._lock:
            self._refuse_writes()
            for name in trained if counts else ():
                self._step_logs[name].advance(self.optimizer, self._rate)
            frozen = [i for i, name in enumerate(self.storages) if name not in trained]
            logs, by_storage = self._all_step_logs, self._by_storage(states)
            with self._step_or_none(trained if counts else ()):
                lookup.update(ids, tables, grads, kept, self.optimizer, by_storage, logs, frozen)
            self._note_writes()

    @torch.no_grad()
    def step_native(
        self,
        lookup: NativeLookup,
        ids: Ids,
        tables: Sequence[Tensor],
        states: Sequence[Tensor],
        grads: Sequence[Tensor],
        kept: Tensor | None,
        collects: bool,
    ) -> None:
        """What a compiled lookup does in backward, given the tables and the flat list of their ``states``."""
        own = self._weights()
        # A compiled program brings copies of what it read, and writes them back to where that was.
        if self._compiled_at != self._in_memory():
            raise ConfigError(
                "tables or optimizer state have been replaced between a compiled lookup and its backward; look up again"
            )
        if self._in_backward:
            self._backward_steps.check_compiled()
        wanted = [t.requires_grad for t in own]
        # Gradients of several lookups wait for each other, as those of uncompiled ones do.
        if self._in_backward and not (collects or self._compiled_lookups > 1 or self._backward_steps.watched):
            self._compiled_lookups = 0
            self._backward_steps.stepped_by_compiled_code()
            trained = [name for name, want in zip(self.storages, wanted, strict=True) if want]
            with self._by_compiled_code():
                self._step_native(lookup, ids, tables, states, grads, kept, trained)
            return
        self._forget_writes()  # compiled code writes the tables back, whatever happens here
        found = lookup.gradients(ids, tables, grads, kept, "rows", wanted)
        self._leave(dict(zip(self.storages, found, strict=True)))

    def make_optimizer(self, dense: torch.optim.Optimizer | None = None) -> FusedTableOptimizer:
        """A torch optimizer of this collection alone, see :func:`recsys_embed.optim.fused_optimizer`.

        >>> from recsys_embed import EmbeddingCollection, FeatureSpec, RowwiseAdagrad, Schema
        >>> coll = EmbeddingCollection(Schema([FeatureSpec("C1", 10, 4)]), optimizer=RowwiseAdagrad(lr=0.1))
        >>> optimizer = coll.make_optimizer()
        >>> coll(torch.tensor([[3]])).sum().backward()
        >>> coll.width4.grad.rows
        tensor([3])
        >>> optimizer.step()
        """
        return fused_optimizer(self, dense)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for weight in self._weights():
            if isinstance(weight.grad, RowGradient):
                # Computed by the tables as they are, then converted with them.
                _ = weight.grad.rows
        return super()._apply(fn, recurse)

    def _own_parameters(self) -> None:
        before = self.__dict__.get("_owned", ())
        super()._own_parameters()
        tables = self.__dict__["_owned"]
        new = [t for t in tables if not any(t is known for known in before)] if before else []
        if new:
            lost_gradients.refuse_outside_lookups(self, new if self.optimizer is not None else [])
            # Other optimizers were given these, or will be.
            self._schedules, self._looked = Schedules(tables), False
        optimizer = self.__dict__.get("_torch_optimizer", nobody)()
        if isinstance(optimizer, FusedTableOptimizer):
            optimizer.adopt_parameters()
