"""Criteo's number of numeric columns, which models meant before their makers had to say how many there are."""

from __future__ import annotations

import warnings

NUM_DENSE = 13


def former_default() -> int:
    """What a model built without ``num_dense`` gets for one more version."""
    warnings.warn(
        f"a model built without `num_dense` has Criteo's {NUM_DENSE} numeric columns; say how many the data has, as "
        "num_dense=data.num_dense: the default goes away",
        DeprecationWarning,
        stacklevel=3,
    )
    return NUM_DENSE
