"""Integer fields as numbers (logarithm) or as categories (buckets)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recsys_embed.data.criteo.layout import INT_NAMES
from recsys_embed.data.criteo.parse import BLANK_INT

Dense = Literal["log", "bucket"]
LOG_SHIFT = {name: 4.0 if name == "I2" else 1.0 for name in INT_NAMES}
"""I2 alone holds meaningful negatives (down to -3, and -1 is common): it is log(x + 4), the others are log(x + 1)."""


def log_transform(name: str, column: NDArray[np.int64]) -> NDArray[np.float32]:
    """``log(max(x, 1 - shift) + shift)`` in float64, rounded to float32; an empty field becomes 0.

    The smallest result is 0, so a value below the range counts as its smallest member (for I2 that is -3, for the
    others 0). The shift of I2 follows the Unified Embedding study (Coleman et al., NeurIPS 2023).

    >>> log_transform("I1", np.array([0, 1, -5, BLANK_INT])).round(3).tolist()
    [0.0, 0.6930000185966492, 0.0, 0.0]
    """
    shift = LOG_SHIFT[name]
    out: NDArray[np.float32] = np.log(np.maximum(column, 1 - shift) + shift).astype(np.float32)
    return out


def bucket_transform(column: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """``floor(ln(x)^2)`` above 2 and x itself otherwise, as OptEmbed's preprocessing; and where the field is empty.

    Buckets are signed; they are returned as their 64-bit pattern, the form vocabularies hold.

    >>> bucket_transform(np.array([2, 3, 100, -1]))[0].view(np.int64).tolist()
    [2, 1, 21, -1]
    """
    large = column > 2
    logs = np.log(np.where(large, column, 1).astype(np.float64))
    missing = column == BLANK_INT
    buckets = np.where(large, np.floor(logs * logs).astype(np.int64), np.where(missing, 0, column))
    return buckets.view(np.uint64), missing


def transform_record(dense: Dense) -> dict[str, Any]:
    """What ``schema.json`` says about the integer fields."""
    if dense == "bucket":
        return {"kind": "bucket", "rule": "floor(ln(x)^2) if x > 2 else x; empty is a value of its own"}
    return {"kind": "log", "shift": LOG_SHIFT, "rule": "log(max(x, 1 - shift) + shift)", "empty": 0.0}
