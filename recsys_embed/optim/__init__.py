"""Optimizers that update embedding rows inside the backward pass, touching only the rows a batch reads.

Every rule sees each touched row once, with the sum of the gradients of all its occurrences in the batch (exact
semantics). Rows outside the batch keep their weights and state; or, with ``rows="all"``, they move as torch's dense
optimizers move them, each row's missed steps being made up for when it is next read.
"""

from recsys_embed.optim.adagrad import Adagrad, RowwiseAdagrad
from recsys_embed.optim.adam import Adam
from recsys_embed.optim.base import FusedOptimizer, is_rate
from recsys_embed.optim.duplicates import sum_duplicates
from recsys_embed.optim.ftrl import FTRL
from recsys_embed.optim.fused_table_optimizer import FusedTableOptimizer, fused_optimizer, unfused_parameters
from recsys_embed.optim.registry import list_rules, make_rule, register_rule, rule_name
from recsys_embed.optim.rmsprop import RowwiseRMSprop
from recsys_embed.optim.row_gradient import RowGradient, rows_of
from recsys_embed.optim.sgd import SGD

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "Adam",
    "FusedOptimizer",
    "FusedTableOptimizer",
    "RowGradient",
    "RowwiseAdagrad",
    "RowwiseRMSprop",
    "fused_optimizer",
    "is_rate",
    "list_rules",
    "make_rule",
    "register_rule",
    "rows_of",
    "rule_name",
    "sum_duplicates",
    "unfused_parameters",
]
