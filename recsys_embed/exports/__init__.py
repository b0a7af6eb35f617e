"""Export a model to one small file, and load it as a module that needs torch and numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recsys_embed.exports.read import load, verify
from recsys_embed.exports.report import ExportReport, Metric, TableOutcome
from recsys_embed.exports.write import export

if TYPE_CHECKING:
    from recsys_embed.exports.graph import to_onnx, to_torch_export

__all__ = ["ExportReport", "Metric", "TableOutcome", "export", "load", "to_onnx", "to_torch_export", "verify"]


def __getattr__(name: str) -> Any:
    # At first use: torch.export takes longer to import than a file to load.
    if name in ("to_onnx", "to_torch_export"):
        from recsys_embed.exports import graph

        return getattr(graph, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
