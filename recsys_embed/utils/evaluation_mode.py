"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(root: nn.Module) -> Iterator[None]:
    """Call ``root.eval()``, and at the end put every module back into the mode that it had.

    ``root.train()`` would not do: it sets modules to training that their owner keeps in evaluation, frozen.

    >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with evaluation_mode(net):
    ...     print(net[0].training)
    False
    >>> net.training, net[0].training, net[1].training
    (True, True, False)
    """
    training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
