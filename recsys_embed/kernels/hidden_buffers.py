"""Tensors of a state dict that tools find and set by name, but that loops over a module's buffers do not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class HiddenBuffers(dict[str, Any]):
    """The dictionary of a module's buffers, with hidden ones that are neither listed nor counted.

    Accelerate fills a module without memory tensor by tensor and asks this dictionary for the names of a state dict;
    averages of buffers and casts must leave these tensors alone.

    Args:
        hidden: by name.
        check: is called with the name and the new value before a hidden one is set, and may raise.

    Attributes:
        refuse: is called where somebody asks for a hidden name that stands for no tensor (None), and raises.
    """

    hidden: dict[str, Any] = {}  # noqa: RUF012 (copies and pickles fill the dictionary before they set attributes)
    check: Callable[[str, Tensor], None] | None = None
    refuse: Callable[[], None] | None = None

    def __init__(self, hidden: dict[str, Any], check: Callable[[str, Tensor], None] | None = None) -> None:
        super().__init__()
        self.hidden, self.check = hidden, check

    def __contains__(self, name: object) -> bool:
        if name not in self.hidden:
            return super().__contains__(name)
        if self.hidden[name] is None and self.refuse is not None:
            self.refuse()
        return True

    def __getitem__(self, name: str) -> Any:
        return self.hidden[name] if name in self.hidden else super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.hidden:
            super().__setitem__(name, value)
            return
        if self.check is not None:
            self.check(name, value)
        self.hidden[name] = value.contiguous()
