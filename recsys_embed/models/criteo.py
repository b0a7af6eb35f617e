"""The earlier default of ``num_dense``: the number of Criteo's numeric columns."""

from __future__ import annotations

import warnings

NUM_DENSE = 13


def former_default() -> int:
    """The value of ``num_dense`` where it is not given; deprecated."""
    warnings.warn(
        f"a model built without `num_dense` has Criteo's {NUM_DENSE} numeric columns; say how many the data has, as "
        "num_dense=data.num_dense: the default goes away",
        DeprecationWarning,
        stacklevel=3,
    )
    return NUM_DENSE
