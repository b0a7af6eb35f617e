"""Steps of a table's optimizer, and bringing rows that did not take part in them up to date."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import torch
from torch import Tensor

from recsys_embed.optim import FusedOptimizer

# Rows that are brought up to date at a time where that takes copies of them.
_CHUNK = 1 << 18


class Pace:
    """Learning rates, step sizes and epsilons of steps ``first + 1`` to ``step``, which some row may have missed."""

    def __init__(self, step: int = 0) -> None:
        self.first = step
        self.rates, self.sizes, self.epsilons = array("d"), array("d"), array("d")

    @property
    def step(self) -> int:
        """Number of steps so far."""
        return self.first + len(self.rates)

    def advance(self, optimizer: FusedOptimizer, lr: float) -> None:
        """One more step; those before it are kept only for optimizers that move all rows."""
        if not optimizer.lazy:
            self.settled()
        size, epsilon = optimizer.pace(lr, self.step + 1)
        for values, value in ((self.rates, lr), (self.sizes, size), (self.epsilons, epsilon)):
            values.append(value)

    def settled(self) -> None:
        """All rows are up to date."""
        self.first = self.step
        for values in (self.rates, self.sizes, self.epsilons):
            del values[:]


def catch_up(
    optimizer: FusedOptimizer,
    weight: Tensor,
    state: Mapping[str, Tensor],
    rows: Tensor | None,
    pace: Pace,
    step: int,
) -> None:
    """Take the steps up to ``step`` that rows missed, in place; their gradient was the weight decay alone.

    Args:
        weight: ``[rows, width]``.
        state: per name of ``optimizer.tensors``.
        rows: distinct, int64 ``[n]``; all by default.
    """
    if rows is None:
        rows = (state["last"].squeeze(1) < step).nonzero().squeeze(1)
    for chunk in rows.split(_CHUNK):
        last, order = state["last"][chunk, 0].sort()
        behind = int(torch.searchsorted(last, step, out_int32=True))
        if behind == 0:
            continue
        picked, last = chunk[order[:behind]], last[:behind]
        work = torch.promote_types(weight.dtype, torch.float32)
        w = weight.index_select(0, picked).to(work)
        own = {name: state[name].index_select(0, picked).to(work) for name in optimizer.state}
        first = int(last[0])
        # Row i takes part from step last[i] + 1 on, so that those of each step stand in front.
        counts = torch.searchsorted(last, torch.arange(first + 1, step + 1, dtype=last.dtype, device=last.device))
        for t, count in enumerate(counts.tolist(), first + 1):
            part = {name: values[:count] for name, values in own.items()}
            moved = optimizer.update(
                w[:count], w[:count] * optimizer.weight_decay, part, pace.rates[t - pace.first - 1], t
            )
            w[:count] = moved
            for name, values in own.items():
                values[:count] = part[name]
        weight[picked] = w.to(weight.dtype)
        for name, values in own.items():
            state[name][picked] = values.to(state[name].dtype)
        state["last"][picked] = step
