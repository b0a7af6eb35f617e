"""Ship a model: one small file, and a module that serves it with torch and numpy alone."""

from __future__ import annotations

from recsys_embed.export.read import load, verify
from recsys_embed.export.report import ExportReport, Metric, TableOutcome
from recsys_embed.export.write import export

__all__ = ["ExportReport", "Metric", "TableOutcome", "export", "load", "verify"]
