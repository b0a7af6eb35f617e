"""Tables whose ids share rows though no network tells them apart, and the budget from which on they need not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.plan import Plan
from recsys_embed.planning.enumerator import set_options
from recsys_embed.planning.feasibility import MOST_NAMES, check_possible
from recsys_embed.planning.loss_estimate import column_spans
from recsys_embed.planning.options import FeatureOptions, PlanningContext, sharing_penalty
from recsys_embed.planning.solver import PlanSolver
from recsys_embed.planning.table_groups import table_groups


def shared_rows(
    plan: Plan, features: Sequence[FeatureOptions], context: PlanningContext, taken: Collection[str], spent: int
) -> str | None:
    """A sentence on the tables whose ids share rows for want of bytes; None where there are none.

    Tables that are pinned, and those for which only methods that share rows were offered, are as the caller wants them.

    Args:
        taken, spent: names and bytes of the shared tables that pinned configurations fix.
    """
    sharing = [f for f in features if _shares(f, plan[f.spec.name], context)]
    if not sharing:
        return None
    apart = {f.spec.name: own for f in features if (own := _kept_apart(f, context)) is not None}
    names = [repr(f.spec.name) for f in sharing if f.spec.name in apart]
    if not names:
        return None
    listed = ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if names[MOST_NAMES:] else "")
    text = f"ids of {listed} share rows, which no network tells apart, so most of what they tell is lost"
    kept = [apart.get(f.spec.name, f) for f in features]
    groups = table_groups(kept, context, set(taken))
    try:
        check_possible(kept, groups)
    except RecsysEmbedError:  # some tables can only share theirs with these
        return text
    least = PlanSolver(kept, groups).least() + spent
    return (
        f"{text}; the least budget that keeps rows apart is {format_bytes(least)} ({least} bytes). If a network reads "
        "these tables beside many others, say so by network= (--network)"
    )


def _shares(feature: FeatureOptions, config: MethodConfig, context: PlanningContext) -> bool:
    if not feature.terms.without_network or context.limits.pinned(feature.spec.name) is not None:
        return False
    if config.planning_loss(feature.spec, feature.terms.curve) is not None:
        return False  # its estimate says what sharing loses
    return sharing_penalty(feature, column_spans(config.program(feature.spec), feature.terms), context) > 0


def _kept_apart(feature: FeatureOptions, context: PlanningContext) -> FeatureOptions | None:
    """A feature with those of its options whose ids share no rows; None where it need not have them, or has none."""
    if not feature.terms.without_network or context.limits.pinned(feature.spec.name) is not None:
        return None
    # Options without a configuration lie between two sizes, of which the smaller one is cheaper.
    options = [o for o in feature.options if o.config is not None and not _shares(feature, o.config, context)]
    if not options:
        return None
    own = replace(feature, shared=[])
    set_options(own, options)
    return own
