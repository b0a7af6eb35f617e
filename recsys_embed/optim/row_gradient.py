"""Gradients of tables that are zero outside the rows of a batch: tensors like the table that store those rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from recsys_embed.errors import ConfigError, IdRangeError
from recsys_embed.optim.duplicates import sum_duplicates
from recsys_embed.optim.wrapper_tensor import WrapperTensor

aten = torch.ops.aten


class RowSource(Protocol):
    """Computes the rows of gradients when they are first read."""

    def rows_and_values(self, number: int) -> tuple[Tensor, Tensor]:
        """Distinct rows of one of its tables, int64 ``[n]``, and their gradients ``[n, width]``."""


class _Content:
    """Rows and values of a gradient, shared by its aliases so that a change of one is seen by all.

    They are given, or a source computes them, which is dropped then. ``dense``: all rows are there because a dense
    gradient was stored; those that are 0 are no rows of the batch. ``computed``: a source computed the rows, which the
    table has.
    """

    __slots__ = ("_rows", "_values", "computed", "dense", "distinct", "number", "ordered", "source")

    def __init__(
        self, rows: Tensor | None, values: Tensor | None, distinct: bool, ordered: bool, dense: bool = False
    ) -> None:
        self._rows, self._values, self.distinct, self.ordered, self.dense = rows, values, distinct, ordered, dense
        self.source: RowSource | None = None
        self.number, self.computed = 0, dense

    def sorted_(self, rows: Tensor, values: Tensor) -> None:
        """The same gradient, of other order or distinct."""
        computed = self.computed
        self.__init__(rows, values, True, True, self.dense)  # type: ignore[misc]
        self.computed = computed

    def _read(self) -> tuple[Tensor, Tensor]:
        if self.source is not None:
            self._rows, self._values = self.source.rows_and_values(self.number)
            self.source, self.computed = None, True
        return cast("tuple[Tensor, Tensor]", (self._rows, self._values))

    @property
    def rows(self) -> Tensor:
        return self._read()[0]

    @property
    def values(self) -> Tensor:
        return self._read()[1]


class RowGradient(WrapperTensor):
    """A table's gradient ``[num_rows, width]`` that is zero outside some of the rows.

    It is what a backward leaves in ``.grad`` of a table whose fused optimizer steps at ``step()``, see
    :func:`recsys_embed.optim.fused_optimizer`. Norms, clipping, scaling, the check of a gradient scaler, sums and
    copies read the stored rows alone. Any other operation of torch gets the dense gradient, in as much memory as the
    table.

    Args:
        rows: int64 ``[n]``; a row that occurs several times has the sum of its values.
        values: ``[n, width]``.
        num_rows: of the table.
        distinct: no row occurs twice.
        ordered: the rows rise.

    >>> grad = RowGradient(torch.tensor([7, 2, 7]), torch.ones(3, 2), num_rows=10)
    >>> grad.shape, grad.coalesce().rows.tolist(), float(grad.sum())
    (torch.Size([10, 2]), [2, 7], 6.0)
    """

    _content: _Content

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, rows: Tensor, values: Tensor, num_rows: int, *, distinct: bool = False, ordered: bool = False
    ) -> RowGradient:
        return cast("RowGradient", cls._without_storage((num_rows, values.shape[1]), values.dtype, values.device))

    def __init__(
        self, rows: Tensor, values: Tensor, num_rows: int, *, distinct: bool = False, ordered: bool = False
    ) -> None:
        self._content = _Content(rows, values, distinct, ordered and distinct)

    @classmethod
    def deferred(cls, source: RowSource, number: int, table: Tensor) -> RowGradient:
        """A gradient of ``table`` whose rows the source computes when they are first read."""
        out = cls.__new__(cls, table.new_empty(0, dtype=torch.int64), table.detach()[:0], table.shape[0])
        out._content = _Content(None, None, True, False)
        out._content.source, out._content.number = source, number
        return out

    @property
    def source(self) -> RowSource | None:
        """What will compute the rows, while nothing has read them."""
        return self._content.source

    @property
    def rows(self) -> Tensor:
        """int64 ``[n]``."""
        return self._content.rows

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """``[n, width]``, of :attr:`rows`."""
        return self._content.values

    def distinct_(self) -> RowGradient:
        """Sum the values of rows that occur several times, in place; a step takes the rows in any order."""
        if not self._content.distinct:
            self._content.sorted_(*sum_duplicates(self.rows, self.values))
        return self

    def coalesce(self) -> RowGradient:
        """Make the rows distinct and ascending, in place, so that sums over them have the same bits in every run."""
        self.distinct_()
        if not self._content.ordered:
            rows, order = self.rows.sort()
            self._content.sorted_(rows, self.values.index_select(0, order))
        return self

    def check_rows(self, table: str) -> None:
        """Refuse rows that a table does not have.

        Args:
            table: names it in the error.

        Raises:
            IdRangeError: names the rows.
        """
        if self._content.computed or not len(self.rows):
            return
        low, high = torch.stack(self.rows.aminmax()).tolist()
        if low < 0 or high >= self.shape[0]:
            raise IdRangeError(
                f"rows of a gradient of {table!r} must be in [0, {self.shape[0]}); got rows from {low} to {high}"
            )

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """The gradient as an ordinary tensor."""
        self.coalesce()
        out = self.values.new_zeros(self.shape).index_copy_(0, self.rows, self.values)
        return out if dtype is None else out.to(dtype)

    @property
    def data(self) -> Tensor:
        """An alias of the gradient; what is assigned takes its place, a dense tensor with its memory."""
        return self._alias()

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, RowGradient):
            Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            self._content = value._content
        else:
            self._content = _Content(None, None, True, True)
            self._set_dense(value)

    def share_memory_(self) -> RowGradient:
        """Move rows and values to memory that processes share."""
        self.rows.share_memory_()
        self.values.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether processes share the memory of rows and values."""
        return self.rows.is_shared() and self.values.is_shared()

    def _set_dense(self, dense: Tensor) -> None:
        if dense.shape != self.shape:
            raise ConfigError(f"a table's gradient has the table's shape {list(self.shape)}; got {list(dense.shape)}")
        rows = torch.arange(dense.shape[0], device=dense.device)
        self._content.__init__(rows, dense.to(self.dtype), True, True, True)  # type: ignore[misc]

    def _like(self, values: Tensor) -> RowGradient:
        content = self._content
        out = RowGradient(content.rows, values, self.shape[0], distinct=content.distinct, ordered=content.ordered)
        out._content.dense, out._content.computed = content.dense, content.computed
        return out

    def _alias(self) -> RowGradient:
        like = torch.empty(0, self.shape[1], dtype=self.dtype, device=self.device)
        out = RowGradient.__new__(RowGradient, like, like, self.shape[0])
        out._content = self._content
        return out

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """The dense gradient as an array."""
        return self.to_dense().numpy(force=force)

    def tolist(self) -> list[list[float]]:
        """The dense gradient as lists."""
        return cast("list[list[float]]", self.to_dense().tolist())

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"RowGradient(shape={list(self.shape)}, rows={self.rows}, values={self.values})"

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., RowGradient], tuple[object, ...]]:
        content = self._content
        return _restored, (self.rows, self.values, self.shape[0], content.distinct, content.ordered, content.dense)

    def __deepcopy__(self, memo: object) -> RowGradient:
        return self.clone()  # type: ignore[return-value]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            out = handler(func, args, kwargs)
            if out is not NotImplemented:
                return out
        return _densely(func, args, kwargs)


def _restored(rows: Tensor, values: Tensor, num_rows: int, distinct: bool, ordered: bool, dense: bool) -> RowGradient:
    """A gradient that was pickled."""
    out = RowGradient(rows, values, num_rows, distinct=distinct, ordered=ordered)
    out._content.dense = dense
    return out


# -- how operations of torch read the stored rows ------------------------------------------------------------------


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.dim() == 0 and not isinstance(x, RowGradient))


def _scaled(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Linear functions of a gradient: each row's values, duplicates or not."""
    grad, *rest = args
    if not isinstance(grad, RowGradient):
        if func is aten.mul.Tensor and _is_number(grad) and isinstance(rest[0], RowGradient):
            return rest[0]._like(func(rest[0].values, grad))
        return NotImplemented
    if not all(_is_number(x) for x in rest):
        return NotImplemented
    values = func(grad.values, *rest, **kwargs)
    return grad if values is grad.values else grad._like(values)


def _keeps_zero(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Functions of each element that are 0 at 0."""
    grad = args[0].coalesce()
    values = func(grad.values, *args[1:], **kwargs)
    return grad if values is grad.values else grad._like(values)


def _clamped(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    low, high = (*args[1:], None, None)[:2]
    if func in (aten.clamp_max.default, aten.clamp_max_.default):
        low, high = None, low
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if not all(b is None or isinstance(b, (int, float)) for b in (low, high)) or (low or 0) > 0 or (high or 0) < 0:
        return NotImplemented
    return _keeps_zero(func, args, kwargs)


def _norm(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    named = dict(zip(("ord", "dim", "keepdim"), args[1:], strict=False)) | dict(kwargs)
    order = named.get("ord", 2)
    if not isinstance(order, (int, float)) or order <= 0 or named.get("dim") or named.get("keepdim"):
        return NotImplemented
    values = args[0].coalesce().values
    if not values.numel():
        # Of zeros; the largest of no elements is an error of torch.
        return values.new_zeros((), dtype=kwargs.get("dtype"))
    return torch.linalg.vector_norm(values, order, dtype=kwargs.get("dtype"))


def _sum(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(args[0].coalesce().values, **kwargs)


def _added(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    first, second, alpha = args[0], args[1], kwargs.get("alpha", 1)
    if func in (aten.sub.Tensor, aten.sub_.Tensor):
        alpha = -alpha
    in_place = func in (aten.add_.Tensor, aten.sub_.Tensor)
    if not isinstance(second, RowGradient):
        if in_place or not isinstance(second, Tensor) or second.shape != first.shape:
            return NotImplemented
        # A gradient plus a dense one is dense.
        return first.to_dense().add_(second, alpha=alpha)
    scaled = second.values if alpha == 1 else second.values * alpha
    if not isinstance(first, RowGradient):
        if first.shape != second.shape:
            return NotImplemented
        second.distinct_()
        scaled = second.values if alpha == 1 else second.values * alpha
        out = first if in_place else first.clone()
        return out.index_add_(0, second.rows, scaled.to(out.dtype))
    if first.shape != second.shape or first.dtype != second.dtype:
        return NotImplemented
    if not len(second.rows) or not len(first.rows):
        # As it is, with what is known of its rows, in memory of its own.
        joined = first if len(first.rows) else second._like(scaled.clone() if scaled is second.values else scaled)
    else:
        joined = RowGradient(torch.cat([first.rows, second.rows]), torch.cat([first.values, scaled]), first.shape[0])
        joined._content.dense = first._content.dense or second._content.dense
        joined._content.computed = first._content.computed and second._content.computed
    if in_place:
        known = joined._content
        first._content.__init__(known.rows, known.values, known.distinct, known.ordered, known.dense)  # type: ignore[misc]
        return first
    return joined if joined is not first else first.clone()


def _aliased(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0]._alias()


def _detached_(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0]


def _cloned(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0]._like(args[0].values.clone())


def _converted(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    grad, kwargs = args[0], {k: v for k, v in kwargs.items() if k not in ("memory_format", "layout", "pin_memory")}
    out = grad._like(func(grad.values, **kwargs))
    out._content._rows = grad.rows.to(out.values.device)
    return out


def _zeroed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    # The rows are not read: computing those that are thrown away costs time, and may no longer be possible.
    grad = args[0]
    grad._content.__init__(*_no_rows(grad), True, True)
    grad._content.source = None
    return grad


def _no_rows(like: RowGradient) -> tuple[Tensor, Tensor]:
    rows = torch.empty(0, dtype=torch.int64, device=like.device)
    return rows, torch.empty(0, like.shape[1], dtype=like.dtype, device=like.device)


def _empty(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    grad = args[0]
    out = RowGradient(*_no_rows(grad), grad.shape[0], distinct=True, ordered=True)
    return _converted(aten._to_copy.default, (out,), kwargs) if kwargs else out


def _copied(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    to, source = args[0], args[1]
    if not isinstance(to, RowGradient):
        return to.copy_(source.to_dense())
    if isinstance(source, RowGradient):
        content, device = source._content, to.device
        values = content.values.to(device, to.dtype, copy=True)
        rows = content.rows.to(device)
        to._content.__init__(rows, values, content.distinct, content.ordered, content.dense)  # type: ignore[misc]
    else:
        to._set_dense(source.to(to.device, to.dtype, copy=True).expand(to.shape).contiguous())
    return to


def _each(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Operations on lists of gradients that multiply or clamp each in place, or check that they are finite."""
    lists, *rest = args
    if any(isinstance(x, RowGradient) for other in rest if isinstance(other, (list, tuple)) for x in other):
        return NotImplemented
    if func in _CLAMPS_OF_LISTS and not all(
        isinstance(b, (int, float)) and (b <= 0 if func is aten._foreach_clamp_min_.Scalar else b >= 0) for b in rest
    ):
        return NotImplemented
    return func([g.coalesce().values if isinstance(g, RowGradient) else g for g in lists], *rest, **kwargs)


def _zeroed_each(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for gradient in args[0]:
        gradient.zero_()


def _norms(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    named = dict(zip(("ord", "dtype"), args[1:], strict=False)) | dict(kwargs)
    return [torch.linalg.vector_norm(g, named.get("ord", 2), dtype=named.get("dtype")) for g in args[0]]


_CLAMPS_OF_LISTS = (aten._foreach_clamp_min_.Scalar, aten._foreach_clamp_max_.Scalar)
_Handler = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]
_HANDLERS: dict[Any, _Handler] = {
    **dict.fromkeys(
        (aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar, aten.div.Tensor, aten.div.Scalar,
         aten.div_.Tensor, aten.div_.Scalar, aten.neg.default, aten.neg_.default),
        _scaled,
    ),
    **dict.fromkeys(
        (aten.abs.default, aten.abs_.default, aten.sign.default, aten.sign_.default, aten.sqrt.default,
         aten.square.default, aten.relu.default, aten.tanh.default, aten.nan_to_num.default, aten.nan_to_num_.default),
        _keeps_zero,
    ),
    **dict.fromkeys(
        (aten.clamp.default, aten.clamp_.default, aten.clamp_min.default, aten.clamp_min_.default,
         aten.clamp_max.default, aten.clamp_max_.default),
        _clamped,
    ),
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor), _added),
    **dict.fromkeys((aten.detach.default, aten.alias.default), _aliased),
    **dict.fromkeys(
        (aten._foreach_mul_.Scalar, aten._foreach_mul_.Tensor, aten._foreach_mul_.ScalarList, aten._foreach_div_.Scalar,
         aten._foreach_div_.Tensor, aten._foreach_neg_.default, aten._amp_foreach_non_finite_check_and_unscale_.default,
         *_CLAMPS_OF_LISTS),
        _each,
    ),
    aten._foreach_norm.Scalar: _norms,
    aten._foreach_zero_.default: _zeroed_each,
    aten.detach_.default: _detached_,
    aten.clone.default: _cloned,
    aten._to_copy.default: _converted,
    aten.zero_.default: _zeroed,
    aten.zeros_like.default: _empty,
    aten.copy_.default: _copied,
    aten.linalg_vector_norm.default: _norm,
    aten.sum.default: _sum,
}  # fmt: skip


def _leaves(x: Any) -> Iterator[RowGradient]:
    for item in x if isinstance(x, (list, tuple)) else (x,):
        if isinstance(item, RowGradient):
            yield item


def _densely(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Any operation on dense copies of the gradients; what it changed in place is stored again."""
    if func.namespace == "c10d":
        raise ConfigError(
            f"torch.distributed ({func}) cannot exchange the rows of a table's gradient, which differ from rank to "
            "rank; wrap the model in DistributedDataParallel, or pass fused_optimizer(model, process_group=...)"
        )
    dense: dict[int, Tensor] = {}
    arguments = func._schema.arguments
    if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        # A view is of what is stored, so that a change of it is a change of the gradient.
        for grad in (g for value in args for g in _leaves(value)):
            grad._set_dense(grad.to_dense())
            dense[id(grad._content)] = grad.values

    def given(x: Any) -> Any:
        if isinstance(x, RowGradient):
            return dense.setdefault(id(x._content), x.to_dense())
        return type(x)(given(v) for v in x) if isinstance(x, (list, tuple)) else x

    out = func(*[given(x) for x in args], **{k: given(v) for k, v in kwargs.items()})
    written: dict[int, RowGradient] = {}
    named = dict(zip((a.name for a in arguments), args, strict=False)) | dict(kwargs)
    for argument in arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for grad in _leaves(named.get(argument.name)):
                grad._set_dense(dense[id(grad._content)])
                written[id(dense[id(grad._content)])] = grad
    if isinstance(out, (list, tuple)):
        return type(out)([written.get(id(x), x) for x in out])
    return written.get(id(out), out)


def is_dense(gradient: Tensor | None) -> bool:
    """Whether a gradient comes from outside lookups, which leave one of rows."""
    return gradient is not None and not (isinstance(gradient, RowGradient) and not gradient._content.dense)


def rows_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of a table that have a gradient, and their gradients: int64 ``[n]`` and ``[n, width]``.

    Args:
        gradient: ``[num_rows, width]``; of a dense one, rows that are 0 are left out.
    """
    if isinstance(gradient, RowGradient):
        gradient.distinct_()
        if not gradient._content.dense:
            return gradient.rows, gradient.values
        gradient = gradient.values
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        return gradient.indices()[0], gradient.values()
    rows = (gradient != 0).any(1).nonzero().squeeze(1)
    return rows, gradient[rows]
