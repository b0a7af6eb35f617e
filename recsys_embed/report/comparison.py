"""Tables of a comparison for terminals and for documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recsys_embed.train.compare import Summary
from recsys_embed.utils.optional import require

HEADER = (
    "model",
    "method",
    "size",
    "test AUC",
    "logloss",
    "dAUC vs full",
    "weights MiB",
    "training MiB",
    "compression",
    "samples/s",
)


def cells(s: Summary) -> tuple[str, ...]:
    """Texts of one line, in the order of :data:`HEADER`.

    >>> cells(Summary("fm", "hash", "4x", "ok", "", 1, auc=0.75, logloss=0.5, auc_gain=-0.01, samples_per_s=1e4))[3:6]
    ('0.7500', '0.5000', '-0.0100')
    """
    if s.auc is None:
        return (s.model, s.method, s.size, s.status, *[""] * 6)
    return (
        s.model,
        s.method,
        s.size,
        _spread(s.auc, s.auc_sd),
        _spread(s.logloss, s.logloss_sd),
        "" if s.method == "full" else _spread(s.auc_gain, s.auc_gain_sd, sign=True),
        f"{s.footprint.serve / 2**20:.3f}",
        f"{s.footprint.train / 2**20:.3f}",
        "" if s.compression is None else f"{s.compression:.1f}x",
        "" if s.samples_per_s is None else f"{s.samples_per_s:,.0f}",
    )


def _spread(mean: float | None, sd: float | None, sign: bool = False) -> str:
    if mean is None:
        return ""
    text = f"{mean:+.4f}" if sign else f"{mean:.4f}"
    return text if sd is None else f"{text} ± {sd:.4f}"


def reasons(summaries: Sequence[Summary]) -> list[str]:
    """One sentence per line of the table that lacks results."""
    return [f"{s.model} {s.method} {s.size}: {' '.join(s.reason.split())}" for s in summaries if s.reason]


def rich_table(summaries: Sequence[Summary], title: str = "") -> Any:
    """The table as a :class:`rich.table.Table`."""
    models = {s.model for s in summaries}
    # One model needs no column, and headers break between words, so that one seed fits 80 columns.
    skip = 1 if len(models) == 1 else 0
    title = ", ".join(t for t in (*(models if skip else ()), title) if t)
    box = require("rich.box", extra="train", purpose="the table").SIMPLE_HEAD
    table = require("rich.table", extra="train", purpose="the table").Table(
        title=title or None, box=box, padding=0, pad_edge=False
    )
    for i, name in enumerate(HEADER[skip:]):
        name = name.replace(" ", "\n").replace("compression", "com-\npression")
        table.add_column(name, justify="left" if i + skip < 3 else "right", no_wrap=True)
    previous = None
    for s in summaries:
        if previous is not None and previous != s.model:
            table.add_section()
        table.add_row(*cells(s)[skip:], style="dim" if s.auc is None else None)
        previous = s.model
    return table


def markdown_table(summaries: Sequence[Summary]) -> str:
    """The table as Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER), *(cells(s) for s in summaries)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
