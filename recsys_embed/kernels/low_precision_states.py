"""Low-precision tables in modules: what state dicts hold of them, and what conversions of a module do to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from recsys_embed.core import config_state
from recsys_embed.kernels.low_precision_table import LowPrecisionTable

# In a state dict's configuration: of each table, the numbers that give its stored rows their values and random bits.
STORED_ROWS = "stored_rows"
STORED_NUMBERS = ("code_distance", "writes")


@contextmanager
def apply_apart(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Around ``nn.Module._apply``, which exchanges memory of tensors: tables of few bits are moved, never converted."""
    held = {name: p for name, p in module._parameters.items() if isinstance(cast("object", p), LowPrecisionTable)}
    for name in held:
        module._parameters[name] = None
    try:
        yield
    finally:
        for name, table in held.items():
            module._parameters[name] = cast("nn.Parameter", cast("LowPrecisionTable", table).moved(fn))


def low_precision_tables(module: nn.Module) -> Iterator[tuple[str, LowPrecisionTable]]:
    """The tables that a module itself holds, by the names of its parameters."""
    for name, p in module._parameters.items():
        table = cast("object", p)
        if isinstance(table, LowPrecisionTable):
            yield name, table


def numbers_to_save(module: nn.Module) -> dict[str, dict[str, dict[str, str]]]:
    """What the configuration in a state dict says of stored rows, in texts of one length; empty without such tables."""
    said = {
        _STORED_AS.get(name, name): {
            "code_distance": f"{table.format.step:.8e}",
            "writes": f"{table.writes.count:020d}",
        }
        for name, table in low_precision_tables(module)
    }
    return {STORED_ROWS: said} if said else {}


# Drop-ins that stand in for a plain table call the parameter otherwise.
_STORED_AS = {"stored_weight": "weight"}


def save_stored(module: nn.Module, destination: dict[str, Any], prefix: str) -> None:
    """Put stored rows into a state dict in the place of the tables that hold them."""
    for name, table in low_precision_tables(module):
        if prefix + name in destination:
            destination[prefix + name] = table.to_save()


def load_stored(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    """Put tables into a state dict in the place of stored rows, before ``nn.Module`` copies them."""
    tables = dict(low_precision_tables(module))
    packed = state_dict.get(prefix + "_extra_state")
    said: Any = {} if packed is None or not tables else config_state.unpack(packed, prefix.rstrip("."))
    for name, table in tables.items():
        saved = state_dict.get(prefix + name)
        if isinstance(saved, Tensor):
            numbers = said.get(STORED_ROWS, {}).get(_STORED_AS.get(name, name), {})
            assign = bool(metadata.get("assign_to_params_buffers"))
            state_dict[prefix + name] = table.as_table(saved, numbers, assign)
