"""Loss by rounding: what rows that are served at a precision keep of the signal they were trained to.

Rounding adds noise to every number of a row. Its size is the squared rounding error relative to the squares of the
row, which for rows of normal numbers is a number per precision and width, :data:`ERRORS`: the range of more columns is
wider, and so are the steps between codes. What it destroys of the signal was set by exports of trained models: where
a network reads the rows, two bits cost DeepFM and DCNv2 on a Criteo sample 0.0000 to 0.0002 of AUC with full tables and
0.0009 with shared ones (:data:`LOST_PER_ERROR`); where none does, recall@20 of matrix factorisation on MovieLens-100K
fell by 12 to 25 % at two bits and by up to 2 % at four (:data:`LOST_PER_ERROR_WITHOUT_NETWORK`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any, get_args

import numpy as np

from recsys_embed.core.precision import Layout, Precision, check_precision
from recsys_embed.core.program import Table
from recsys_embed.errors import ConfigError

AUTO: tuple[Precision, ...] = ("fp32", "int8", "int4", "int2")
"""Precisions that ``"auto"`` chooses from. fp16, bf16 and fp8 take more bytes than int8 for errors that matter less."""
COLUMNS = (8, 16, 32, 64, 128, 256)
ERRORS = {
    "fp64": (0.0,) * 6,
    "fp32": (0.0,) * 6,
    "fp16": (4.3e-8,) * 6,
    "bf16": (2.7e-6,) * 6,
    "fp8": (7.0e-4,) * 6,
    "int8": (8.5e-6, 1.5e-5, 2.1e-5, 2.8e-5, 3.5e-5, 4.1e-5),
    "int4": (0.0020, 0.0035, 0.0050, 0.0067, 0.0082, 0.0096),
    "int2": (0.039, 0.065, 0.088, 0.103, 0.110, 0.115),
}
"""Relative squared error of rows of normal numbers by their :data:`COLUMNS`, with the searches that exports use."""


LOST_PER_ERROR = 0.25
LOST_PER_ERROR_WITHOUT_NETWORK = 2.0
WORTH_TIERS = 0.02
"""Share of a feature's signal that rows of the fewest bits have to lose for tiers of several precisions to be tried."""


@cache
def rounding_error(precision: str, columns: int) -> float:
    """Relative squared error of rows that share a scale over ``columns`` numbers."""
    return float(np.interp(np.log2(columns), np.log2(COLUMNS), ERRORS[precision]))


def signal_kept(
    table: Table, without_network: bool = False, precision: str | None = None, *, columns: int = 1
) -> float:
    """Share of the signal that the rows of a table keep at its precision.

    Args:
        without_network: no network reads the rows beside many others.
        precision: another than the table's.
        columns: of the vectors that rows make. Narrower rows lose no less than rows as wide: what they hold in fewer
            numbers is spread less evenly than the normal numbers of :data:`ERRORS`.

    >>> from recsys_embed.core.program import Initializer
    >>> signal_kept(Table("w", 1000, 16, Initializer("constant"), precision="int4"))
    0.999125
    """
    lost = LOST_PER_ERROR_WITHOUT_NETWORK if without_network else LOST_PER_ERROR
    return 1.0 - lost * _error(table.width, precision or table.precision, min(table.rows, COLUMNS[-1]), columns)


@cache
def _error(width: int, precision: str, rows: int, columns: int) -> float:
    if precision == "fp32":
        return 0.0
    layout = Layout.of(width, precision, rows=rows)
    return rounding_error(layout.kind, max(layout.block * layout.width, columns))


def tiers_can_pay(menu: Iterable[str], width: int, without_network: bool) -> bool:
    """Whether ids at several precisions can keep enough more than all at the fewest bits to be worth the time.

    >>> tiers_can_pay(AUTO, 16, without_network=False), tiers_can_pay(AUTO, 16, without_network=True)
    (False, True)
    """
    lost = LOST_PER_ERROR_WITHOUT_NETWORK if without_network else LOST_PER_ERROR
    return lost * max(rounding_error(kind, width) for kind in menu) >= WORTH_TIERS


def precisions_of(given: Any) -> tuple[Precision, ...]:
    """The precisions that a plan may choose from.

    Args:
        given: ``"auto"``, a name, or names.

    Raises:
        ConfigError: no precision, or an unknown one.
    """
    if given == "auto":
        return AUTO
    names: Iterable[Any] = [given] if isinstance(given, str) else given
    if not isinstance(names, Collection) or isinstance(names, bytes) or not names:
        known = ", ".join(get_args(Precision))
        raise ConfigError(f"`precision` must be 'auto', or one or more of {known}; got {given!r:.80}")
    return tuple(dict.fromkeys(check_precision(name) for name in names))
