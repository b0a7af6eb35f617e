"""The memory report as one HTML page: no network, no fonts, no libraries in the browser."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from recsys_embed.core.footprint import format_bytes
from recsys_embed.report.memory import text as memory_text
from recsys_embed.utils.optional import require

if TYPE_CHECKING:
    from recsys_embed.report.memory.report_values import ReportValues, TableReport

BARS = 24
CURVES = 6
THIN_CURVES = 60
RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)
CAUSES = ("weights", "index", "optimizer", "gradient")
COLUMNS = (*memory_text.SHOWN, "train")


def render_page(report: ReportValues) -> str:
    """The page's text."""
    jinja2 = require("jinja2", extra="train", purpose="the HTML page")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_template())
    text: str = template.render(**context(report))
    return text


@cache
def _template() -> str:
    return files("recsys_embed.report.memory").joinpath("page.html").read_text(encoding="utf-8")


def context(report: ReportValues) -> dict[str, Any]:
    """Everything the template shows, as texts and percentages."""
    settings = report.settings
    grids = memory_text.grids(report, None)
    what_if = WhatIf.of(report) if report.plain else None
    start = what_if.start if what_if else 0
    return {
        "headline": memory_text.headline(report),
        "source": report.source,
        "cards": _cards(report),
        "settings": [(k.replace("_", " "), _text(v)) for k, v in settings.to_dict().items()],
        "serving": _bars(report, training=False),
        "training": _bars(report, training=True),
        "stacks": _stacks(report),
        "causes_serving": _occurring(report, training=False),
        "causes_training": _occurring(report, training=True),
        "grids": grids,
        "what_if": None if what_if is None else what_if.table(start),
        "budget": format_bytes(start),
        "data": "" if what_if is None else _script_json(what_if.to_dict()),
        "curves": _curves(report),
        "notes": report.notes,
        "columns": ("fp32", "fp16, bf16", "int8", "int4", "training"),
    }


def _script_json(value: Any) -> str:
    """JSON that can stand in a script element whatever texts it holds."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028")


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _cards(report: ReportValues) -> list[dict[str, str]]:
    settings, tables = report.settings, report.tables
    count = sum(t.storage.kind != "shared" for t in tables)
    precision = settings.precision or ("as planned" if report.footprint.unrounded else "as held")
    cards = [
        ("serving", report.total("serve"), f"weights {precision} and index buffers"),
        ("training", report.total("train"), "weights, index buffers, optimizer state, gradients"),
        ("lookup while training", sum(t.activations for t in tables), f"a batch of {settings.batch_size:,}"),
    ]
    out = [{"label": label, "value": format_bytes(n), "note": note} for label, n, note in cards]
    if report.rest.serve:
        share = memory_text.percent(report.share)
        rest = f"the rest takes {format_bytes(report.rest.serve)}"
        out.append({"label": "share of the model", "value": share, "note": rest})
    else:
        out.append({"label": "embedding tables", "value": f"{count:,}", "note": "in the plan or schema"})
    return out


# -- bars ----------------------------------------------------------------------------------------------------------


def _parts(table: TableReport, training: bool) -> dict[str, int]:
    parts = {"weights": table.weights if training else table.stored, "index": table.index}
    if training:
        parts |= {"optimizer": table.optimizer, "gradient": table.gradient}
    return parts


def _occurring(report: ReportValues, *, training: bool) -> list[str]:
    """Causes that take any bytes."""
    return [c for c in CAUSES if any(_parts(t, training).get(c, 0) for t in report.tables)]


def _bars(report: ReportValues, *, training: bool) -> list[dict[str, Any]]:
    """One bar per table, largest first; the smallest together."""
    items = [(t.name, memory_text.method(t), _parts(t, training)) for t in report.tables]
    items.sort(key=lambda item: -sum(item[2].values()))
    shown, others = (items, []) if len(items) <= BARS + 1 else (items[:BARS], items[BARS:])
    if others:
        rest = {cause: sum(parts[cause] for _, _, parts in others) for cause in others[0][2]}
        shown.append((f"{len(others)} smaller ones", "", rest))
    top = max((sum(parts.values()) for _, _, parts in shown), default=0) or 1
    whole = sum(sum(parts.values()) for _, _, parts in items) or 1
    return [
        {
            "name": name,
            "method": method,
            "total": format_bytes(sum(parts.values())),
            "share": memory_text.percent(sum(parts.values()) / whole),
            "segments": _segments(parts, top),
        }
        for name, method, parts in shown
    ]


def _segments(parts: dict[str, int], top: int) -> list[dict[str, Any]]:
    return [
        {"cause": cause, "width": round(100 * size / top, 3), "text": f"{cause} {format_bytes(size)}"}
        for cause, size in parts.items()
        if size
    ]


def _stacks(report: ReportValues) -> list[dict[str, Any]]:
    """Serving and training as one bar each, on one scale."""
    rows = [("serving", False), ("training", True)]
    sums = [(name, {c: sum(_parts(t, flag).get(c, 0) for t in report.tables) for c in CAUSES}) for name, flag in rows]
    top = max((sum(parts.values()) for _, parts in sums), default=0) or 1
    return [
        {"name": name, "total": format_bytes(sum(parts.values())), "segments": _segments(parts, top)}
        for name, parts in sums
    ]


# -- what if -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WhatIf:
    """How much of the full tables every method can keep under a budget.

    Args:
        methods: per method, points of falling size: share of the full tables' numbers kept, deployed bytes by
            precision, bytes of training.
        low: smallest budget of the slider.
        high: largest: the full tables to train.
        plain: deployed bytes of the plain float32 tables.
        now: deployed bytes as they are.
        start: where the slider stands at first.
    """

    methods: dict[str, list[dict[str, Any]]]
    low: int
    high: int
    plain: int
    now: int
    start: int

    @classmethod
    def of(cls, report: ReportValues) -> WhatIf:
        """Points at every compression of :data:`RATIOS`."""
        methods: dict[str, list[dict[str, Any]]] = {}
        elements = max(1, report.plain // 4)
        for ratio in RATIOS:
            for a in report.alternatives(ratio):
                sizes_of: dict[str, float] = {p: a.serve[p] for p in memory_text.SHOWN}
                point = {"kept": a.elements / elements, **sizes_of, "train": a.train}
                points = methods.setdefault(a.method, [])
                # Beyond a method's smallest form the points repeat.
                if not points or point != points[-1]:
                    points.append(point)
        sizes = [p[k] for points in methods.values() for p in points for k in COLUMNS if p[k]]
        start = max(1, round(report.plain / report.settings.ratio))
        low, high = min([*sizes, start]), max([*sizes, report.plain, start])
        return cls(methods, low, high, report.plain, report.total("serve"), start)

    def kept(self, method: str, column: str, budget: float) -> float | None:
        """Share of the full tables' numbers that fits, between two points in proportion of logarithms; None: none."""
        points = self.methods[method]
        above = None
        for p in points:
            if p[column] <= budget:
                if above is None or above[column] == p[column]:
                    return float(p["kept"])
                part = math.log(budget / p[column]) / math.log(above[column] / p[column])
                return float(p["kept"] * (above["kept"] / p["kept"]) ** part)
            above = p
        return None

    def table(self, budget: float) -> list[dict[str, Any]]:
        """Cells of the what-if table: text and width of the bar."""
        rows = []
        for name in self.methods:
            shares = [self.kept(name, column, budget) for column in COLUMNS]
            cells = [
                {
                    "text": "does not fit" if s is None else memory_text.percent(min(1.0, s)),
                    "width": 0 if s is None else round(100 * min(1.0, s), 2),
                }
                for s in shares
            ]
            rows.append({"name": name, "cells": cells})
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "columns": COLUMNS}


# -- curves --------------------------------------------------------------------------------------------------------


def _curves(report: ReportValues) -> dict[str, Any] | None:
    """Share of lookups covered by the top rows, as lines in a box of 100 x 100; k grows by its logarithm."""
    found = {t.stats.field.name: t for t in reversed(report.tables) if t.stats is not None}
    tables = sorted(found.values(), key=lambda t: -t.storage.ids * t.storage.width)
    if not tables:
        return None
    largest = max(t.stats.field.distinct for t in tables if t.stats is not None)
    decades = max(1, math.ceil(math.log10(max(2, largest))))
    lines = []
    for place, t in enumerate(tables[: CURVES + THIN_CURVES]):
        if t.stats is None:
            continue
        field, points = t.stats.field, []
        for step in range(20 * decades + 1):
            k = 10 ** (step / 20)
            if k > field.distinct:
                break
            points.append(f"{100 * math.log10(k) / decades:.2f},{100 - 100 * field.share(k):.2f}")
        end = 100 * math.log10(max(1, field.distinct)) / decades
        points.append(f"{end:.2f},{100 - 100 * field.share(field.distinct):.2f}")
        lines.append(
            {
                "name": field.name,
                "points": " ".join(points),
                "place": place if place < CURVES else None,
                "note": f"{field.distinct:,} ids, top 100 rows {memory_text.percent(field.share(100))}",
            }
        )
    ticks = [{"at": round(100 * i / decades, 3), "text": _power(i)} for i in range(decades + 1)]
    return {"lines": lines[::-1], "legend": [x for x in lines if x["place"] is not None], "ticks": ticks}


def _power(exponent: int) -> str:
    names = {0: "1", 1: "10", 2: "100", 3: "1k", 4: "10k", 5: "100k", 6: "1M", 7: "10M", 8: "100M", 9: "1G"}
    return names.get(exponent, f"1e{exponent}")
