"""Conversion of results to JSON values."""

from __future__ import annotations

from typing import Any

from recsys_embed.core.footprint import Footprint


def footprint_dict(footprint: Footprint) -> dict[str, int]:
    """A footprint as JSON values, sums included."""
    return {
        "weights": footprint.weights,
        "index": footprint.index,
        "optimizer": footprint.optimizer,
        "gradient": footprint.gradient,
        "unrounded": footprint.unrounded,
        "serve": footprint.serve,
        "train": footprint.train,
    }


def json_ready(value: Any) -> Any:
    """JSON values: numbers that JSON lacks become None."""
    if isinstance(value, dict):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
