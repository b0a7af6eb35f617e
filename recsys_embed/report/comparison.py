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


def header(summaries: Sequence[Summary]) -> tuple[str, ...]:
    """Titles of the columns: :data:`HEADER`, or of retrieval models, recall and NDCG before those of clicks.

    >>> header([Summary("twotower", "full", "", "ok", "", 1, ranking={"recall@10": 0.2, "ndcg@10": 0.1})])[3:6]
    ('recall@10', 'NDCG@10', 'dNDCG@10 vs full')
    """
    ranked = list(dict.fromkeys(name for s in summaries for name in s.ranking))
    if not ranked:
        return HEADER
    clicks = [HEADER[3]] * any(s.auc is not None for s in summaries)
    clicks += [HEADER[4]] * any(s.logloss is not None for s in summaries)
    titles = [_title(name) for name in ranked]
    return (*HEADER[:3], *titles, *clicks, f"d{_title(_main(ranked))} vs full", *HEADER[6:])


def _title(name: str) -> str:
    return name.replace("ndcg", "NDCG").replace("rmse", "RMSE")


def _main(names: Sequence[str]) -> str:
    """The metric that validations go by."""
    return next((name for name in names if name.startswith("ndcg")), names[0])


def cells(s: Summary, titles: Sequence[str] = HEADER) -> tuple[str, ...]:
    """Texts of one line, in the order of the titles.

    >>> cells(Summary("fm", "hash", "4x", "ok", "", 1, auc=0.75, logloss=0.5, auc_gain=-0.01, samples_per_s=1e4))[3:6]
    ('0.7500', '0.5000', '-0.0100')
    """
    if not s.seeds:
        return (s.model, s.method, s.size, s.status, *[""] * (len(titles) - 4))
    found = {
        "model": s.model,
        "method": s.method,
        "size": s.size,
        "test AUC": _spread(s.auc, s.auc_sd),
        "logloss": _spread(s.logloss, s.logloss_sd),
        "dAUC vs full": _spread(s.auc_gain, s.auc_gain_sd, sign=True),
        "weights MiB": f"{s.footprint.serve / 2**20:.3f}",
        "training MiB": f"{s.footprint.train / 2**20:.3f}",
        "compression": "" if s.compression is None else f"{s.compression:.1f}x",
        "samples/s": "" if s.samples_per_s is None else f"{s.samples_per_s:,.0f}",
    }
    for name in s.ranking:
        found[_title(name)] = _spread(s.ranking[name], s.ranking_sd.get(name))
        gain = s.ranking_gain.get(name), s.ranking_gain_sd.get(name)
        found[f"d{_title(name)} vs full"] = _spread(*gain, sign=True)
    return tuple("" if t.endswith(" vs full") and s.method == "full" else found.get(t, "") for t in titles)


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
    titles = header(summaries)
    for i, name in enumerate(titles[skip:]):
        name = name.replace(" ", "\n").replace("compression", "com-\npression")
        table.add_column(name, justify="left" if i + skip < 3 else "right", no_wrap=True)
    previous = None
    for s in summaries:
        if previous is not None and previous != s.model:
            table.add_section()
        table.add_row(*cells(s, titles)[skip:], style=None if s.seeds else "dim")
        previous = s.model
    return table


def markdown_table(summaries: Sequence[Summary]) -> str:
    """The table as Markdown."""
    titles = header(summaries)
    lines = [titles, tuple("---" for _ in titles), *(cells(s, titles) for s in summaries)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
