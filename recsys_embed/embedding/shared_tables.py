"""Drop-ins inside other models: tables that several of them share, and a read-only dense view of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from recsys_embed.core import hashing
from recsys_embed.core.program import Table
from recsys_embed.errors import ConfigError


class SharedTables:
    """Physical tables that several drop-ins read, each stored once: every reader registers the very same parameter.

    What exchanges parameters module by module (``to_empty``, ``load_state_dict(assign=True)``) would leave every reader
    with one of its own; readers ask here which parameter has followed which, and so stay together.

    Args:
        tables: distinct by name.
        seed: of the initial weights, which are those of a collection's tables of the same names.

    >>> import recsys_embed as rse
    >>> from recsys_embed.core.program import Initializer
    >>> tables = SharedTables([Table("unified", 100, 4, Initializer("uniform", 0.05), shared=True)])
    >>> a, b = (rse.UnifiedEmbedding(1000, 16, num_buckets=100, name=n, shared=tables) for n in "ab")
    >>> a.table("unified") is b.table("unified"), sum(p.numel() for p in nn.ModuleList([a, b]).parameters())
    (True, 400)
    """

    def __init__(
        self,
        tables: Iterable[Table],
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.values: dict[str, nn.Parameter] = {}
        for table in tables:
            values = nn.Parameter(torch.empty(table.rows, table.width, device=device, dtype=dtype))
            with torch.no_grad():
                table.init.fill_(values, hashing.salt(seed, "init", table.name))
            self.values[table.name] = values
        self._moved: dict[int, tuple[ref[nn.Parameter], ref[nn.Parameter]]] = {}

    def take(self, table: Table, where: str) -> nn.Parameter:
        """The parameter of a table, which must have the shape of ``table``."""
        values = self.values[table.name]
        if values.shape != (table.rows, table.width):
            raise ConfigError(
                f"shared table {table.name!r} is {values.shape[0]} x {values.shape[1]}; {where} needs it "
                f"{table.rows} x {table.width}; give all that share it the same options"
            )
        return values

    def follow(self, before: nn.Parameter, after: nn.Parameter) -> nn.Parameter:
        """What has taken the place of ``before``: ``after``, unless another reader exchanged it already."""
        known = self._moved.get(id(before))
        if known is not None and known[0]() is before and (first := known[1]()) is not None:
            return first
        self._moved[id(before)] = (ref(before), ref(after))
        self.values = {name: after if held is before else held for name, held in self.values.items()}
        return after

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_moved": {}}  # a copy starts anew, and weak references cannot be written


# In-place operators; other operations that write say so by a trailing underscore.
_WRITES = {"__setitem__", "__set__", "__delete__", "register_hook", "register_post_accumulate_grad_hook"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
}


class PlainView(Tensor):
    """The plain table that a compressed module stands for: to be read, with gradients, but not written.

    The values are computed: writes to them would be lost, so they raise. Results of
    operations are ordinary tensors.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        written = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        if (written and args and isinstance(args[0], cls)) or isinstance(kwargs.get("out"), cls):
            raise ConfigError(
                f"`weight` of a compressed embedding is computed from smaller tables, so `{name}` on it would change "
                "nothing; freeze or hook the module or its parameters(), set its tables with fit_(weight), or turn it "
                "back into a plain table first: recsys_embed.materialize_(model)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if func == Tensor._base.__get__:  # type: ignore[union-attr]
                return out
            # A view of the table (`.data`, a slice) leads nowhere either.
            held = {_memory(a) for a in args if isinstance(a, cls)} - {None}
            if type(out) in (tuple, list):
                return type(out)(_guarded(o, held) for o in out)
            return _guarded(out, held)


def _memory(tensor: Tensor) -> int | None:
    """What views of one tensor have in common; None for what transforms of functions wrap."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _guarded(out: Any, held: set[int | None]) -> Any:
    if type(out) is Tensor and out.layout is torch.strided and _memory(out) in held:
        return out.as_subclass(PlainView)
    return out
