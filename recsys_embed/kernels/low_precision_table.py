"""Tables that train in few bits: float32 tensors to torch, whose rows are stored as their format says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys_embed.core.row_format import RowFormat
from recsys_embed.core.stochastic_rounding import random_words
from recsys_embed.errors import ConfigError
from recsys_embed.kernels.collectives import check_collective
from recsys_embed.kernels.low_precision_writes import store_result
from recsys_embed.kernels.pointers import checked_address
from recsys_embed.optim.wrapper_tensor import WrapperTensor

aten = torch.ops.aten
_CHUNK = 1 << 20  # elements that are decoded at once


@dataclass
class Writes:
    """Writes of torch optimizers so far, which number their random bits; a table shares it with its views."""

    count: int = 0


class LowPrecisionTable(WrapperTensor):
    """A table ``[rows, width]`` of float32 values whose rows are stored in a :class:`RowFormat`.

    Lookups decode the rows that they read. Fused update rules step rows in float32 and write them back by stochastic
    rounding, or unrounded where the format keeps float32 rows and rounds what is read. For any other operation of torch
    it is the decoded table: a copy, which takes 4 bytes per element for as long as it lives. What is assigned, copied,
    scattered or drawn into it is rounded to nearest; other operations in place, such as the step of a torch optimizer,
    round as fused rules do. Steps that rows learn are stepped with them, too, except by averages and changes of scale:
    ``lerp_``, and ``mul_`` and ``div_`` that change an element by more than a tenth, find steps for the new rows.

    Args:
        stored: ``[rows, items]`` of the format's dtype.
        format: of the rows.
        width: columns.
        seed: of the random bits.
        writes: of the table of which this is a view; by default none so far.

    >>> table = LowPrecisionTable.empty(100, 16, RowFormat("int8", 2.0**-7), torch.device("cpu"), seed=0)
    >>> _ = table.fill_(0.3)
    >>> table.shape, table.dtype, table.stored.nbytes, float(table[:2].sum()) / 32
    (torch.Size([100, 16]), torch.float32, 1600, 0.296875)
    """

    _held_in = "the rows in `stored`"
    stored: Tensor
    format: RowFormat
    seed: int
    writes: Writes
    # Read from a state dict: a table into which it is copied takes over its format, too.
    saved: bool = False

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, stored: Tensor, format: RowFormat, width: int, seed: int, writes: Writes | None = None
    ) -> LowPrecisionTable:
        return cast("LowPrecisionTable", cls._without_storage((len(stored), width), torch.float32, stored.device))

    def __init__(self, stored: Tensor, format: RowFormat, width: int, seed: int, writes: Writes | None = None) -> None:
        if stored.shape[1] != format.items(width) or stored.dtype is not format.dtype:
            raise ConfigError(
                f"rows of width {width} at {format.kind} are stored as {format.dtype} [rows, {format.items(width)}]; "
                f"got {stored.dtype} {list(stored.shape)}"
            )
        self.stored, self.format, self.seed, self.writes = stored, format, seed, writes or Writes()

    @classmethod
    def empty(cls, rows: int, width: int, format: RowFormat, device: torch.device, seed: int) -> LowPrecisionTable:
        """A table whose rows nothing has filled."""
        return cls(torch.empty(rows, format.items(width), dtype=format.dtype, device=device), format, width, seed)

    def view_of(self, stored: Tensor) -> LowPrecisionTable:
        """A table of rows that are stored in this one."""
        return LowPrecisionTable(stored, self.format, self.shape[1], self.seed, self.writes)

    def like(self, stored: Tensor) -> LowPrecisionTable:
        """A table of other stored rows, which counts on from the writes of this one."""
        return LowPrecisionTable(stored, self.format, self.shape[1], self.seed, Writes(self.writes.count))

    # A property, because torch would keep what it is given in a place that nothing reads.
    @property
    def data(self) -> Tensor:
        """The table without its history; what is assigned to it is stored, rounded to nearest."""
        return cast("Tensor", cast("Any", Tensor).data.__get__(self))

    @data.setter
    def data(self, values: Tensor) -> None:
        if values.shape != self.shape or values.device != self.device:
            raise ConfigError(
                f"`data` of a low-precision table {list(self.shape)} on {self.device} takes values of its shape and "
                f"device; got {list(values.shape)} on {values.device}: write values by `weight.copy_()`, and move the "
                "module by `to()`"
            )
        with torch.no_grad():
            _copy_(self, values.detach())

    # -- state dicts ------------------------------------------------------------------------------------------------

    def to_save(self) -> Tensor:
        """The stored rows as a state dict has them: codes as ``[rows, 1, items]``, a shape that no plain table has."""
        return self.stored.unsqueeze(1) if self.format.bits else self.stored

    def as_table(self, saved: Tensor, numbers: Mapping[str, str], assign: bool) -> Tensor:
        """What a state dict holds of such a table: stored rows as a table, or other numbers as they are.

        Args:
            numbers: what the state dict says of the stored rows; earlier versions said nothing.
            assign: the table takes this one's place, rather than copy it.
        """
        if isinstance(saved, LowPrecisionTable):
            return saved
        rows = saved.squeeze(1) if saved.dim() == 3 and saved.shape[1] == 1 else saved
        if rows.dtype is self.format.dtype and rows.dim() == 2 and rows.shape[1] == self.stored.shape[1]:
            distance = float(numbers.get("code_distance", self.format.step))
            writes = Writes(int(numbers.get("writes", self.writes.count)))
            table = LowPrecisionTable(rows, replace(self.format, step=distance), self.shape[1], self.seed, writes)
            table.saved = not assign
            return table
        if not assign or saved.shape != self.shape or not saved.is_floating_point():
            return saved
        return self.encoded(saved)

    def encoded(self, values: Tensor) -> LowPrecisionTable:
        """A table of the same format that holds other ``values [rows, width]``, where these are."""
        table = self.like(torch.empty_like(self.stored, device=values.device))
        table.fill_from(lambda start, count: values.detach()[start : start + count])
        return table

    def parameter(self, requires_grad: bool = True) -> nn.Parameter:
        """The table as a parameter of a module."""
        return nn.Parameter(self, requires_grad)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that are held."""
        return self.stored.nbytes

    # -- rows -----------------------------------------------------------------------------------------------------

    def read(self, rows: Tensor) -> Tensor:
        """Values of int64 ``rows [n]``: float32 ``[n, width]``."""
        return self.format.decode(self.stored.index_select(0, rows), self.shape[1])

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """First row and stored rows of pieces whose values take bounded memory."""
        size = max(1, _CHUNK // self.shape[1])
        for start in range(0, len(self.stored), size):
            yield start, self.stored[start : start + size]

    def rows(self, start: int, stop: int) -> Tensor:
        """Values of rows ``[start, stop)``: float32, a copy."""
        return self.format.decode(self.stored[start:stop], self.shape[1])

    def unrounded_rows(self, start: int, stop: int) -> Tensor:
        """What an optimizer steps of rows ``[start, stop)``: float32, a copy."""
        return self.format.unrounded(self.stored[start:stop], self.shape[1])

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """The values: float32 ``[rows, width]``."""
        return self._decoded(self.format.decode, dtype)

    def all_unrounded(self) -> Tensor:
        """What an optimizer steps: float32 ``[rows, width]``."""
        return self._decoded(self.format.unrounded)

    def _decoded(self, decode: Callable[[Tensor, int], Tensor], dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype or torch.float32, device=self.device)
        for start, stored in self.pieces():
            out[start : start + len(stored)] = decode(stored, self.shape[1])
        return out

    def distances(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Distance of two codes in each of rows ``[start, stop)``: float32 ``[n, 1]``; 0 for floats."""
        stored = self.stored[start:stop]
        if self.format.learns:
            return self.format.steps_of(stored)
        return torch.full((len(stored), 1), self.format.step, device=self.device)

    # -- steps ----------------------------------------------------------------------------------------------------

    def unrounded(self, rows: Tensor) -> Tensor:
        """What an optimizer steps of int64 ``rows [n]``: float32 ``[n, width]``."""
        return self.format.unrounded(self.stored.index_select(0, rows), self.shape[1])

    def _words(self, rows: Tensor, step: int) -> Tensor | None:
        """Random bits of rows, and of their steps where they learn, in a step of the optimizer."""
        if not self.format.stochastic or self.format.has_master:
            return None
        return random_words(rows, self.shape[1] + self.format.learns, self.seed, step)

    def after_step(self, rows: Tensor, values: Tensor, step: int) -> Tensor:
        """What an optimizer steps next ``[n, width]``, once a step without a gradient has made ``values``."""
        if self.format.has_master:
            return values
        stored, words = self.stored.index_select(0, rows), self._words(rows, step)
        words = None if words is None else words[:, : self.shape[1]]
        return self.format.decode(self.format.put_back(stored, values, words), self.shape[1])

    def put_back(self, rows: Tensor, values: Tensor) -> None:
        """Write distinct rows that :meth:`after_step` has made."""
        self.stored.index_copy_(0, rows, self.format.put_back(self.stored.index_select(0, rows), values))

    def step_rows(self, rows: Tensor, values: Tensor, step: int) -> None:
        """Write distinct rows in a step of the optimizer, as their format rounds them."""
        stored = self.stored.index_select(0, rows)
        self.stored.index_copy_(0, rows, self.format.stepped(stored, values, self._words(rows, step)))

    def step_all(self, values: Tensor) -> None:
        """Write all rows in a step of an optimizer of torch; those that it has not moved stay as they are."""
        self.writes.count += 1
        for start, stored in self.pieces():
            after = values[start : start + len(stored)]
            moved = (after != self.format.unrounded(stored, self.shape[1])).any(1).nonzero().squeeze(1)
            words = self._words(moved + start, self.writes.count)
            stored.index_copy_(0, moved, self.format.stepped(stored.index_select(0, moved), after[moved], words))

    def rescale_all(self, values: Tensor) -> None:
        """Write all rows after an average or a change of scale: those that it has moved find their steps anew."""
        self.writes.count += 1
        for start, stored in self.pieces():
            after = values[start : start + len(stored)]
            moved = (after != self.format.unrounded(stored, self.shape[1])).any(1).nonzero().squeeze(1)
            words = self._words(moved + start, self.writes.count)
            words = None if words is None else words[:, : self.shape[1]]
            stored.index_copy_(0, moved, self.format.encode(after[moved], words))

    def write_all(self, values: Tensor) -> None:
        """Write all rows that differ from ``values``, rounded to nearest."""
        for start, stored in self.pieces():
            after = values[start : start + len(stored)]
            given = (after != self.format.unrounded(stored, self.shape[1])).any(1).nonzero().squeeze(1)
            self.write(given + start, after[given])

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Write distinct rows, rounded to nearest."""
        self.stored.index_copy_(0, rows, self.format.encode(values.float()))

    def fill_from(self, pieces: Callable[[int, int], Tensor], seed: int | None = None) -> None:
        """Write all rows, rounded to nearest.

        Args:
            pieces: from a first row and a number of rows to values ``[n, width]``; asked for in the order of rows.
            seed: of random bits for initial weights, which may be smaller than a step; drop-ins and collections give
                the same, wherever the rows are stored.
        """
        for start, stored in self.pieces():
            values = pieces(start, len(stored)).float().to(stored.device)
            rows = torch.arange(start, start + len(stored), device=stored.device)
            words = None if seed is None else random_words(rows, self.shape[1], seed, 0)
            stored.copy_(self.format.encode(values, words))

    # -- copies ---------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> LowPrecisionTable:
        if id(self) not in memo:
            memo[id(self)] = self._again(self.stored.clone())
        return cast("LowPrecisionTable", memo[id(self)])

    def _again(self, stored: Tensor) -> LowPrecisionTable:
        """The same, a parameter as this is, of other stored rows."""
        build, (_, *rest) = self.__reduce_ex__(4)
        return cast("LowPrecisionTable", build(stored, *rest))

    def __reduce_ex__(self, protocol: Any) -> Any:
        is_parameter = isinstance(self, nn.Parameter)
        own = (self.stored, self.format, self.shape[1], self.seed, self.requires_grad, is_parameter)
        return _rebuild, (*own, self.writes.count)

    def moved(self, fn: Callable[[Tensor], Tensor]) -> LowPrecisionTable:
        """The table after what ``nn.Module._apply`` does to tensors; conversions to other floats leave it as it is."""
        if self.stored.dtype is torch.uint8:
            stored = fn(self.stored)
        else:
            stored = fn(self.stored.view(torch.uint8)).view(self.format.dtype)
        return (
            self
            if stored is self.stored or checked_address(stored) == checked_address(self.stored)
            else self._again(stored)
        )

    def share_memory_(self) -> LowPrecisionTable:
        """Move the rows to memory that processes share."""
        self.stored.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether processes share the memory of the rows."""
        return self.stored.is_shared()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LowPrecisionTable({list(self.shape)}, {self.format}, device={str(self.device)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], LowPrecisionTable):
            out = handler(args[0], *args[1:], **kwargs)
            if out is not NotImplemented:
                return out
        if func is aten.embedding.default:
            return args[0].read(args[1].reshape(-1)).view(*args[1].shape, args[0].shape[1])
        return _densely(func, args, kwargs)


def _rebuild(
    stored: Tensor, format: RowFormat, width: int, seed: int, requires_grad: bool, is_parameter: bool, writes: int = 0
) -> LowPrecisionTable:
    out = LowPrecisionTable(stored, format, width, seed, Writes(writes))
    if is_parameter:
        return cast("LowPrecisionTable", nn.Parameter(out, requires_grad))
    out.requires_grad_(requires_grad)
    return out


def stored_rows(table: Tensor) -> Tensor:
    """The tensor that holds a table's rows: its stored rows, or the table itself."""
    return table.stored if isinstance(table, LowPrecisionTable) else table


def rows_to_step(table: Tensor, rows: Tensor) -> Tensor:
    """What an optimizer steps of int64 ``rows [n]`` of a table: a copy."""
    return table.unrounded(rows) if isinstance(table, LowPrecisionTable) else table.index_select(0, rows)


def step_rows(table: Tensor, rows: Tensor, values: Tensor, step: int) -> None:
    """Write distinct rows of a table in a step of its optimizer, in place.

    Args:
        values: ``[n, width]``; rounded as the table says, or converted to its dtype.
    """
    if isinstance(table, LowPrecisionTable):
        table.step_rows(rows, values, step)
    else:
        table[rows] = values.to(table.dtype)


# -- torch's operations -----------------------------------------------------------------------------------------------


def _alias(table: LowPrecisionTable, *_: Any, **__: Any) -> Any:
    return table.view_of(table.stored)


def _view(table: LowPrecisionTable, shape: Any) -> Any:
    return _alias(table) if list(shape) in (list(table.shape), [-1, table.shape[1]]) else NotImplemented


def _clone(table: LowPrecisionTable, **_: Any) -> Any:
    return table.like(table.stored.clone())


def _converted(table: LowPrecisionTable, *, dtype: Any = None, device: Any = None, **rest: Any) -> Any:
    if dtype not in (None, torch.float32):
        return NotImplemented
    rest.pop("layout", None), rest.pop("memory_format", None)
    return table.like(table.stored.to(device=device, copy=True, non_blocking=rest.get("non_blocking", False)))


def _slice(table: LowPrecisionTable, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if dim != 0:
        return NotImplemented
    return table.view_of(aten.slice.Tensor(table.stored, 0, start, end, step))


def _index_select(table: LowPrecisionTable, dim: int, index: Tensor) -> Any:
    return table.read(index) if dim == 0 else NotImplemented


def _index(table: LowPrecisionTable, indices: Any) -> Any:
    if len(indices) != 1 or indices[0] is None or indices[0].dtype is torch.bool:
        return NotImplemented
    rows = indices[0].long()
    flat = rows.reshape(-1)
    return table.read(torch.where(flat < 0, flat + len(table.stored), flat)).view(*rows.shape, table.shape[1])


def _index_put_(table: LowPrecisionTable, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    if accumulate or len(indices) != 1 or indices[0] is None or indices[0].dim() != 1 or indices[0].dtype is torch.bool:
        return NotImplemented
    rows = indices[0].long()
    table.write(torch.where(rows < 0, rows + len(table.stored), rows), values.expand(len(rows), table.shape[1]))
    return table


def _index_copy_(table: LowPrecisionTable, dim: int, rows: Tensor, values: Tensor) -> Any:
    if dim != 0:
        return NotImplemented
    table.write(rows, values)
    return table


def _copy_(table: LowPrecisionTable, source: Tensor, non_blocking: bool = False) -> Any:
    if isinstance(source, LowPrecisionTable) and source.shape == table.shape:
        if source.saved:
            table.format, table.writes.count = source.format, source.writes.count
        if source.format == table.format:
            table.stored.copy_(source.stored)
            return table
    source = source.expand(table.shape) if source.shape != table.shape else source
    table.fill_from(lambda start, count: source[start : start + count] + 0.0)
    return table


def _like_of(func: Any) -> Callable[..., Any]:
    def run(table: LowPrecisionTable, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("memory_format", None)
        return func(torch.empty((), dtype=torch.float32, device=table.device).expand(table.shape), *args, **kwargs)

    return run


def _add_(table: LowPrecisionTable, other: Any, *, alpha: float = 1) -> Any:
    """A step of a torch optimizer by a sparse gradient changes the rows of the gradient alone."""
    if not isinstance(other, Tensor) or not other.is_sparse:
        return NotImplemented
    other = other.coalesce()
    rows = other.indices()[0]
    table.writes.count += 1
    table.step_rows(rows, table.unrounded(rows).add_(other.values(), alpha=alpha), table.writes.count)
    return table


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.clone.default: _clone,
    aten._to_copy.default: _converted,
    aten.slice.Tensor: _slice,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.index_put_.default: _index_put_,
    aten.index_copy_.default: _index_copy_,
    aten.copy_.default: _copy_,
    aten.add_.Tensor: _add_,
    aten.detach_.default: lambda table: table,
    **{
        f: _like_of(f)
        for f in (
            aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
            aten.zeros_like.default, aten.empty_like.default, aten.ones_like.default, aten.full_like.default,
        )
    },
}  # fmt: skip


def _densely(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Any operation on decoded copies; a table that it changes in place is rounded and stored."""
    arguments = func._schema.arguments
    if func.namespace == "c10d":
        check_collective(func, [*args, *kwargs.values()])
    if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        raise ConfigError(
            f"{func.name().removeprefix('aten::')}: a low-precision table has views of its rows alone, "
            "`table[start:stop]`; read to_dense(), a copy, or write rows, `table[rows] = values`. "
            "DistributedDataParallel takes modules that start equal in all processes by init_sync=False, FSDP leaves "
            "them out by ignored_params"
        )
    named = dict(zip((a.name for a in arguments), args, strict=False)) | dict(kwargs)
    written: dict[int, LowPrecisionTable] = {}
    for argument in arguments:
        value = named.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            listed = value if isinstance(value, (list, tuple)) else (value,)
            written |= {id(t): t for t in listed if isinstance(t, LowPrecisionTable)}
    dense: dict[int, Tensor] = {}

    def given(x: Any) -> Any:
        if isinstance(x, LowPrecisionTable):
            if func.namespace == "c10d":
                return x.stored
            if id(x) not in dense:
                dense[id(x)] = x.to_dense() if id(x) not in written else x.all_unrounded()
            return dense[id(x)]
        return type(x)(given(v) for v in x) if isinstance(x, (list, tuple)) else x

    out = func(*[given(x) for x in args], **{k: given(v) for k, v in kwargs.items()})
    changed: dict[int, LowPrecisionTable] = {}
    for number, table in written.items():
        if number in dense:
            store_result(table, dense[number], func, bool(named.get("accumulate") or named.get("reduce")))
            changed[id(dense[number])] = table
    if isinstance(out, (list, tuple)):
        return type(out)([changed.get(id(x), x) for x in out])
    return changed.get(id(out), out)
