"""From a byte budget to a plan: a method and a size for every table, with reasons.

:mod:`~recsys_embed.planning.curves` holds the frequencies of ids, :mod:`~recsys_embed.planning.loss_estimate` estimates
the loss of a lookup program, :mod:`~recsys_embed.planning.enumerator` enumerates every method at many sizes,
:mod:`~recsys_embed.planning.knapsack` chooses among these options and :mod:`~recsys_embed.planning.solver` also among
tables that features may share.
"""

from typing import Any

from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.planning.explain import describe_changes, size_in_words
from recsys_embed.planning.limits import Limits
from recsys_embed.planning.planner import plan_for_budget
from recsys_embed.planning.predict import curve_terms, plan_losses
from recsys_embed.planning.statistics import curves_from
from recsys_embed.utils.deprecated import warn_renamed

__all__ = [
    "FrequencyCurve",
    "Limits",
    "curve_terms",
    "curves_from",
    "describe_changes",
    "plan_for_budget",
    "plan_losses",
    "size_in_words",
]


def __getattr__(name: str) -> Any:
    if name == "terms_of":
        warn_renamed("function of recsys_embed.planning", "terms_of", "curve_terms")
        return curve_terms
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
