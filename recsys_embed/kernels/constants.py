"""Integers that a module derives from its configuration and reads as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self, TypeAlias

import torch
from torch import Tensor, nn

Integers: TypeAlias = Sequence["int | Integers"]
"""Nested lists of integers."""


class Constants(nn.Module):
    """Holds named int64 tensors outside the state dict, rebuilt from Python integers wherever the module moves.

    A module that passes through the meta device loses what buffers hold; these come back by themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self._integers: dict[str, Integers] = {}

    def add_constant(self, name: str, values: Integers, device: torch.device | None = None) -> None:
        """Register nested lists of integers as the tensor ``self.<name>``, on torch's default device unless given."""
        self._integers[name] = values
        self.register_buffer(name, torch.tensor(values, dtype=torch.int64, device=device), persistent=False)

    def constant(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        return value

    def integers_of(self, name: str) -> Integers:
        """The nested lists that a constant was made of."""
        return self._integers[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, values in self._integers.items():
            self.add_constant(name, values, self.constant(name).device)
        return self
