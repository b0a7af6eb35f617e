"""The memory report for terminals and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.precision import Precision

if TYPE_CHECKING:
    from recsys_embed.report.memory.report_values import ReportValues, TableReport

SHOWN: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
"""Precisions of the tables of texts; bf16 takes what fp16 takes."""
GRADIENTS = {
    "dense": "dense: one number per weight",
    "sparse": "sparse: one row per id read",
    "fused": "fused: none in backward, rows at step()",
    "frozen": "frozen: none",
}


@dataclass(frozen=True)
class Grid:
    """A table of texts; ``left`` is the number of columns that stand at the left."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    title: str = ""


def render_text(report: ReportValues, limit: int | None, width: int) -> str:
    """Every grid of the report in at most ``width`` columns, and its notes."""
    lines = [headline(report), ""]
    for grid in grids(report, limit):
        lines += grid.title.splitlines()
        lines += [*_aligned(grid, width), ""]
    for note in report.notes:
        lines += _wrapped(f"note: {note}", width)
    return "\n".join(lines).rstrip() + "\n"


def render_markdown(report: ReportValues, limit: int | None) -> str:
    """Every grid of the report as a Markdown table."""
    lines = ["# Memory report", "", _escape(headline(report)), ""]
    for grid in grids(report, limit):
        lines += [f"## {' '.join(grid.title.split())}", ""] if grid.title else []
        rule = ("---",) * grid.left + ("---:",) * (len(grid.header) - grid.left)
        for row in (grid.header, rule, *grid.rows):
            lines.append("| " + " | ".join(row if row is rule else map(_escape, row)) + " |")
        lines.append("")
    lines += [f"- {_escape(note)}" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in a cell too."""
    out = "".join(f"\\{c}" if c in r"\`*_{}[]<>#|~&" else c for c in text)
    return " ".join(out.split())


def headline(report: ReportValues) -> str:
    """The report in one sentence."""
    count = sum(t.storage.kind != "shared" for t in report.tables)
    text = f"{report.source}: {count} embedding table{'' if count == 1 else 's'}, "
    text += f"{format_bytes(report.total('serve'))} to serve, {format_bytes(report.total('train'))} to train"
    if report.rest.serve:
        text += f"; {percent(report.share)} of the model's bytes"
    return text


def percent(share: float | None) -> str:
    """A share for people.

    >>> percent(0.98765), percent(0.00001), percent(0.0), percent(None)
    ('98.8 %', '<0.1 %', '0.0 %', '-')
    """
    if share is None:
        return "-"
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def grids(report: ReportValues, limit: int | None) -> list[Grid]:
    """The tables of the report, as texts."""
    found = [_tables(report, limit), _causes(report)]
    if report.plain:
        found.append(_alternatives(report))
    if any(t.stats is not None for t in report.tables):
        found.append(_statistics(report, limit))
    return [g for g in found if g.rows]


def _largest(tables: Sequence[TableReport], limit: int | None) -> tuple[list[TableReport], list[TableReport]]:
    """The largest tables, in the order of the model, and the others."""
    if limit is None or len(tables) <= limit:
        return list(tables), []
    chosen = set(sorted(range(len(tables)), key=lambda i: (-max(tables[i].serve, tables[i].weights), i))[:limit])
    return [t for i, t in enumerate(tables) if i in chosen], [t for i, t in enumerate(tables) if i not in chosen]


def _tables(report: ReportValues, limit: int | None) -> Grid:
    shown, others = _largest(report.tables, limit)
    whole = report.total("serve", "model") or 1
    columns = [("weights", [t.stored for t in shown], sum(t.stored for t in others))]
    for name in ("index", "optimizer", "gradient"):
        values = [getattr(t, name) for t in shown]
        rest = sum(getattr(t, name) for t in others)
        if any(values) or rest:
            columns.append((name, values, rest))
    header = ("table", "method", "rows", "dim", *(name for name, _, _ in columns), "share")
    rows = []
    for i, t in enumerate(shown):
        sizes = (format_bytes(values[i]) for _, values, _ in columns)
        count = t.storage.ids or sum(a.rows for a in t.storage.arrays_of("table"))
        rows.append((t.name, method(t), _count(count), str(t.storage.width), *sizes, percent(t.serve / whole)))
    if others:
        sizes = (format_bytes(rest) for _, _, rest in columns)
        share = percent(sum(t.serve for t in others) / whole)
        ids = _count(sum(t.storage.ids for t in others))
        rows.append((f"{len(others)} smaller ones", "", ids, "", *sizes, share))
    return Grid(header, tuple(rows), 2)


def method(table: TableReport) -> str:
    """The method of a table, as the report shows it."""
    e = table.storage
    if e.kind == "shared":
        return f"shared by {len(e.read_by)}"
    return f"{e.method} (shared)" if e.shared and not e.arrays else e.method


def _count(n: int) -> str:
    return "" if n == 0 else f"{n:,}" if n < 1e9 else f"{n / 1e9:.2f}e9"


def _causes(report: ReportValues) -> Grid:
    """Bytes by cause, serving and training side by side."""
    tables, rest, total = report.tables, report.rest, report.footprint
    settings = report.settings
    held = sum(t.weights for t in tables)
    precision = settings.precision or ("as planned" if total.unrounded else "as held")
    rows = [("weights", total.weights, held, f"serving: {precision}")]
    if total.index:
        rows.append(("index buffers", total.index, total.index, ""))
    rows.append(("optimizer state", 0, total.optimizer, _optimizers(report)))
    rows.append(("gradients", 0, total.gradient, GRADIENTS[report.update]))
    rows.append(("embedding tables", report.total("serve"), report.total("train"), ""))
    batch = f"of a batch of {settings.batch_size:,}"
    rows.append(("lookup", sum(t.lookup for t in tables), sum(t.activations for t in tables), batch))
    if rest.serve or rest.train:
        rows.append(("rest of the model", rest.serve, rest.train, "without its activations"))
        rows.append(("model", report.total("serve", "model"), report.total("train", "model"), "without activations"))
    texts = tuple((name, format_bytes(a), format_bytes(b), note) for name, a, b, note in rows)
    return Grid(("bytes of", "serving", "training", ""), texts, 1, "By cause")


def _optimizers(report: ReportValues) -> str:
    fused = {type(t.storage.fused).__name__ for t in report.tables if t.storage.fused is not None}
    state_size = report.settings.optimizer
    names = sorted(f"{n}, fused" for n in fused) or ([state_size.name] if state_size else [])
    return "; ".join(names) or "no optimizer named"


def _alternatives(report: ReportValues) -> Grid:
    own = ("as it is", *(format_bytes(report.stored(p)) for p in SHOWN), format_bytes(report.total("train")))
    rows: list[tuple[str, ...]] = [own]
    for a in report.alternatives():
        if a.method == "full":
            if a.serve["fp32"] == report.stored("fp32"):
                continue  # it is
            name = "full, whole"
        else:
            name = f"{a.method}{' *' if a.missed or a.unfit else ''}"
        rows.append((name, *(format_bytes(a.serve[p]) for p in SHOWN), format_bytes(a.train)))
    title = f"What it would cost: every table at 1/{report.settings.ratio:g} of its full bytes"
    if any(row[0].endswith(" *") for row in rows):
        title += " (* some tables need more)"
    mixed = [a.method for a in report.alternatives() if a.own_precisions]
    if mixed:
        title += f"\n({', '.join(mixed)}: rows at precisions of its own in every column)"
    return Grid(("method", *SHOWN, "training"), tuple(rows), 1, title)


def _statistics(report: ReportValues, limit: int | None) -> Grid:
    shown, _ = _largest([t for t in report.tables if t.stats is not None], limit)
    found = [(t, t.stats) for t in shown if t.stats is not None]
    splits = list(dict.fromkeys(s for _, stats in found for s in stats.field.unseen if s != "train"))
    tops = [k for k in (100, 10_000) if any(k < stats.field.distinct for _, stats in found)]
    names = {100: "top 100", 10_000: "top 10k"}
    header = ["table", "ids seen", *(names[k] for k in tops), *(f"unseen {s}" for s in splits)]
    rows = []
    for t, stats in found:
        f, expected, measured = stats.field, stats.expected, stats.measured
        covered = [percent(f.share(k)) if k < f.distinct else "all" for k in tops]
        unseen = [percent(f.unseen.get(s)) for s in splits]
        shared = [percent(None if c is None else c.ids) for c in (expected, measured)]
        mixed = [percent(None if c is None else c.mixed) for c in (expected, measured)]
        rows.append((t.name, _count(f.distinct), *covered, *unseen, *shared, *mixed))
    header += ["shared", "measured", "mixed", "measured"]
    title = (
        "Frequencies: lookups that the top rows cover; ids whose vector is shared with others, and how\n"
        "much of its lookups are others' (expected, and measured on the ids)"
    )
    return Grid(tuple(header), tuple(rows), 1, title)


# -- layout --------------------------------------------------------------------------------------------------------


def _aligned(grid: Grid, width: int) -> list[str]:
    table = [grid.header, *grid.rows]
    sizes = [max(len(row[i]) for row in table) for i in range(len(grid.header))]
    # Only names are cut, and they keep their ends, which tell them apart.
    spare = width - sum(sizes[1:]) - 2 * (len(sizes) - 1)
    sizes[0] = min(sizes[0], max(8, spare))
    lines = []
    for number, row in enumerate(table):
        cells = [_cut(row[0], sizes[0])]
        cells += [t.ljust(s) if i < grid.left else t.rjust(s) for i, (t, s) in enumerate(zip(row, sizes, strict=True))][
            1:
        ]
        if grid.header[-1] == "":
            cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * (s if s else len("note")) for s in sizes)[:width])
    return lines


def _cut(text: str, size: int) -> str:
    text = " ".join("".join(c if c.isprintable() else "?" for c in text).split())
    return text.ljust(size) if len(text) <= size else "…" + text[len(text) - size + 1 :]


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, subsequent_indent="  ") or [text]
