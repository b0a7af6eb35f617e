"""Formats in which rows are stored while they train: integers at a step, 16-bit floats, floats that are read rounded.

A row of integers is what :class:`recsys_embed.core.precision.Layout` stores: codes ``u = q + 2**(bits - 1)`` of values
``q * step``, two to a byte for int4. With ``"lpt"`` (Xu et al. 2021) the step is one number for a table, and rows have
no scale and bias. With ``"alpt"`` (Li et al., AAAI 2023) each row has a step that learns, and stands as it is served:
scale (the step) and bias in fp16 before the codes. With ``"lsq"`` (learned step size quantisation, Esser et al., ICLR
2020) rows are float32, with the row's step behind them, and are rounded where they are read.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recsys_embed.core import stochastic_rounding as rounding
from recsys_embed.core.precision import BITS, FLOATS, HEAD, NARROW, packed, unpacked
from recsys_embed.errors import ConfigError

Quantization = Literal["ptq", "lpt", "alpt", "lsq"]
Rounding = Literal["stochastic", "nearest"]
TRAINED: dict[str, tuple[str, ...]] = {
    "lpt": ("int8", "int4", "fp16", "bf16"),
    "alpt": ("int8", "int4"),
    "lsq": ("int8", "int4", "int2"),
}
"""Precisions in which rows can train, by the way they do."""
DEFAULT_STEPS = {"int8": 2.0**-10, "int4": 2.0**-8, "int2": 2.0**-6}
"""Distances of two codes, unless the initial weights need more."""
LEAST_WIDTH = 4
"""Columns from which on rows are stored as integers."""
STEP_RATE = 0.02
"""Learning rate of learned steps, as a part of that of the rows: 2e-5 to 1e-3 in the paper of ALPT."""
_LEAST_STEP, _MOST_STEP = 2.0**-16, 256.0
_MOST_HALF = 65504.0


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a table are stored while they train.

    Args:
        kind: ``"int8"``, ``"int4"``, ``"int2"``, ``"fp16"`` or ``"bf16"``.
        step: distance of two codes, an fp16 number; 0 for floats. Of learned steps, the least to start from.
        stochastic: updates are rounded stochastically, rather than to nearest.
        quantization: ``"lpt"``, ``"alpt"`` or ``"lsq"``.
        step_rate: learning rate of learned steps, as a part of that of the rows.

    >>> format = RowFormat("int4", 0.25)
    >>> stored = format.encode(torch.tensor([[0.5, -0.3, 9.0]]))
    >>> stored.shape, format.decode(stored, 3).tolist()
    (torch.Size([1, 2]), [[0.5, -0.25, 1.75]])
    """

    kind: str
    step: float = 0.0
    stochastic: bool = True
    quantization: str = "lpt"
    step_rate: float = 0.0

    @classmethod
    def of(
        cls,
        kind: str,
        width: int,
        reach: float,
        step: float | None = None,
        rounding: Rounding = "stochastic",
        quantization: str = "lpt",
        step_rate: float = STEP_RATE,
    ) -> RowFormat:
        """The format of a table's rows.

        Rows of fewer than 4 columns, such as first-order weights and learned scalars, are bfloat16 where others are
        integers: few bytes are saved there, and a step of all is too coarse for some. Of fewer than 8, whose scale
        exported files share among rows, none has a step of its own: they train at a fixed one.

        Args:
            kind: of wide rows.
            reach: of the initial weights, which codes have to span.
            step: by default that of :data:`DEFAULT_STEPS`.
        """
        stochastic = rounding == "stochastic"
        if width < NARROW:
            quantization, kind = "lpt", "bf16" if kind == "int2" else kind
        if kind not in BITS or width < LEAST_WIDTH:
            return cls("bf16" if kind in BITS else kind, stochastic=stochastic)
        if quantization != "lpt":
            return cls(kind, as_half(step or DEFAULT_STEPS[kind]), stochastic, quantization, step_rate)
        if step is None:
            least = reach / (1 << (BITS[kind] - 1))
            step = max(DEFAULT_STEPS[kind], 2.0 ** math.ceil(math.log2(least)) if least > 0 else 0.0)
        return cls(kind, as_half(step), stochastic=stochastic)

    @property
    def bits(self) -> int | None:
        """Bits of a code; None for floats."""
        return BITS.get(self.kind)

    @property
    def learns(self) -> bool:
        """Whether each row has a step, which learns."""
        return self.quantization != "lpt"

    @property
    def has_master(self) -> bool:
        """Whether rows are stored unrounded."""
        return self.quantization == "lsq"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored tensor."""
        return torch.float32 if self.has_master else FLOATS.get(self.kind, torch.uint8)

    def items(self, width: int) -> int:
        """Elements of a stored row; bytes if it is of integers."""
        if self.has_master:
            return width + 1
        return width if self.bits is None else HEAD * self.learns - (-width * self.bits // 8)

    def row_bytes(self, width: int) -> int:
        """Bytes of a stored row."""
        return self.items(width) * self.dtype.itemsize

    # -- rows as they are read --------------------------------------------------------------------------------------

    def encode(self, values: Tensor, words: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        """Stored rows of float32 ``values [n, width]``: ``[n, items]``.

        Args:
            words: random bits, see :func:`recsys_embed.core.stochastic_rounding.random_words`; None: to nearest.
            steps: of the rows where they learn, ``[n, 1]``; by default such as the values need.
        """
        if self.bits is None:
            return rounding.round_to_halves(values, self.dtype, words)
        if self.learns and steps is None:
            steps = self.first_steps(values)
        if self.has_master and steps is not None:
            return torch.cat([values, steps], 1)
        codes = packed(
            rounding.round_to_codes(values, self.step if steps is None else steps, self.bits, words), self.bits
        )
        if steps is None:
            return codes
        head = torch.cat([steps, steps * -(1 << (self.bits - 1))], 1).half()
        return torch.cat([head.contiguous().view(torch.uint8), codes], 1)

    def decode(self, stored: Tensor, width: int) -> Tensor:
        """Float32 ``[n, width]`` of stored rows ``[n, items]``, as lookups read them."""
        if self.bits is None:
            return stored.float()
        if self.has_master:
            steps = self.steps_of(stored)
            codes = rounding.round_to_codes(stored[:, :width], steps, self.bits, None)
            return rounding.from_codes(codes, steps, self.bits)
        codes = unpacked(stored[:, HEAD:] if self.learns else stored, self.bits)[:, :width]
        return rounding.from_codes(codes, self.steps_of(stored) if self.learns else self.step, self.bits)

    def steps_of(self, stored: Tensor) -> Tensor:
        """The fp16 numbers that are the steps of stored rows, where they learn: float32 ``[n, 1]``."""
        if self.has_master:
            return stored[:, -1:].half().float()
        return stored[:, :2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()

    # -- rows as optimizers step them -------------------------------------------------------------------------------

    def unrounded(self, stored: Tensor, width: int) -> Tensor:
        """What an optimizer steps: float32 ``[n, width]``."""
        return stored[:, :width].clone() if self.has_master else self.decode(stored, width)

    def put_back(self, stored: Tensor, values: Tensor, words: Tensor | None = None) -> Tensor:
        """Rows after a step without a gradient, in which none learns how to round: ``[n, items]``.

        Args:
            stored: rows before the step.
            values: after it, float32 ``[n, width]``.
            words: as :meth:`encode` has them.
        """
        if self.has_master:
            return self.encode(values, None, stored[:, -1:])
        return self.encode(values, words, self.steps_of(stored) if self.learns else None)

    def stepped(self, stored: Tensor, values: Tensor, words: Tensor | None = None) -> Tensor:
        """As :meth:`put_back`, after a step of the optimizer by a gradient.

        Args:
            words: ``[n, width + 1]`` where steps learn, with those of the step.
        """
        if not self.learns:
            return self.encode(values, words)
        width = values.shape[1]
        before = self.unrounded(stored, width)
        if self.has_master:
            # The gradient passes straight through the rounding, and only inside of the codes.
            scaled = before / self.steps_of(stored)
            inside = (scaled >= self._least_code) & (scaled <= self._most_code)
            steps = self._moved_steps(values.double() - before.double(), scaled, stored[:, -1:])
            return self.encode(torch.where(inside, values, before), None, steps)
        steps = self.steps_of(stored)
        steps = self._moved_steps(values.double() - before.double(), values / steps, steps)
        at = None if words is None else words[:, width:]
        steps = rounding.round_to_halves(steps, torch.float16, at).float()
        return self.encode(values, None if words is None else words[:, :width], steps)

    # -- steps ------------------------------------------------------------------------------------------------------

    @property
    def _least_code(self) -> int:
        return -(1 << ((self.bits or 8) - 1))

    @property
    def _most_code(self) -> int:
        return (1 << ((self.bits or 8) - 1)) - 1

    def rate_of(self, width: int) -> float:
        """``step_rate`` times the scale of the gradient of a step, ``1 / sqrt(width * (2**(bits - 1) - 1))``."""
        return self.step_rate / math.sqrt(width * self._most_code)

    def first_steps(self, values: Tensor) -> Tensor:
        """Steps with which rows of float32 ``values [n, width]`` start: ``[n, 1]``.

        Of ``"alpt"`` as the largest number needs; of ``"lsq"`` ``2 * mean(|row|) / sqrt(2**(bits - 1) - 1)``. At least
        ``step``, because rows that start near 0 soon leave it.
        """
        size = values.abs()
        if self.has_master:
            found = 2 * size.mean(1, keepdim=True) / math.sqrt(self._most_code)
        else:
            found = size.amax(1, keepdim=True) / self._most_code
        found = found.clamp_min(self.step).nan_to_num(self.step, _MOST_STEP).clamp(_LEAST_STEP, _MOST_STEP)
        return found if self.has_master else found.half().float()

    def _moved_steps(self, moved: Tensor, scaled: Tensor, steps: Tensor) -> Tensor:
        """Steps of rows after a step of the optimizer: float32 ``[n, 1]``.

        By the gradient of LSQ: a value ``v`` in the codes' range moves by ``round(v / step) - v / step`` for each unit
        of the step, others by the outermost code. The gradient of the loss in the rounded row is that of the batch, as
        the optimizer's rule has scaled it, ``-moved``, so that the step is stepped by the same rule without
        state of its own, and without the second forward pass of ALPT's authors, which would cost a whole step of the
        model for the gradient in a row that differs by one update.

        Args:
            moved: by how much the optimizer moves the rows: float64 ``[n, width]``.
            scaled: the rows where the gradient is taken (ALPT after the step, LSQ before it), divided by their steps.
            steps: ``[n, 1]`` so far.
        """
        inside = torch.round(scaled) - scaled
        slope = torch.where(scaled <= self._least_code, float(self._least_code), inside)
        slope = torch.where(scaled >= self._most_code, float(self._most_code), slope)
        # In float64, so that the order of the sum, in which backends differ, decides nothing.
        total, old = (moved * slope.double()).sum(1, keepdim=True), steps.double()
        new = old + total * self.rate_of(moved.shape[1])
        new = torch.minimum(torch.maximum(new, old / 2), old * 2).clamp(_LEAST_STEP, _MOST_STEP)
        return torch.where(torch.isfinite(total), new, old).float()


def as_half(step: float) -> float:
    """The fp16 number nearest to a step, so that files can hold it."""
    if step > _MOST_HALF:
        raise ConfigError(f"codes of rows that train lie at most {_MOST_HALF} apart; initial weights need {step:.3g}")
    # Not by a tensor, which would lie on torch's default device, such as the meta device.
    return float(struct.unpack("e", struct.pack("e", step))[0])
