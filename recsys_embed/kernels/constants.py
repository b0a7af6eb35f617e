"""Integer tensors that a module derives from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

Integers: TypeAlias = Sequence["int | Integers"]
"""Nested lists of integers."""


class Constants(nn.Module):
    """Holds named int64 tensors that are not in the state dict, rebuilt from Python integers when the module moves.

    They are no buffers: averaging buffers, offloading or the meta device would change integers that the configuration
    determines.
    """

    def __init__(self) -> None:
        super().__init__()
        self._integers: dict[str, Integers] = {}

    def add_constant(self, name: str, values: Integers, device: torch.device | None = None) -> None:
        """Hold nested lists of integers as a tensor, on torch's default device unless given."""
        self._integers[name] = values
        self.__dict__[_key(name)] = torch.tensor(values, dtype=torch.int64, device=device)

    def constant(self, name: str, near: Tensor) -> Tensor:
        """A constant on the device of ``near``."""
        value: Tensor = self.__dict__[_key(name)]
        return value if value.device == near.device else self._moved(name, near.device)

    def _moved(self, name: str, device: torch.device) -> Tensor:
        """A constant on a device that the module itself did not move to: that of tables put into it, or a replica's."""
        value = torch.tensor(self._integers[name], dtype=torch.int64, device=device)
        if device.type != "meta" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            self.__dict__[_key(name)] = value
        return value

    def integers_of(self, name: str) -> Integers:
        """The nested lists of integers of a constant."""
        return self._integers[name]

    def recreate_derived_tensors(self, device: torch.device) -> None:
        """Put all constants on a device."""
        for name, values in list(self._integers.items()):
            self.add_constant(name, values, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name in self._integers:
            held: Tensor = self.__dict__[_key(name)]
            # A module whose tables were put into it one by one may have left its constants without memory.
            device = fn(torch.empty(0, dtype=torch.int64, device="cpu" if held.is_meta else held.device)).device
            if device != held.device:
                self.recreate_derived_tensors(device)
            break
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, values in self._integers.items():  # modules of earlier versions, pickled whole, had buffers
            buffer = self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
            if buffer is not None:
                self.add_constant(name, values, buffer.device)


def _key(name: str) -> str:
    return f"constant_{name}"
