"""The report that :func:`recsys_embed.memory_report` returns: its values, and the forms in which it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recsys_embed._version import __version__
from recsys_embed.report.memory.arrays import PRECISIONS
from recsys_embed.report.memory.page import render_page
from recsys_embed.report.memory.report_values import ReportValues
from recsys_embed.report.memory.text import render_markdown, render_text
from recsys_embed.utils.files import write_text

VERSION = 1


class MemoryReport(ReportValues):
    """Bytes of a model's embedding tables by cause, per table and in total.

    ``print(report)`` shows a table; ``to_markdown``, ``to_json`` and ``to_html`` write the same.
    """

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, limit: int | None = 30, width: int = 100) -> str:
        """Tables for a terminal.

        Args:
            limit: tables listed, largest first; the others are summed in a line. None lists all.
            width: columns at most.
        """
        return render_text(self, limit, width)

    def to_markdown(self, limit: int | None = None) -> str:
        """The same as Markdown."""
        return render_markdown(self, limit)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``version`` names this form."""
        serve, whole = self.total("serve"), self.total("serve", "model")
        return {
            "kind": "recsys_embed.memory_report",
            "version": VERSION,
            "made_by": f"recsys-embed {__version__}",
            "source": self.source,
            "settings": self.settings.to_dict(),
            "tables": [{**t.to_dict(), "share": t.serve / whole if whole else 0.0} for t in self.tables],
            "rest": {**vars(self.rest), "serve": self.rest.serve, "train": self.rest.train},
            "totals": {
                "serve": serve,
                "train": self.total("train"),
                "peak": self.total("peak"),
                **vars(self.footprint),
                "weights": sum(t.weights for t in self.tables),
                "stored": sum(t.stored for t in self.tables),
                "lookup": sum(t.lookup for t in self.tables),
                "activations": sum(t.activations for t in self.tables),
                "plain": self.plain,
                "model_serve": whole,
                "model_train": self.total("train", "model"),
                "share": self.share,
            },
            "precisions": {p: self.stored(p) for p in PRECISIONS},
            "alternatives": [a.to_dict() for a in self.alternatives()],
            "notes": list(self.notes),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to ``path`` where one is given (whole or not at all)."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """One page with charts that needs no network, also written to ``path`` where one is given."""
        text = render_page(self)
        if path is not None:
            write_text(path, text)
        return text
