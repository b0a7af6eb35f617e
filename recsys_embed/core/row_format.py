"""Formats in which rows are stored while they train: integers at a step, or 16-bit floats.

A row of integers is what :class:`recsys_embed.core.precision.Layout` stores without its scale and bias: codes
``u = q + 2**(bits - 1)`` of values ``q * step``, two to a byte for int4. The step is one number for a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recsys_embed.core import stochastic_rounding as rounding
from recsys_embed.core.precision import BITS, FLOATS, unpacked

Quantization = Literal["ptq", "lpt"]
Rounding = Literal["stochastic", "nearest"]
TRAINED = ("int8", "int4", "fp16", "bf16")
"""Precisions in which rows can train."""
DEFAULT_STEPS = {"int8": 2.0**-9, "int4": 2.0**-8}
"""Distances of two codes, unless the initial weights need more."""
LEAST_WIDTH = 4
"""Columns from which on rows are stored as integers."""


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a table are stored while they train.

    Args:
        kind: ``"int8"``, ``"int4"``, ``"fp16"`` or ``"bf16"``.
        step: distance of two codes, an fp16 number; 0 for floats.
        stochastic: updates are rounded stochastically, rather than to nearest.

    >>> format = RowFormat("int4", 0.25)
    >>> stored = format.encode(torch.tensor([[0.5, -0.3, 9.0]]))
    >>> stored.shape, format.decode(stored, 3).tolist()
    (torch.Size([1, 2]), [[0.5, -0.25, 1.75]])
    """

    kind: str
    step: float = 0.0
    stochastic: bool = True

    @classmethod
    def of(
        cls, kind: str, width: int, reach: float, step: float | None = None, rounding: Rounding = "stochastic"
    ) -> RowFormat:
        """The format of a table's rows at a fixed step.

        Rows of fewer than 4 columns, such as first-order weights and learned scalars, are bfloat16 where others are
        integers: few bytes are saved there, and a step of all is too coarse for some.

        Args:
            kind: of wide rows.
            reach: of the initial weights, which codes have to span.
            step: by default that of :data:`DEFAULT_STEPS`.
        """
        stochastic = rounding == "stochastic"
        if kind not in BITS or width < LEAST_WIDTH:
            return cls("bf16" if kind in BITS else kind, stochastic=stochastic)
        if step is None:
            least = reach / (1 << (BITS[kind] - 1))
            step = max(DEFAULT_STEPS[kind], 2.0 ** math.ceil(math.log2(least)) if least > 0 else 0.0)
        return cls(kind, as_half(step), stochastic=stochastic)

    @property
    def bits(self) -> int | None:
        """Bits of a code; None for floats."""
        return BITS.get(self.kind)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored tensor."""
        return FLOATS.get(self.kind, torch.uint8)

    def items(self, width: int) -> int:
        """Elements of a stored row; bytes if it is of integers."""
        return width if self.bits is None else -(-width * self.bits // 8)

    def row_bytes(self, width: int) -> int:
        """Bytes of a stored row."""
        return self.items(width) * self.dtype.itemsize

    def encode(self, values: Tensor, words: Tensor | None = None) -> Tensor:
        """Stored rows of float32 ``values [n, width]``: ``[n, items]``.

        Args:
            words: random bits, see :func:`recsys_embed.core.stochastic_rounding.random_words`; None: to nearest.
        """
        if self.bits is None:
            return rounding.round_to_halves(values, self.dtype, words)
        codes = rounding.round_to_codes(values, self.step, self.bits, words)
        if self.bits == 4:
            codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        return codes

    def decode(self, stored: Tensor, width: int) -> Tensor:
        """Float32 ``[n, width]`` of stored rows ``[n, items]``."""
        if self.bits is None:
            return stored.float()
        return rounding.from_codes(unpacked(stored, self.bits)[:, :width], self.step, self.bits)


def as_half(step: float) -> float:
    """The fp16 number nearest to a step, so that files can hold it."""
    return float(torch.tensor(step, dtype=torch.float16))
