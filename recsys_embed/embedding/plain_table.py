"""The plain table that a compressed module stands for: read with gradients, computed only as far as it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_any, tree_leaves, tree_map

from recsys_embed.errors import ConfigError
from recsys_embed.kernels.derivatives import outside_transforms
from recsys_embed.kernels.low_precision_table import stored_rows
from recsys_embed.kernels.pointers import memory_of, of_numpy
from recsys_embed.kernels.recording import unmapped

# In-place operators; other operations that write say so by a trailing underscore.
_WRITES = {"__setitem__", "__set__", "__delete__", "register_hook", "register_post_accumulate_grad_hook"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
}
# What shape, type and device answer without a value.
_DESCRIBING = {
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "requires_grad",
    "is_leaf",
    "is_cuda",
    "is_meta",
    "is_sparse",
}
_DESCRIBING |= {"is_quantized", "is_nested", "itemsize", "nbytes", "is_cpu", "is_mps", "is_xpu"}
_DESCRIBING |= {"size", "dim", "ndimension", "numel", "nelement", "__len__", "element_size", "is_floating_point"}
_DESCRIBING |= {"is_complex", "is_signed", "get_device", "stride", "is_contiguous", "type"}
_LIKE = {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like", "zeros_like", "ones_like"}
_LIKE |= {"full_like", "rand_like", "randn_like"}


def _name(func: Any) -> str:
    """What a function is called; of the getter of an attribute, the attribute."""
    name: str = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


class PlainView(Tensor):
    """Rows of the plain table that a compressed module stands for: to be read, with gradients, but not written.

    The values are computed: writes to them would be lost, so they raise. Results of
    operations are ordinary tensors.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        if _name(func) == "__dlpack__":
            raise ConfigError(_UNREAD.format(what="DLPack"))
        views = [a for a in tree_leaves((args, kwargs)) if isinstance(a, PlainView)]
        with torch._C.DisableTorchFunctionSubclass():
            before = [_version(v) for v in views]
            out = func(*args, **kwargs)
            if func == Tensor._base.__get__:  # type: ignore[union-attr]
                return out
            if before != [_version(v) for v in views]:
                # What an option makes a write, such as F.relu(inplace=True).
                raise _lost_write(_name(func))
            # A view of the table (`.data`, a slice, an array) leads nowhere either.
            held = {_memory(v) for v in views} - {None}
            if type(out).__module__ == "numpy":
                if of_numpy(out) in {memory_of(v) for v in views}:
                    out.flags.writeable = False
                return out
            if type(out) in (tuple, list):
                return type(out)(_guarded(o, held) for o in out)
            return _guarded(out, held)


class PlainTable(PlainView):
    """A whole plain table, of which ``rows`` computes what is read.

    Shape, type and device are known without; a few rows (``weight[ids]``) are looked up. Everything else computes the
    table, once for each such object.
    """

    _rows: Callable[[Tensor], Tensor]
    _sources: Callable[[], Iterable[Tensor]] | None
    _dense: dict[bool, tuple[list[Any], Tensor]]

    @staticmethod
    def __new__(
        cls,
        rows: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
        sources: Callable[[], Iterable[Tensor]] | None,
    ) -> Self:
        """A table of ``shape`` whose ``rows`` gives vectors ``[n, width]`` of int64 ids ``[n]``.

        ``sources`` gives the tensors it is computed from: what was computed is kept until one of them changes. None
        keeps nothing.
        """
        self: Self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=requires_grad and torch.is_grad_enabled()
        )
        self._rows, self._sources, self._dense = rows, sources, {}
        if self.requires_grad:
            # What torch's overrides do not see, such as an autograd.Function of somebody's own.
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_lost_gradient)
        return self

    def dense(self) -> Tensor:
        """All rows: computed once with gradients and once without, as long as what they come from stays as it is."""
        kept = self._kept()
        if kept is None:
            with torch._C.DisableTorchFunctionSubclass():
                rows = self._rows(torch.arange(self.shape[0], device=self.device))
                kept = rows.as_subclass(PlainView)
                states = self._states(kept)
            if None not in states:
                self._dense[torch.is_grad_enabled()] = states, kept
        return kept

    def _kept(self) -> Tensor | None:
        """The rows that were computed before, where they still are what would be computed."""
        states, kept = self._dense.get(torch.is_grad_enabled(), (None, None))
        with torch._C.DisableTorchFunctionSubclass():
            return kept if kept is not None and states == self._states(kept) else None

    def _states(self, rows: Tensor) -> list[Any]:
        """Where the rows and their sources are and how often they were written to; None is "not known"."""
        return [None] if self._sources is None else [_state(t) for t in (rows, *self._sources())]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, _name(func)
        _refuse_writes(func, args, kwargs)
        own = args[0] if args and isinstance(args[0], PlainTable) else None
        if own is not None and name in _DESCRIBING and len(args) + len(kwargs) <= 2:
            with torch._C.DisableTorchFunctionSubclass():
                if name == "is_leaf":
                    return not own.requires_grad
                if name != "type" or len(args) + len(kwargs) == 1:
                    return func(*args, **kwargs)
        if own is not None and name in _LIKE:
            with torch._C.DisableTorchFunctionSubclass():
                like = torch.empty((), dtype=own.dtype, device=own.device).expand(own.shape)
                return func(like, *args[1:], **kwargs)
        found = _few_rows(func, args, kwargs)
        if found is not None:
            return found
        if tree_any(_is_proxy, (args, kwargs)):
            raise ConfigError(
                "torch.fx cannot trace what reads `weight` of a compressed embedding, which is computed; put that part "
                "into a module of its own that the tracer takes as a leaf, or turn the table back first: "
                "recsys_embed.materialize_(model)"
            )
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise ConfigError(_UNREAD.format(what=func))


_UNREAD = (
    "`weight` of a compressed embedding is computed when it is read, which {what} does not let it; give it "
    "`weight + 0`, which has gradients, or `module.materialize()`, which has none"
)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() or isinstance(tensor, PlainTable) else tensor._version


def _state(tensor: Tensor) -> tuple[int, int] | None:
    try:
        return memory_of(tensor), tensor._version
    except RuntimeError:  # of inference mode, or wrapped by a transform of functions
        return None


def _lost_gradient(grad: Tensor) -> None:
    raise ConfigError(_UNREAD.format(what="an autograd.Function"))


def _whole(value: Any) -> Any:
    return value.dense() if isinstance(value, PlainTable) else value


def _is_proxy(value: Any) -> bool:
    if type(value).__module__ != "torch.fx.proxy":
        return False
    from torch.fx import Proxy

    return isinstance(value, Proxy)


def _few_rows(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """What an operation that reads rows by id gives; None where it is another, or has all rows already."""
    if func is Tensor.__getitem__ and isinstance(args[0], PlainTable):
        table, index = args
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        plain = all(isinstance(i, int | slice) for i in rest) and not isinstance(first, bool)
        if not plain or table._kept() is not None:
            return None
        return _indexed(table, first, rest)
    if func in (torch.index_select, Tensor.index_select) and len(args) == 3 and isinstance(args[0], PlainTable):
        one = args[1] == 0 and isinstance(args[2], Tensor) and args[2].dim() == 1
        return _read(args[0], args[2], negative=False) if one else None
    if func is F.embedding and len(args) == 2 and isinstance(args[1], PlainTable):
        # 0 is an id of padding.
        options = {k for k, v in kwargs.items() if v is not None and v is not False}
        return _read(args[1], args[0], negative=False) if not options - {"norm_type"} else None
    return None


def _indexed(table: PlainTable, first: Any, rest: tuple[Any, ...]) -> Tensor | None:
    if isinstance(first, int):
        first = torch.tensor(first, device=table.device)
    if isinstance(first, slice):
        ids = torch.arange(table.shape[0])[first]
        if 2 * len(ids) > table.shape[0]:
            return None
        out = _read(table, ids.to(table.device))
        return None if out is None else _view(out[:, *rest] if rest else out)
    if isinstance(first, list) and first and all(type(i) is int for i in first):
        first = torch.tensor(first, device=table.device)
    if isinstance(first, Tensor) and first.dim() == 0:
        out = _read(table, first)
        return None if out is None else _view(out[rest] if rest else out)
    if isinstance(first, Tensor) and (not rest or first.dim() == 1):
        out = _read(table, first)
        return None if out is None else out[:, *rest] if rest else out
    return None


def _view(rows: Tensor) -> Tensor:
    """Rows that are a view of torch's own tables: writing to them would change nothing."""
    return rows.as_subclass(PlainView)


def _read(table: PlainTable, ids: Any, negative: bool = True) -> Tensor | None:
    """Rows of integer ``ids`` of any shape; None where they are none, or more than the table has.

    With ``negative``, negative ids count from the end.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or type(ids) is not Tensor:
        return None
    if ids.numel() > table.shape[0]:
        return None  # the table is computed once, and read
    flat = ids.reshape(-1).long().to(table.device)
    count, low, high = table.shape[0], 0, 0
    if flat.numel() and not flat.is_meta:
        with outside_transforms():
            low, high = (int(x) for x in unmapped(flat).aminmax())
    least = -count if negative else 0
    if low < least or high >= count:
        raise IndexError(f"index {low if low < least else high} is out of bounds for dimension 0 with size {count}")
    if negative:
        flat = torch.where(flat < 0, flat + count, flat)
    return table._rows(flat).view(*ids.shape, table.shape[1])


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    name = getattr(func, "__name__", "")
    written = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    # The functions of torch.nn.init come with arguments by name, those of torch._foreach with lists.
    target = args[0] if args else kwargs.get("tensor")
    targets = target if isinstance(target, list | tuple) else (target,)
    written = (written or kwargs.get("inplace") is True) and any(isinstance(t, PlainView) for t in targets)
    if written or isinstance(kwargs.get("out"), PlainView):
        raise _lost_write(name)


def _lost_write(name: str) -> ConfigError:
    return ConfigError(
        f"`weight` of a compressed embedding is computed from smaller tables, so `{name}` on it would change "
        "nothing; freeze or hook the module or its parameters(), set its tables with fit_(weight), or turn it "
        "back into a plain table first: recsys_embed.materialize_(model)"
    )


def _memory(tensor: Tensor) -> int | None:
    """What views of one tensor have in common; None for what transforms of functions wrap."""
    try:
        return stored_rows(tensor).untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _guarded(out: Any, held: set[int | None]) -> Any:
    if type(out) is Tensor and out.layout is torch.strided and _memory(out) in held:
        return out.as_subclass(PlainView)
    return out
