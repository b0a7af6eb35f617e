"""Low-precision tables in modules: their memory, what state dicts hold of them, and what conversions do to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys_embed.core import config_state
from recsys_embed.core.hashing import salt
from recsys_embed.core.program import Table
from recsys_embed.core.row_format import RowFormat
from recsys_embed.errors import CheckpointError, ConfigError
from recsys_embed.kernels.low_precision_table import LowPrecisionTable
from recsys_embed.kernels.storage import allocate

# In a state dict's configuration: of each table, the numbers that give its stored rows their values and random bits.
STORED_ROWS = "stored_rows"
STORED_NUMBERS = ("code_distance", "writes")


def allocate_table(
    name: str, rows: int, width: int, device: torch.device, dtype: torch.dtype, format: RowFormat | None, seed: int
) -> Tensor:
    """Memory for a table, on huge pages if the OS allows: of a format, with random bits by seed and name; or floats."""
    if format is None:
        return allocate(rows, width, device, dtype)
    refuse_dtype(dtype)
    stored = allocate(rows, format.items(width), device, format.dtype)
    return LowPrecisionTable(stored, format, width, salt(seed, "rounding", name))


def refuse_dtype(dtype: torch.dtype) -> None:
    """Low-precision tables give float32 vectors.

    Raises:
        ConfigError: vectors are to be of another dtype.
    """
    if dtype is not torch.float32:
        raise ConfigError(
            f"low-precision tables give float32 vectors; got dtype {dtype}: give dtype=torch.float32 and convert the "
            "vectors, or leave `quantization` at 'ptq'"
        )


def new_table(table: Table, seed: int, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """Memory for the parameter of a table."""
    empty = torch.empty(0 if table.training else table.shape, device=device, dtype=dtype)
    if table.training is None:
        return empty
    refuse_dtype(empty.dtype)
    return allocate_table(table.name, table.rows, table.width, empty.device, empty.dtype, table.training, seed)


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
    # The names and types alone: listing the parameters of a collection applies the deferred steps of its rows.
    for name, p in dict.items(module._parameters):
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
            # Versions that wrote codes as `[rows, 1, items]` say at which distance, in the configuration.
            if packed is None and saved.dim() == 3 and not table.format.learns:
                raise CheckpointError(
                    f"the state dict has codes of {prefix + name!r} without the distance between them, which is in "
                    f"{prefix + '_extra_state'!r}; load the whole state dict, with that entry"
                )
            assign = bool(metadata.get("assign_to_params_buffers"))
            state_dict[prefix + name] = table.as_table(saved, numbers, assign)
