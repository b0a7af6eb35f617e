"""Size of optimizer state, for this library's fused optimizers and any torch optimizer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError, unknown_name
from recsys_embed.optim import FusedOptimizer, list_rules, make_rule, rule_name
from recsys_embed.report.memory.arrays import ArrayStorage, UpdateKind
from recsys_embed.typing import OptimizerSpec

_TORCH: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "dense_adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sparse_adam": torch.optim.SparseAdam,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class OptimizerStateSize:
    """Computes the bytes of state that an optimizer keeps for an array.

    Args:
        name: of the optimizer, as the report shows it.
        fused: the rule, where tables are updated inside backward.
        cls: torch's class, where parameters have a ``.grad``.
        options: its settings, hashable.
        held: identities of the parameters it steps; None: all.
    """

    name: str
    fused: FusedOptimizer | None = None
    cls: type[torch.optim.Optimizer] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    held: frozenset[Hashable] | None = None

    def steps(self, array: ArrayStorage) -> bool:
        """Whether the optimizer holds the array."""
        return array.trained and (self.held is None or array.parameter in self.held)

    def state_bytes(self, array: ArrayStorage, update: UpdateKind) -> tuple[int, int]:
        """Bytes of state of an array, and bytes per parameter whatever its size (a step counter)."""
        if not self.steps(array) or update == "frozen":
            return 0, 0
        if self.fused is not None:
            return self.fused.state_bytes(array.rows, array.width) if array.role == "table" else 0, 0
        if self.cls is None or (self.cls is torch.optim.SparseAdam and array.role == "dense"):
            return 0, 0  # SparseAdam cannot step dense gradients
        cls = torch.optim.SparseAdam if self.cls is torch.optim.Adam and update == "sparse" else self.cls
        options = self.options if cls is self.cls else ()
        sparse = update == "sparse" or cls is torch.optim.SparseAdam
        key: Any = cls  # classes are hashable, which torch's annotations hide
        element, row, column, fixed = _measured(key, options, array.itemsize, sparse, array.flat)
        return element * array.elements + row * array.rows + column * array.width, fixed


@lru_cache(maxsize=64)
def _measured(cls: Any, options: Any, itemsize: int, sparse: bool, flat: bool) -> tuple[int, int, int, int]:
    """Bytes of state per element, row, column and parameter, measured by one step on a parameter of shape 5 x 3.

    A ``flat`` parameter is a vector of 15.
    """
    rows, width = 5, 3
    dtype = {2: torch.bfloat16, 8: torch.float64}.get(itemsize, torch.float32)
    weight = torch.nn.Parameter(torch.zeros((rows * width,) if flat else (rows, width), dtype=dtype))
    zero = torch.zeros(1, width, dtype=dtype)
    weight.grad = (
        torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), zero, (rows, width), check_invariants=True)
        if sparse
        else torch.zeros_like(weight)
    )
    try:
        optimizer = cls([weight], **dict(options))
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, AttributeError) as e:
        kind = "sparse" if sparse else "dense"
        raise ConfigError(f"`optimizer` {cls.__name__} cannot step a parameter with {kind} gradients: {e}") from e
    element = row = column = fixed = 0
    for state in optimizer.state[weight].values():
        if not isinstance(state, Tensor):
            continue
        if state.numel() == rows * width:
            element += state.element_size()
        elif state.numel() == rows:
            row += state.element_size()
        elif state.numel() == width:
            column += state.element_size()
        else:
            fixed += state.nbytes
    return element, row, column, fixed


def state_size_of(
    optimizer: OptimizerSpec | OptimizerStateSize | None, *, prefer_fused: bool
) -> OptimizerStateSize | None:
    """The state size of an optimizer, given in any form.

    Args:
        optimizer: None; a name; a fused optimizer; a torch optimizer, its class, or one of its instances (which counts
            for the parameters it holds).
        prefer_fused: whether a name that both this library and torch have means this library's.

    Raises:
        ConfigError: of another kind.
        UnknownNameError: no such name.

    >>> state_size = state_size_of("adam", prefer_fused=False)
    >>> state_size.name, state_size.state_bytes(ArrayStorage("weight", 1000, 16), "dense")
    ('torch.optim.Adam', (128000, 4))
    """
    if optimizer is None or isinstance(optimizer, OptimizerStateSize):
        return optimizer
    if isinstance(optimizer, str):
        rules = list_rules()
        if optimizer in rules and (prefer_fused or optimizer not in _TORCH):
            return OptimizerStateSize(optimizer, fused=make_rule(optimizer))
        if optimizer not in _TORCH:
            raise unknown_name("optimizer", optimizer, {*rules, *_TORCH})
        optimizer = _TORCH[optimizer]
    if isinstance(optimizer, FusedOptimizer):
        return OptimizerStateSize(rule_name(optimizer) or type(optimizer).__name__, fused=optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        held = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
        known = _accepted(type(optimizer))
        options = {k: v for k, v in optimizer.defaults.items() if k in known and _hashable(v)}
        return OptimizerStateSize(
            _name(type(optimizer)), cls=type(optimizer), options=tuple(options.items()), held=held
        )
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        return OptimizerStateSize(_name(optimizer), cls=optimizer)
    raise ConfigError(
        "`optimizer` must be a name such as 'adam' or 'rowwise_adagrad', a fused optimizer of this library, a "
        f"torch optimizer or its class; got {type(optimizer).__name__}"
    )


def _name(cls: type) -> str:
    return f"torch.optim.{cls.__name__}" if cls.__module__.startswith("torch.optim") else cls.__name__


def _accepted(cls: type) -> set[str]:
    import inspect

    return set(inspect.signature(cls).parameters)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return not isinstance(value, Tensor)
