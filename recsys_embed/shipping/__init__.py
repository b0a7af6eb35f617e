"""Ship a model: one small file, and a module that serves it with torch and numpy alone."""

from __future__ import annotations

from recsys_embed.shipping.read import load, verify
from recsys_embed.shipping.report import ExportReport, Metric, TableOutcome
from recsys_embed.shipping.write import export

__all__ = ["ExportReport", "Metric", "TableOutcome", "export", "load", "verify"]
