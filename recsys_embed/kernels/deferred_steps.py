"""Deferred optimizer steps: a log of the steps of a table, and the replay of those that a row missed."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import torch
from torch import Tensor

from recsys_embed.kernels.low_precision_table import LowPrecisionTable, rows_to_step
from recsys_embed.optim import FusedOptimizer
from recsys_embed.optim.state_format import rounded_state

# Rows per replay, which works on copies of them.
_CHUNK = 1 << 18


class StepLog:
    """Rates, step sizes and epsilons of steps ``first + 1`` to ``step``, which may be deferred for some rows.

    Args:
        step: number of steps so far.
        seed: of the random bits by which state of few bits is rounded.
    """

    # The number of steps where state dicts see it, once one has asked.
    _seen: array[int] | None = None
    # Torch's count of the table's writes after the last one here; None where others may have written since.
    writes: int | None = None

    def __init__(self, step: int = 0, seed: int = 0) -> None:
        self.first, self.seed = step, seed
        self.rates, self.sizes, self.epsilons = array("d"), array("d"), array("d")

    @property
    def step(self) -> int:
        """Number of steps so far."""
        return self.first + len(self.rates)

    def advance(self, optimizer: FusedOptimizer, lr: float) -> None:
        """Log one more step; earlier ones are kept only where rows may still need them."""
        if not optimizer.lazy:
            self.clear()
        size, epsilon = optimizer.size_and_epsilon(lr, self.step + 1)
        for values, value in ((self.rates, lr), (self.sizes, size), (self.epsilons, epsilon)):
            values.append(value)
        if self._seen is not None:
            self._seen[0] = self.step

    def retract(self) -> None:
        """Take back the last :meth:`advance`, whose step was refused."""
        for values in (self.rates, self.sizes, self.epsilons):
            values.pop()
        if self._seen is not None:
            self._seen[0] = self.step

    def restart(self, step: int) -> None:
        """Count on from ``step``; every row has had the steps so far."""
        self.clear()
        self.first = step
        if self._seen is not None:
            self._seen[0] = step

    def live_count(self) -> Tensor:
        """Number of steps, int64 ``[]``, which goes on counting, as the weights in a state dict go on changing."""
        if self._seen is None:
            self._seen = array("q", [0])
        self._seen[0] = self.step
        return torch.frombuffer(self._seen, dtype=torch.int64)[0]

    def clear(self) -> None:
        """Drop the logged steps: every row has had them."""
        self.first = self.step
        for values in (self.rates, self.sizes, self.epsilons):
            del values[:]


def catch_up(
    optimizer: FusedOptimizer,
    weight: Tensor,
    state: Mapping[str, Tensor],
    rows: Tensor | None,
    log: StepLog,
    step: int,
) -> None:
    """Apply the deferred steps of rows up to ``step``, in place; the gradient of those steps is the weight decay alone.

    Args:
        weight: ``[rows, width]``.
        state: per name of ``optimizer.tensors``.
        rows: distinct, int64 ``[n]``; all by default.
    """
    if rows is None:
        rows = (state["last"].squeeze(1) < step).nonzero().squeeze(1)
    formats = {name: optimizer.formats[name] for name in optimizer.state}
    for chunk in rows.split(_CHUNK):
        last, order = state["last"][chunk, 0].sort()
        missed = int(torch.searchsorted(last, step, out_int32=True))
        if missed == 0:
            continue
        picked, last = chunk[order[:missed]], last[:missed]
        work = torch.promote_types(weight.dtype, torch.float32)
        w = rows_to_step(weight, picked).to(work)
        own = {name: form.decoded(state[name].index_select(0, picked)).to(work) for name, form in formats.items()}
        # Steps before the first of the log are part of every row.
        first = max(int(last[0]), log.first)
        # Rows are sorted by their last step, and row i takes part from step last[i] + 1 on: each step updates a prefix.
        counts = torch.searchsorted(last, torch.arange(first + 1, step + 1, dtype=last.dtype, device=last.device))
        for t, count in enumerate(counts.tolist(), first + 1):
            part = {name: values[:count] for name, values in own.items()}
            moved = optimizer.checked_update(
                w[:count], w[:count] * optimizer.weight_decay, part, log.rates[t - log.first - 1], t
            )
            # Rows of few bits are rounded in each step, whether it was deferred or not.
            w[:count] = weight.after_step(picked[:count], moved, t) if isinstance(weight, LowPrecisionTable) else moved
            part = rounded_state(optimizer, part, picked[:count], log.seed, t)
            for name, values in own.items():
                values[:count] = part[name]
        if isinstance(weight, LowPrecisionTable):
            weight.put_back(picked, w)
        else:
            weight[picked] = w.to(weight.dtype)
        for name, values in own.items():
            state[name][picked] = formats[name].encoded(values, None)  # as they are: each step has rounded them
        state["last"][picked] = step
