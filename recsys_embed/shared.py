"""What drop-ins need inside somebody else's model: tables that several of them read, and a plain table to look at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from recsys_embed import hashing
from recsys_embed.errors import ConfigError
from recsys_embed.program import Table


class SharedTables(nn.Module):
    """Physical tables that several drop-ins read, each stored once.

    Every drop-in holds this module, so that what replaces parameters (``to_empty``, ``load_state_dict(assign=True)``)
    replaces them for all readers at once, which equal parameters of several modules do not survive.

    Args:
        tables: distinct by name.
        seed: of the initial weights, which are those of a collection's tables of the same names.

    >>> import recsys_embed as rse
    >>> from recsys_embed.program import Init
    >>> tables = SharedTables([Table("unified", 100, 4, Init("uniform", 0.05), shared=True)])
    >>> a, b = (rse.UnifiedEmbedding(1000, 16, num_rows=100, name=n, shared=tables) for n in "ab")
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
        super().__init__()
        self.tables, self.seed = {t.name: t for t in tables}, seed
        for name, table in self.tables.items():
            values = torch.empty(table.rows, table.width, device=device, dtype=dtype)
            self.register_parameter(f"table_{name}", nn.Parameter(values))
        self.reset_parameters()

    def __contains__(self, name: str) -> bool:
        return name in self.tables

    def parameter(self, name: str) -> nn.Parameter:
        """The stored values of a table."""
        return self.get_parameter(f"table_{name}")

    def check(self, table: Table, where: str) -> None:
        """Raise unless ``table`` has the shape of the one stored under its name."""
        known = self.tables[table.name]
        if (known.rows, known.width) != (table.rows, table.width):
            raise ConfigError(
                f"shared table {table.name!r} is {known.rows} x {known.width}; {where} needs it "
                f"{table.rows} x {table.width}; give all that share it the same options"
            )

    def reset_parameters(self) -> None:
        """Draw the initial weights, a function of the seed and the names of the tables alone."""
        with torch.no_grad():
            for name, table in self.tables.items():
                table.init.fill_(self.parameter(name), hashing.salt(self.seed, "init", name))

    def extra_repr(self) -> str:
        return ", ".join(f"{t.name}: {t.rows} x {t.width}" for t in self.tables.values())


# In-place operators; other operations that write say so by a trailing underscore.
_WRITES = {"__setitem__", "__set__", "__delete__", "register_hook", "register_post_accumulate_grad_hook"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
}


class PlainView(Tensor):
    """The plain table that a compressed module stands for: to be read, with gradients, but not written.

    The values are computed, so that whoever writes them writes into the air; that raises instead. Results of
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
        # A view of the table (`.data`, a slice) leads nowhere either.
        held = [a.untyped_storage()._cdata for a in args if isinstance(a, cls)]
        if isinstance(out, tuple | list):
            return type(out)(_guarded(o, held) for o in out) if type(out) in (tuple, list) else out
        return _guarded(out, held)


def _guarded(out: Any, held: list[int]) -> Any:
    if type(out) is Tensor and out.layout is torch.strided and out.untyped_storage()._cdata in held:
        return out.as_subclass(PlainView)
    return out
