"""Base class of update rules: settings, state and one step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.optim.state_format import LEAST_SIGNED, StateFormat, StatePrecision
from recsys_embed.utils.deprecated import warn_renamed
from recsys_embed.utils.settings import check_settings


def is_rate(value: object) -> bool:
    """Whether ``value`` is a finite number and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def moved_mean(mean: Tensor, square: Tensor, rest: float) -> Tensor:
    """A running mean of squares after one more; where it overflowed it stays infinite, so that its weights rest.

    The squares of float32 gradients overflow from about 1.8e19 on. Their difference from an infinite mean would be NaN.

    >>> import torch
    >>> moved_mean(torch.tensor([1.0, torch.inf]), torch.tensor([3.0, 3.0]), 0.25)
    tensor([1.5000,    inf])
    """
    return mean.lerp(square, rest).where(mean < math.inf, mean)


def mean_square(grad: Tensor) -> Tensor:
    """The mean square of each row of ``grad [n, width]``: ``[n, 1]``, with the bits of the compiled kernels.

    These sum 16 columns side by side, and those behind them in fours.

    >>> mean_square(torch.tensor([[1.0, 2.0, 3.0]])).item() == torch.tensor(14.0).div(3).item()
    True
    """
    squares, width = grad * grad, grad.shape[1]
    if width == 8:
        return _halved(squares) / width
    at, total = width // 16 * 16, squares.new_zeros(len(squares), 1)
    for k in range(at, width - 3, 4):
        total = total + _halved(squares[:, k : k + 4])
    for k in range(width - (width - at) % 4, width):
        total = total + squares[:, k : k + 1]
    wide = squares[:, :16] if at else None
    for k in range(16, at, 16):
        wide = wide + squares[:, k : k + 16]  # type: ignore[operator]
    return (total if wide is None else total + _halved(wide)) / width


def _halved(x: Tensor) -> Tensor:
    """Sums of rows whose width is a power of two, halves first."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x


@dataclass(frozen=True)
class FusedOptimizer(ABC):
    """One update rule. Subclasses are frozen data; state lives with the tables.

    Args:
        lr: learning rate, > 0 (0 freezes the tables).
        weight_decay: L2 penalty, ``weight_decay * w`` added to the gradient of every row that moves.
        rows: which rows a step updates: ``"touched"``, those of the batch; or ``"all"``, for the weights of torch's
            dense optimizer (rows that are never read decay, and so do moments). Steps of rows outside the batch are
            deferred: a row catches up when it is next read, and all do before they are evaluated or saved.
        state_precision: of the state that is kept per row or weight; counts of steps stay integers. ``"bf16"`` takes
            half of the bytes. ``"8bit"`` takes a quarter: floats of 8 bits without a scale, of 2 bits of fraction and
            64 powers of two, 32 and a sign where values may be negative (:class:`StateFormat`). Steps are computed in
            float32 by the new state and then store it by stochastic rounding (Gupta et al. 2015), without which sums
            would no longer grow by what is less than half the distance of two numbers. With TorchRec it is
            ``"fp32"``.

    Raises:
        ConfigError: an argument is out of range.
    """

    lr: float = 0.01
    weight_decay: float = field(default=0.0, kw_only=True)
    rows: Literal["touched", "all"] = field(default="touched", kw_only=True)
    state_precision: StatePrecision = field(default="fp32", kw_only=True)

    # Bounds of numbers that are declared without any.
    bounds: ClassVar[Mapping[str, float]] = {"low": 0}
    # Name and kind of each state tensor: "row" is one float per row, "element" one per weight, "step" a count per row.
    state: ClassVar[Mapping[str, str]] = {}
    # Of states that are never negative, the exponent of the least number above 0 that 8 bits hold.
    least_exponents: ClassVar[Mapping[str, int]] = {}
    # Whether a row changes in a step without gradient and weight decay, by its state.
    decays_without_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self, type(self).__name__, type(self).conflicts)
        odd = {name: kind for name, kind in self.state.items() if kind not in ("row", "element", "step")}
        if odd:
            raise ConfigError(f"state of {type(self).__name__} is kept per 'row', 'element' or 'step'; got {odd}")

    def __repr__(self) -> str:
        """As that of dataclasses; a state in float32, as all had it before there was a choice, is left out."""
        shown = [
            f.name for f in fields(self) if f.repr and (f.name, getattr(self, f.name)) != ("state_precision", "fp32")
        ]
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def conflicts(self) -> list[str]:
        """Faults of the arguments together, where each is right by itself; subclasses add theirs."""
        return []

    @property
    def tensors(self) -> dict[str, str]:
        """Name and kind of every state tensor of a table; ``last`` is the step each row has come to."""
        return {**self.state, "last": "step"} if self.lazy else dict(self.state)

    @property
    def formats(self) -> dict[str, StateFormat]:
        """Format of every state tensor of a table, by the names of :attr:`tensors`."""
        floats = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[self.state_precision]
        return {
            name: StateFormat(
                torch.int32 if kind == "step" else floats,
                name not in self.least_exponents,
                self.least_exponents.get(name, LEAST_SIGNED),
            )
            for name, kind in self.tensors.items()
        }

    def state_faults(self, state: Mapping[str, Tensor], steps: int) -> list[str]:
        """Why kernels cannot go on from a table's saved tensors: they index step sizes by the counts of its rows.

        Args:
            steps: that the table has made; state is saved when all its rows have made them.
        """
        counts = {name: state[name] for name, kind in self.tensors.items() if kind == "step" and name in state}
        faults = [] if steps >= 0 else [f"a number of steps must be at least 0; got {steps}"]
        for name, count in counts.items():
            if count.is_meta:
                continue
            if name == "last" and bool((count != steps).any()):
                faults.append(f"'last' must be {steps} in every row, as many steps as the table has made")
            elif bool((count < 0).any()):
                faults.append(f"{name!r} must not be negative in any row")
        return faults

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
        """Bytes of state for a table of ``rows`` x ``width``.

        >>> from recsys_embed import Adam
        >>> [Adam(state_precision=name).state_bytes(rows=1000, width=16) for name in ("fp32", "bf16", "8bit")]
        [128000, 64000, 32000]
        """
        kinds, formats = self.tensors, self.formats
        sizes = {name: rows * width if kind == "element" else rows for name, kind in kinds.items()}
        return sum(formats[name].dtype.itemsize * size for name, size in sizes.items())

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
        # Dataclasses make no other.
        if "__repr__" not in own:
            cls.__repr__ = FusedOptimizer.__repr__  # type: ignore[method-assign]
        if "fades" in own:
            warn_renamed(f"attribute of {cls.__name__}", "fades", "decays_without_gradient")
            cls.decays_without_gradient = own["fades"]
        if "pace" in own:
            warn_renamed(f"method of {cls.__name__}", "pace", "size_and_epsilon")
            cls.size_and_epsilon = own["pace"]  # type: ignore[method-assign]
        elif "size_and_epsilon" in own:
            cls.pace = own["size_and_epsilon"]  # type: ignore[method-assign]

    def checked_update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        """What :meth:`update` gives, held to its contract before anything of it is written.

        Raises:
            ConfigError: it returned other than weights, or left a state of another shape.
        """
        before = {name: values.shape for name, values in state.items()}
        new: object = self.update(weight, grad, state, lr, step)
        after = {name: getattr(values, "shape", None) for name, values in state.items()}
        if isinstance(new, Tensor) and new.shape == weight.shape and after == before:
            return new
        raise self._update_error(new, weight, before, state)

    def _update_error(
        self, new: object, weight: Tensor, before: Mapping[str, torch.Size], state: Mapping[str, object]
    ) -> ConfigError:
        faults = []
        if not isinstance(new, Tensor):
            cure = ": end it with `return weight`, whose changes in place are not kept" if new is None else ""
            faults.append(f"it must return the new weights {list(weight.shape)}; got {type(new).__name__}{cure}")
        elif new.shape != weight.shape:
            faults.append(f"it must return the new weights {list(weight.shape)}; got {list(new.shape)}")
        for name, shape in before.items():
            got = state.get(name)
            if not isinstance(got, Tensor) or got.shape != shape:
                found = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
                faults.append(f"`state[{name!r}]` must keep the shape {list(shape)}; got {found}")
        faults += [
            f"`state[{name!r}]` is no state of this rule; declare it in `state`" for name in state if name not in before
        ]
        try:
            raise_faults(faults, f"{type(self).__name__}.update")
        except ConfigError as e:
            return e
        raise AssertionError("no fault")

    @abstractmethod
    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], lr: float, step: int) -> Tensor:
        """New weights of the touched rows.

        Args:
            weight: ``[u, width]`` current weights of the touched rows.
            grad: ``[u, width]`` their summed gradients, weight decay included.
            state: per name of :attr:`state` ``[u, 1]`` or ``[u, width]``, float32 or more whatever its precision;
                replaced in the dict by its new value.
            lr: current learning rate (a schedule may have moved it from ``self.lr``).
            step: 1 for the first update of the table.
        """


def refuse_maximize(groups: Iterable[Mapping[str, Any]], optimizer: str) -> None:
    """Refuse param groups of a torch optimizer that ascend, for fused rules descend.

    Raises:
        ConfigError: says so.
    """
    if any(group.get("maximize") for group in groups):
        raise ConfigError(f"{optimizer} has maximize=True, and fused rules descend; leave it False and negate the loss")
