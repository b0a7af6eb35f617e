"""From bytes to a plan: which method and size for which table, and why.

:mod:`~recsys_embed.planning.curves` says how lookups spread over ids, :mod:`~recsys_embed.planning.price` what a lookup
program loses of them, :mod:`~recsys_embed.planning.options` lists every method at many sizes,
:mod:`~recsys_embed.planning.knapsack` chooses among them and :mod:`~recsys_embed.planning.search` among the tables that
features may share.
"""

from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.planning.limits import Limits
from recsys_embed.planning.planner import plan_for_budget
from recsys_embed.planning.predict import plan_losses, terms_of
from recsys_embed.planning.statistics import curves_from
from recsys_embed.planning.words import describe_changes, size_in_words

__all__ = [
    "FrequencyCurve",
    "Limits",
    "curves_from",
    "describe_changes",
    "plan_for_budget",
    "plan_losses",
    "size_in_words",
    "terms_of",
]
