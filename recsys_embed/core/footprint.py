"""Memory footprints, computed without allocation: byte budgets, and bytes to serve and to train a set of tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral

from recsys_embed.errors import ConfigError

_UNITS = {"": 1, "B": 1, **{f"{u}iB": 1024**i for i, u in enumerate("KMGT", 1)}}
_UNITS |= {f"{u}B": 1000**i for i, u in enumerate("KMGT", 1)}
# At most so many digits: text from a file stays within what int() parses and a tensor could hold.
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(size: str | int) -> int:
    """Bytes of ``"64MiB"``, ``"1.5 GiB"``, ``"10MB"`` (decimal) or an integer.

    Raises:
        ConfigError: not a size, or not positive.

    >>> parse_bytes("4MiB"), parse_bytes("2kb"), parse_bytes(10)
    (4194304, 2000, 10)
    """
    if isinstance(size, Integral) and not isinstance(size, bool):
        value = int(size)
    else:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        units = {u.lower(): n for u, n in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            raise ConfigError(f"a byte size is an integer or text like '64MiB', '1.5GiB', '10MB'; got {size!r}")
        value = int(Fraction(match[1]) * units[match[2].lower()])
    if value < 1:
        raise ConfigError(f"a byte size must be at least 1 byte; got {size!r}")
    return value


def format_bytes(size: int | float) -> str:
    """Human text in units of 1024.

    >>> format_bytes(4 * 1024 * 1024), format_bytes(10)
    ('4.00 MiB', '10 B')
    """
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if abs(size) >= 1024**power:
            return f"{size / 1024**power:.2f} {unit}"
    return f"{size:g} B"


@dataclass(frozen=True)
class Footprint:
    """Bytes of embedding tables, by purpose.

    Args:
        weights: learned values that serving reads (tables, projections, per-id weights).
        index: remap, pointer and code buffers.
        optimizer: state of the tables' optimizer.
        gradient: peak gradient buffers of one step; 0 if the update is fused or the batch is unknown.
        unrounded: what rows take more while they train than rounded to the precision that they are served in.

    >>> a = Footprint(weights=100, index=10, optimizer=5); b = a + a
    >>> b.serve, b.train
    (220, 230)
    """

    weights: int = 0
    index: int = 0
    optimizer: int = 0
    gradient: int = 0
    unrounded: int = 0

    @property
    def serve(self) -> int:
        """Deployed bytes: weights and index buffers."""
        return self.weights + self.index

    @property
    def train(self) -> int:
        """Bytes held while training: rows before they are rounded, index buffers, optimizer state and gradients."""
        return self.serve + self.unrounded + self.optimizer + self.gradient

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.weights + other.weights,
            self.index + other.index,
            self.optimizer + other.optimizer,
            self.gradient + other.gradient,
            self.unrounded + other.unrounded,
        )
