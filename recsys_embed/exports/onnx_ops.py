"""ONNX translations of torch's operators that compute the same numbers: exact integers, and bags pooled at once.

The exporter's own divide integers in float32, cannot shift by a tensor, call an empty batch out of range and loop over
bags one at a time. These replace them, for the models of this library and of anybody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def translations() -> dict[Any, Callable[..., Any]]:
    """Translations by torch operator, for ``torch.onnx.export(custom_translation_table=...)``.

    Raises:
        MissingDependencyError: onnxscript is not installed.
    """
    from recsys_embed.exports.onnx_translations import TRANSLATIONS

    return TRANSLATIONS
