"""Estimated losses of a whole plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan
from recsys_embed.planning.curves import Floats, FrequencyCurve
from recsys_embed.planning.loss_estimate import CurveTerms, column_spans, estimate_loss, load_of_others


def plan_losses(
    schema: Schema,
    plan: Plan,
    terms: Mapping[str, CurveTerms],
    importance: Mapping[str, float] | None = None,
    by_method: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Loss of every feature under ``plan``, with shared tables loaded by exactly the features that share them.

    Args:
        terms: of every feature's frequency curve.
        importance: factors by feature, 1 where none is given.
        by_method: factors by method, likewise.
    """
    spans = {s.name: column_spans(plan[s.name].program(s), terms[s.name]) for s in schema}
    total_load: dict[str, Floats] = {}
    for name, found in spans.items():
        for f in found:
            if f.table is not None:
                total_load[f.table] = total_load.get(f.table, 0.0) + f.reads * terms[name].load
    losses = {}
    for spec in schema:
        own = plan[spec.name].planning_loss(spec, terms[spec.name].curve)
        if own is not None:
            loss = float(own)
        else:
            beside = {t: load_of_others(terms[spec.name], load) for t, load in total_load.items()}
            loss = float(estimate_loss(terms[spec.name], [spans[spec.name]], spec.embedding_dim, beside)[0])
        loss *= (by_method or {}).get(plan[spec.name].method, 1.0)
        losses[spec.name] = loss * (importance or {}).get(spec.name, 1.0)
    return losses


def curve_terms(
    schema: Schema, curves: Mapping[str, FrequencyCurve], without_network: Collection[str] = ()
) -> dict[str, CurveTerms]:
    """CurveTerms by feature; features with the same curve share them.

    Args:
        without_network: features that no network reads beside many others.
    """
    made: dict[tuple[int, int, bool], CurveTerms] = {}
    found = {}
    for spec in schema:
        curve = curves[spec.name]
        key = (id(curve), spec.num_embeddings, spec.name in without_network)
        if key not in made:
            made[key] = CurveTerms(_fitting(spec, curve), key[2])
        found[spec.name] = made[key]
    return found


def _fitting(spec: FeatureSpec, curve: FrequencyCurve) -> FrequencyCurve:
    # Of raw ids there may be more or fewer than estimated.
    return curve if spec.ids == "raw" or curve.n == spec.num_embeddings else curve.resized(spec.num_embeddings)
