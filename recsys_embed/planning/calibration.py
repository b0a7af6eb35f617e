"""Calibration from measured runs: a factor per method that scales its predicted loss."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recsys_embed.errors import ConfigError, DataError, RecsysEmbedError
from recsys_embed.features import Schema
from recsys_embed.plan import Plan
from recsys_embed.planning.loss_estimate import AUC_PER_LOSS, CurveTerms
from recsys_embed.planning.predict import plan_losses
from recsys_embed.registry import list_methods
from recsys_embed.typing import EvidenceSource
from recsys_embed.utils.types import JSON, JSONMapping

LEAST, MOST = 0.1, 10.0
"""Bounds of the factors: runs on little data are noisy, and a factor near 0 would make a method free."""


@dataclass(frozen=True)
class Calibration:
    """Loss scales fitted to measured runs.

    Args:
        scales: by method, its ratio of measured to predicted loss over that of all methods together.
        auc_per_loss: AUC lost per unit of predicted loss in these runs.
        runs: number of measured (model, size) pairs per method.
    """

    scales: Mapping[str, float] = field(default_factory=dict)
    auc_per_loss: float = AUC_PER_LOSS
    runs: Mapping[str, int] = field(default_factory=dict)


def read_comparison(source: EvidenceSource) -> list[JSON]:
    """Rows of a comparison.

    Args:
        source: the folder of ``recsys-embed compare``, a JSON file with ``rows``, or the rows.

    Raises:
        DataError: the source holds no such rows.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        files = [path] if path.is_file() else sorted((path / "rows").glob("*.json"))
        rows: list[JSONMapping] = []
        for file in files:
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as e:
                raise DataError(f"{file}: cannot be read as rows of a comparison ({e})") from e
            found = data.get("rows", [data]) if isinstance(data, Mapping) else data
            rows += found if isinstance(found, list) else [found]
    else:
        rows = list(source) if isinstance(source, Iterable) else []
    if not rows or not all(isinstance(r, Mapping) and {"model", "method", "seed", "status"} <= set(r) for r in rows):
        raise DataError(f"{source!s:.200} holds no rows of a comparison; make some with 'recsys-embed compare'")
    return [dict(r) for r in rows]


def calibrate(rows: Sequence[JSONMapping], schema: Schema, terms: Mapping[str, CurveTerms]) -> Calibration:
    """Factors by least squares through the origin: measured fall of test AUC against predicted loss.

    Each run counts at its compression ratio; the names of its features do not matter. A run is compared with ``full``
    of the same model and seed.

    Raises:
        ConfigError: no row of a compressed method has a row of ``full`` to be compared with.
    """
    full = {(r["model"], r["seed"]): _auc(r) for r in rows if r["method"] == "full" and r["status"] == "ok"}
    falls: dict[tuple[str, str, float], list[float]] = {}
    for r in rows:
        base, auc = full.get((r["model"], r["seed"])), _auc(r)
        if r["status"] != "ok" or r["method"] == "full" or base is None or auc is None or not r.get("compression"):
            continue
        falls.setdefault((r["model"], r["method"], round(float(r["compression"]), 1)), []).append(base - auc)
    known = {m.name for m in list_methods()}
    plain = Plan.full(schema).footprint(schema).serve if all(s.ids == "index" for s in schema) else None
    whole = plain or 4 * sum(s.num_embeddings * s.embedding_dim for s in schema)
    points: dict[str, list[tuple[float, float]]] = {}
    losses: dict[tuple[str, float], float | None] = {}
    for (_, method, ratio), measured in falls.items():
        if method not in known:
            continue
        if (method, ratio) not in losses:
            losses[method, ratio] = _loss(schema, terms, method, int(whole / ratio))
        loss = losses[method, ratio]
        if loss:
            points.setdefault(method, []).append((loss, sum(measured) / len(measured)))
    everything = [p for found in points.values() for p in found]
    slope = _slope(everything)
    if not everything or slope <= 0:
        raise ConfigError(
            "`evidence` does not show what compression costs: it needs rows of 'full' and of compressed methods of "
            f"the same model and seed that lose AUC; got {len(rows)} rows with {len(everything)} such pairs"
        )
    scales = {m: min(MOST, max(LEAST, _slope(found) / slope)) for m, found in points.items()}
    return Calibration(scales, slope, {m: len(found) for m, found in points.items()})


def _auc(row: JSONMapping) -> float | None:
    test = row.get("test") or row.get("valid") or {}
    return test.get("auc")


def _loss(schema: Schema, terms: Mapping[str, CurveTerms], method: str, budget: int) -> float | None:
    try:
        plan = Plan.uniform(schema, method, budget=max(1, budget))
    except RecsysEmbedError:
        return None
    return sum(plan_losses(schema, plan, terms).values())


def _slope(points: Sequence[tuple[float, float]]) -> float:
    square = sum(loss * loss for loss, _ in points)
    return sum(loss * fall for loss, fall in points) / square if square else 0.0
