"""Base class of update rules: settings, state and one step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from recsys_embed.utils.deprecated import warn_renamed
from recsys_embed.utils.settings import check_settings


def is_rate(value: object) -> bool:
    """Whether ``value`` is a finite number and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


@dataclass(frozen=True)
class FusedOptimizer(ABC):
    """One update rule. Subclasses are frozen data; state lives with the tables.

    Args:
        lr: learning rate, > 0 (0 freezes the tables).
        weight_decay: L2 penalty, ``weight_decay * w`` added to the gradient of every row that moves.
        rows: which rows a step updates: ``"touched"``, those of the batch; or ``"all"``, for the weights of torch's
            dense optimizer (rows that are never read decay, and so do moments). Steps of rows outside the batch are
            deferred: a row catches up when it is next read, and all do before they are evaluated or saved.

    Raises:
        ConfigError: an argument is out of range.
    """

    lr: float = 0.01
    weight_decay: float = field(default=0.0, kw_only=True)
    rows: Literal["touched", "all"] = field(default="touched", kw_only=True)

    # Bounds of numbers that are declared without any.
    bounds: ClassVar[Mapping[str, float]] = {"low": 0}
    # Name and kind of each state tensor: "row" is one float per row, "element" one per weight, "step" a count per row.
    state: ClassVar[Mapping[str, str]] = {}
    # Whether a row changes in a step without gradient and weight decay, by its state.
    decays_without_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self, type(self).__name__, type(self).conflicts)

    def conflicts(self) -> list[str]:
        """Faults of the arguments together, where each is right by itself; subclasses add theirs."""
        return []

    @property
    def tensors(self) -> dict[str, str]:
        """Name and kind of every state tensor of a table; ``last`` is the step each row has come to."""
        return {**self.state, "last": "step"} if self.lazy else dict(self.state)

    @property
    def constants(self) -> tuple[float, ...]:
        """Numbers of the rule besides its rate, weight decay and epsilon, in the order in which kernels read them."""
        return ()

    def curve(self) -> array[float]:
        """What steps are multiplied by where rows count their own, by that number from 1 on; then it stays."""
        return array("d")

    @property
    def lazy(self) -> bool:
        """Whether steps change rows outside the batch, for which they are deferred until the row is next read."""
        return self.rows == "all" and (self.weight_decay > 0 or self.decays_without_gradient)

    def initial(self, name: str) -> float:
        """Value every element of state ``name`` starts with, unless :meth:`reset_state_` says otherwise."""
        return 0.0

    def reset_state_(self, name: str, state: Tensor, weight: Tensor) -> None:
        """Set a state to what it is before the first step, in place; it may start as a function of the weights.

        Args:
            name: of :attr:`tensors`.
            state: ``[rows, 1]`` or ``[rows, width]``.
            weight: ``[rows, width]`` initial weights.
        """
        state.fill_(self.initial(name))

    def state_bytes(self, rows: int, width: int) -> int:
        """Bytes of float32 state for a table of ``rows`` x ``width``."""
        return 4 * sum(rows * width if kind == "element" else rows for kind in self.tensors.values())

    def size_and_epsilon(self, lr: float, step: int) -> tuple[float, float]:
        """Step size, the factor of a step's direction, and epsilon, which is added to its denominator."""
        return lr, getattr(self, "eps", 0.0)

    @property
    def fades(self) -> bool:
        """The earlier name of ``decays_without_gradient``."""
        warn_renamed("attribute of update rules", "fades", "decays_without_gradient")
        return self.decays_without_gradient

    def pace(self, lr: float, step: int) -> tuple[float, float]:
        """The earlier name of :meth:`size_and_epsilon`."""
        warn_renamed("method of update rules", "pace", "size_and_epsilon")
        return FusedOptimizer.size_and_epsilon(self, lr, step)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = cls.__dict__
        if "fades" in own:
            warn_renamed(f"attribute of {cls.__name__}", "fades", "decays_without_gradient")
            cls.decays_without_gradient = own["fades"]
        if "pace" in own:
            warn_renamed(f"method of {cls.__name__}", "pace", "size_and_epsilon")
            cls.size_and_epsilon = own["pace"]  # type: ignore[method-assign]
        elif "size_and_epsilon" in own:
            cls.pace = own["size_and_epsilon"]  # type: ignore[method-assign]

    @abstractmethod
    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        """New weights of the touched rows.

        Args:
            weight: ``[u, width]`` current weights of the touched rows.
            grad: ``[u, width]`` their summed gradients, weight decay included.
            state: per name of :attr:`state` ``[u, 1]`` or ``[u, width]``; replaced in the dict by its new value.
            lr: current learning rate (a schedule may have moved it from ``self.lr``).
            step: 1 for the first update of the table.
        """
