"""Ship a model: one small file, and a module that serves it with torch and numpy alone.

``recsys_embed.export`` is both this package and the function in it: importing a package sets its name on its parent,
so the package can be called like the function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from recsys_embed.export.read import load, verify
from recsys_embed.export.report import ExportReport, Metric, TableOutcome
from recsys_embed.export.write import export

__all__ = ["ExportReport", "Metric", "TableOutcome", "export", "load", "verify"]


class _Package(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> ExportReport:
        return export(*args, **options)


sys.modules[__name__].__class__ = _Package
