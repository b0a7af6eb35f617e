"""Replicas of tables whose fused optimizer steps at ``step()``: each backward ends with the mean of their gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from recsys_embed.core.hashing import as_signed
from recsys_embed.errors import ConfigError
from recsys_embed.optim.row_gradient import RowGradient
from recsys_embed.utils.ddp_reducer import rebuild_reducer
from recsys_embed.utils.dynamo import in_compiled_autograd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel


class ReplicatedTables(Protocol):
    """Tables of one module."""

    storages: tuple[str, ...]
    _parameters: dict[str, nn.Parameter | None]
    _buffers: dict[str, Tensor | None]

    def catch_up_(self) -> object: ...
    def steps_taken(self, steps: Mapping[str, int] | None = None) -> dict[str, int]: ...


class _Exchange:
    """Tables that one group of processes holds replicas of, and the exchange of their gradients.

    Args:
        tables: in the same order in every process.
        always: at the end of every backward, rather than of the one after :meth:`begin_forward`.
    """

    def __init__(self, tables: Sequence[ReplicatedTables], group: ProcessGroup, always: bool) -> None:
        self._tables, self._group, self._always = tables, group, always
        self._expected = always
        self._waiting_in = -1
        for table in tables:
            for name in table.storages:
                weight = table._parameters[name]
                if weight is not None:
                    weight.register_post_accumulate_grad_hook(self.after_gradient)

    @torch.no_grad()
    def copy_first(self) -> None:
        """Make tables, states and numbers of steps those of the first process."""
        from torch import distributed

        first = distributed.get_global_rank(self._group, 0)
        for table in self._tables:
            table.catch_up_()
            held: list[Tensor | None] = [table._parameters[name] for name in table.storages]
            held += [b for name, b in table._buffers.items() if name.startswith(table.storages)]
            for tensor in held:
                if tensor is not None:
                    distributed.broadcast(tensor.detach(), first, self._group)
                    if hasattr(tensor, "seed"):  # by which replicas of few bits have to be rounded alike
                        seed = torch.tensor(as_signed(tensor.seed), device=tensor.device)
                        distributed.broadcast(seed, first, self._group)
                        tensor.seed = int(seed)
            steps = torch.tensor(list(table.steps_taken().values()), device=_device(table))
            distributed.broadcast(steps, first, self._group)
            table.steps_taken(dict(zip(table.storages, steps.tolist(), strict=True)))

    def begin_forward(self, sync: bool) -> None:
        """A forward of all replicas begins, whose backward ends with an exchange, or does not (``no_sync``)."""
        self._expected = self._always or sync

    def after_gradient(self, _: object = None) -> None:
        """In a backward: the exchange follows when it ends."""
        task = torch._C._current_graph_task_id()
        if self._expected and in_compiled_autograd():
            raise ConfigError(
                "compiled autograd runs this backward, and leaves out the exchange of the tables' gradients with other "
                "processes at its end; set torch._dynamo.config.compiled_autograd = False"
            )
        if self._expected and task != self._waiting_in:
            self._waiting_in = task
            torch.autograd.Variable._execution_engine.queue_callback(self._exchange)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Put the mean of all replicas' gradients in the place of each one's own."""
        from torch import distributed

        self._waiting_in, self._expected = -1, self._always
        held = [(t, n) for t in self._tables for n in t.storages]
        weights = [w for t, n in held if (w := t._parameters[n]) is not None and w.requires_grad]
        if not weights:
            return
        mine = torch.tensor([_rows(w.grad) for w in weights], device=weights[0].device)
        every = [torch.empty_like(mine) for _ in range(self._group.size())]
        distributed.all_gather(every, mine, group=self._group)
        for weight, *counts in zip(weights, *(t.tolist() for t in every), strict=True):
            if _DENSE in counts:
                dense = weight.grad.to_dense() if weight.grad is not None else torch.zeros_like(weight)
                distributed.all_reduce(dense, group=self._group)
                weight.grad = dense.div_(len(counts))
            elif any(n != _NONE for n in counts):
                weight.grad = _mean(weight, [max(n, 0) for n in counts], self._group)


_DENSE, _NONE = -1, -2


def _rows(grad: Tensor | None) -> int:
    """Of a table's gradient; ``_DENSE`` and ``_NONE`` where it has none of its own."""
    if grad is None:
        return _NONE
    return len(grad.coalesce().rows) if isinstance(grad, RowGradient) else _DENSE


def _device(table: ReplicatedTables) -> torch.device:
    return cast("nn.Parameter", table._parameters[table.storages[0]]).device


def _mean(weight: Tensor, counts: Sequence[int], group: ProcessGroup) -> RowGradient:
    """Of the gradients of all replicas, by row: the same bits in each."""
    grad = weight.grad
    if isinstance(grad, RowGradient):
        rows, values = grad.rows, grad.values
    else:
        rows = torch.empty(0, dtype=torch.int64, device=weight.device)
        values = weight.new_empty(0, weight.shape[1])
    all_rows, all_values = _gathered(rows, counts, group), _gathered(values, counts, group)
    out = RowGradient(all_rows, all_values, weight.shape[0]).coalesce()
    out.values.div_(len(counts))
    return out


def _gathered(part: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """The parts of all replicas, of ``counts`` rows each."""
    from torch import distributed

    padded = part.new_zeros(max(counts), *part.shape[1:])
    padded[: len(part)] = part
    out = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(out, padded, group=group)
    return torch.cat([whole[:n] for whole, n in zip(out, counts, strict=True)])


class Replicas:
    """Replicas of the tables of one optimizer: they exchange rows, in place of DistributedDataParallel's dense buckets.

    Args:
        model: any, with or without DistributedDataParallel around it.
        tables: those of ``model``, by path.
        group: of processes that are replicas, whatever stands around the lookups.
    """

    def __init__(self, model: nn.Module, tables: Mapping[str, ReplicatedTables], group: ProcessGroup | None) -> None:
        self._tables = list(tables.values())
        self._by_replica: WeakKeyDictionary[DistributedDataParallel, _Exchange] = WeakKeyDictionary()
        self._given: _Exchange | None = None
        self._hooked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        leave_to_rows(model, tables)
        if group is not None:
            if group.size() > 1:
                self._given = _Exchange(self._tables, group, always=True)
                self._given.copy_first()
                self._hook(model)
        elif torch.distributed.is_available() and torch.distributed.is_initialized():
            self._hook(model)

    def _hook(self, model: nn.Module) -> None:
        """Take part in an exchange also where a process reads none of the tables in a step."""
        inner = getattr(model, "module", None)
        model = inner if isinstance(inner, nn.Module) and _is_replica(model) else model
        if model not in self._hooked:
            self._hooked[model] = True
            model.register_forward_pre_hook(_Hook(self, Replicas._before_forward))
            model.register_forward_hook(_Hook(self, Replicas._after_forward))

    def before_lookup(self) -> None:
        """Before a lookup with gradients: whether its backward is one that replicas share."""
        replica = active_replica()
        if replica is None:
            if self._given is None:
                refuse_sharding()
            return
        if replica not in self._by_replica:
            inside = {id(m) for m in replica.module.modules()}
            exchange = _Exchange([t for t in self._tables if id(t) in inside], replica.process_group, always=False)
            self._by_replica[replica] = exchange
            _leave_buckets(replica, exchange._tables)
            exchange.copy_first()
            self._hook(replica.module)
        self._by_replica[replica].begin_forward(bool(replica.require_backward_grad_sync))

    def after_gradient(self) -> None:
        """Compiled code left a gradient."""
        for exchange in self._exchanges():
            exchange.after_gradient()

    def _exchanges(self) -> list[_Exchange]:
        return list(self._by_replica.values()) if self._given is None else [self._given]

    def _before_forward(self, model: nn.Module, args: object) -> None:
        if torch.is_grad_enabled() and active_replica() is not None:
            self.before_lookup()

    def _after_forward(self, model: nn.Module, args: object, output: object) -> None:
        replica = active_replica()
        exchange = self._given if replica is None else self._by_replica.get(replica)
        if exchange is not None and torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(exchange.after_gradient)


class _Hook:
    """A hook of a model; a copy of the model has no replicas."""

    def __init__(self, replicas: Replicas | None = None, function: Callable[..., None] | None = None) -> None:
        self._replicas = ref(replicas) if replicas is not None else None
        self._function = function

    def __call__(self, *args: object) -> None:
        if torch.compiler.is_compiling() or self._replicas is None or self._function is None:
            return
        replicas = self._replicas()
        if replicas is not None:
            self._function(replicas, *args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _tensors(output: object) -> Iterator[Tensor]:
    """All tensors of what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif hasattr(output, "__dataclass_fields__"):
        yield from _tensors(list(vars(output).values()))


# -- DistributedDataParallel and FSDP ------------------------------------------------------------------------------


def active_replica() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running, of more than one process; or None."""
    module = sys.modules.get("torch.nn.parallel.distributed")
    found: DistributedDataParallel | None = (
        None if module is None else module.DistributedDataParallel._active_ddp_module
    )
    return found if found is not None and found.process_group.size() > 1 else None


def _is_replica(model: nn.Module) -> bool:
    module = sys.modules.get("torch.nn.parallel.distributed")
    return module is not None and isinstance(model, module.DistributedDataParallel)


def inside_fsdp() -> bool:
    """Whether the forward that is running is one of FSDP, over more than one process."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return False
    kinds = (module.FullyShardedDataParallel, module.FSDPModule)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_code.co_varnames and isinstance(frame.f_locals.get("self"), kinds):
            return True
        frame = frame.f_back
    return False


def refuse_sharding() -> None:
    """Refuse lookups inside FSDP, which sees no gradient of tables that it ignores: each process would train its own.

    Raises:
        ConfigError: says so.
    """
    if inside_fsdp():
        raise ConfigError(
            "FSDP around these tables does not see their gradients, and each process would train tables of its own; "
            "pass fused_optimizer(model, dense_optimizer, process_group=torch.distributed.group.WORLD)"
        )


def leave_to_rows(model: nn.Module, tables: Mapping[str, ReplicatedTables]) -> None:
    """Let DistributedDataParallel leave the tables and their optimizer's state to the rows that replicas exchange."""
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        names = {
            f"{inner[len(start) :]}.{name}".lstrip(".")
            for inner, found in tables.items()
            if inner == path or inner.startswith(start)
            for name in (*found.storages, *(b for b in found._buffers if b.startswith(found.storages)))
        }
        if names:
            ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
            module._ddp_params_and_buffers_to_ignore = cast("Any", sorted(ignored | names))


def _leave_buckets(replica: DistributedDataParallel, tables: Sequence[ReplicatedTables]) -> None:
    """Take tables out of DistributedDataParallel's buckets, where it was made before the optimizer."""
    own = {id(t._parameters[name]) for t in tables for name in t.storages}
    if not any(id(p) in own for p in replica._module_parameters):
        return
    ids = {id(t) for t in tables}
    leave_to_rows(replica.module, {n: cast("Any", m) for n, m in replica.module.named_modules() if id(m) in ids})
    replica.parameters_to_ignore |= set(replica.module._ddp_params_and_buffers_to_ignore)
    named = replica.module.named_parameters()
    replica._module_parameters = [p for n, p in named if n not in replica.parameters_to_ignore]
    if not any(p.requires_grad for p in replica._module_parameters):
        raise ConfigError(
            "DistributedDataParallel has nothing to do for a model of fused tables alone; leave it out and pass "
            "fused_optimizer(model, process_group=torch.distributed.group.WORLD)"
        )
    rebuild_reducer(replica)
