"""Report of a finished search: a Markdown page and metric curves."""

from __future__ import annotations

from typing import Any

from recsys_embed.core.footprint import format_bytes
from recsys_embed.search.base import Search
from recsys_embed.search.outcome import SearchOutcome
from recsys_embed.train.quality import metrics_text

CURVES = "curves"


def curves_of(search: Search) -> dict[str, Any]:
    """Validation metrics of every stage over its steps, and the scores of every generation."""
    out: dict[str, Any] = {}
    for stage in search.stages:
        result = search.folder.get(f"{stage}_result")
        if result is not None:
            out[stage] = result["history"]
    evolution = search.folder.get("evolution")
    if evolution is not None:
        out["evolution"] = {"ends": evolution["ends"], "scores": [score for _, score in evolution["scores"]]}
    return out


def page(search: Search, outcome: SearchOutcome) -> str:
    """The report as Markdown."""
    schema, plan, result = search.schema, outcome.plan, outcome.result
    lines = [f"# {search.method} on {search.config.model}", ""]
    for split, m in (("validation", result.valid), ("test", result.test)):
        if m is not None:
            lines.append(f"- {split}: {metrics_text(m)} ({m.samples:,} rows)")
    lines.append(
        f"- bytes to serve: {format_bytes(outcome.footprint.serve)} of {format_bytes(outcome.full_bytes)} "
        f"({outcome.full_bytes / outcome.footprint.serve:.1f}x), sets of ids included"
    )
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in outcome.seconds.items())
    lines += [f"- time: {spent}; {outcome.cost:.1f} trainings over full tables of as many epochs", ""]
    lines += ["| feature | ids | kept | bytes | of full |", "| --- | ---: | --- | ---: | ---: |"]
    first = schema.first_readers.names
    for spec in schema:
        if spec.name not in first:
            owner = schema.by_table[spec.table_name][0].name
            lines.append(f"| {spec.name} | {spec.num_ids:,} | reads the table of {owner} | | |")
            continue
        size = plan[spec.name].footprint(spec).serve
        share = size / (4 * spec.num_ids * spec.embedding_dim)
        what = plan.reasons.get(spec.name, plan[spec.name].method)
        lines.append(f"| {spec.name} | {spec.num_ids:,} | {what} | {size:,} | {share:.1%} |")
    return "\n".join([*lines, ""])
