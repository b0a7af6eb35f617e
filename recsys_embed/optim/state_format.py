"""Optimizer state in 32, 16 or 8 bits: what stored elements mean, and how new values are rounded to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from recsys_embed.core.stochastic_rounding import random_words, round_to_halves, uniform

StatePrecision = Literal["fp32", "bf16", "8bit"]
"""Of the state of an optimizer, see :class:`recsys_embed.optim.FusedOptimizer`."""

# Exponent of the least number that 8 bits hold of a state that may be negative.
LEAST_SIGNED = -27
# Bits of float32 below an 8-bit float's two of fraction.
_DROPPED = 21
# Rows that are converted at a time.
_CHUNK = 1 << 18


class StateFormat(NamedTuple):
    """Format of one state.

    An 8-bit element is a float without a scale: two bits of fraction, so four numbers to each power of two from
    ``2**least`` on, and 0. States that are never negative have 255 of them, 64 powers of two (E6M2); others have a sign
    and 127, 32 powers of two (E5M2 with another bias). Larger values become the largest.

    Args:
        dtype: of the stored elements: float32, bfloat16, uint8, or int32 of steps, which are counted exactly.
        signed: values may be negative.
        least: exponent of the least 8-bit number above 0.

    >>> sums = StateFormat(torch.uint8, signed=False, least=-48)
    >>> sums.decoded(sums.encoded(torch.tensor([0.0, 0.3, 1e-30, 1e9]), None)).tolist()
    [0.0, 0.3125, 3.552713678800501e-15, 49152.0]
    """

    dtype: torch.dtype
    signed: bool = True
    least: int = LEAST_SIGNED

    @property
    def exact(self) -> bool:
        """Whether elements are stored as rules compute them."""
        return self.dtype not in (torch.bfloat16, torch.uint8)

    def decoded(self, stored: Tensor) -> Tensor:
        """Stored elements as rules compute with them: float32, or int32 of steps."""
        if self.dtype is not torch.uint8:
            return stored if self.exact else stored.float()
        codes = stored.to(torch.int32)
        size = codes & 127 if self.signed else codes
        values = ((size - 1 + self._first) << _DROPPED).view(torch.float32) * (size > 0)
        return torch.where(codes > 127, -values, values) if self.signed else values

    def encoded(self, values: Tensor, words: Tensor | None) -> Tensor:
        """Values as they are stored.

        Values between two elements become the upper one with a probability by which the mean is kept. A state that is
        never negative does not fall to 0, for rules divide by its root: positive values below ``2**least`` become that.

        Args:
            values: floats ``[n, width]``; integers of steps.
            words: of :func:`random_words`; None rounds to nearest.
        """
        if self.exact:
            return values.to(self.dtype)
        values = values.float()
        if self.dtype is torch.bfloat16:
            return round_to_halves(values, torch.bfloat16, words)
        size = values.abs() if self.signed else values.abs().masked_fill(values < 0, 0.0)
        moved = size.view(torch.int32).long() + (1 << _DROPPED - 1 if words is None else words >> 32 - _DROPPED)
        codes = (moved >> _DROPPED) - self._first + 1
        if self.signed:
            part = 0.5 if words is None else uniform(words)
            small = torch.floor(size * 2.0**-self.least + part).long()
        else:
            small = (size > 0).long()
        codes = torch.where(size < 2.0**self.least, small, codes.clamp_max(127 if self.signed else 255))
        return (codes | (torch.signbit(values).long() << 7) if self.signed else codes).to(torch.uint8)

    @property
    def _first(self) -> int:
        """Upper bits of the float32 that is the least number."""
        return 127 + self.least << 23 - _DROPPED


class Rule(Protocol):
    """What an optimizer's rule says of its state, see :class:`recsys_embed.optim.FusedOptimizer`."""

    @property
    def formats(self) -> Mapping[str, StateFormat]: ...

    def reset_state_(self, name: str, state: Tensor, weight: Tensor) -> None: ...


def state_words(rows: Tensor, width: int, number: int, seed: int, step: int) -> Tensor:
    """Random bits by which a state is rounded in a step, see :func:`random_words`.

    Args:
        number: of the state among those of the rule.
        seed: of the storage.
    """
    return random_words(rows.long(), width, seed + 1 + number, step)


def read_state(rule: Rule, state: Mapping[str, Tensor], rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """States of some rows as rules compute with them, by name, without the steps of ``last``: copies.

    Args:
        state: by name, stored.
        rows: int64 ``[n]``.
        dtype: of floats.
    """
    out = {}
    for name, form in rule.formats.items():
        if name != "last":
            values = form.decoded(state[name].index_select(0, rows))
            out[name] = values.to(dtype) if values.is_floating_point() else values
    return out


def write_state(
    rule: Rule,
    state: Mapping[str, Tensor],
    rows: Tensor,
    values: Mapping[str, Tensor],
    seed: int,
    step: int,
) -> None:
    """Store states of distinct rows after a step; see :func:`read_state`."""
    for number, (name, new) in enumerate(values.items()):
        form = rule.formats[name]
        words = None if form.exact else state_words(rows, new.shape[1], number, seed, step)
        state[name][rows] = form.encoded(new, words)


def rounded_state(rule: Rule, values: Mapping[str, Tensor], rows: Tensor, seed: int, step: int) -> dict[str, Tensor]:
    """What :func:`read_state` would give of states after :func:`write_state`."""
    out = dict(values)
    for number, (name, new) in enumerate(values.items()):
        form = rule.formats[name]
        if not form.exact:
            stored = form.encoded(new, state_words(rows, new.shape[1], number, seed, step))
            out[name] = form.decoded(stored).to(new.dtype)
    return out


def reset_state(rule: Rule, name: str, state: Tensor, weight: Tensor) -> None:
    """Set a stored state to what it is before the first step, in place: ``reset_state_``, rounded to nearest."""
    form = rule.formats[name]
    if form.exact:
        rule.reset_state_(name, state, weight)
        return
    for start, stored in zip(range(0, len(state), _CHUNK), state.split(_CHUNK), strict=False):
        values = torch.empty(stored.shape, device=stored.device)
        rule.reset_state_(name, values, weight[start : start + len(stored)])
        stored.copy_(form.encoded(values, None))


def copy_state(rule: Rule, name: str, to: Tensor, saved: Tensor) -> None:
    """Copy a saved state, of any precision, to a stored one; between precisions it is rounded to nearest."""
    form = rule.formats[name]
    saved = saved.detach()
    if saved.dtype is to.dtype or form.dtype is torch.int32:
        to.copy_(saved)
        return
    for stored, values in zip(to.split(_CHUNK), saved.split(_CHUNK), strict=True):
        before = form._replace(dtype=values.dtype).decoded(values)
        stored.copy_(form.encoded(before, None))
