"""Compressed embeddings under TorchRec: any plan as modules that its DistributedModelParallel can shard.

Importing this package imports TorchRec; ``import recsys_embed`` does not.
"""

from recsys_embed.utils.optional import require

require("torchrec", extra="torchrec", purpose="sharding")

from recsys_embed.sharding.checkpoint import load, save  # noqa: E402
from recsys_embed.sharding.collection import ShardableCollection  # noqa: E402
from recsys_embed.sharding.drop_in import CompressedEBC, schema_of  # noqa: E402
from recsys_embed.sharding.managed_collision import ManagedEBC  # noqa: E402
from recsys_embed.sharding.optimizers import Optimizers  # noqa: E402
from recsys_embed.sharding.quantised_tables import quantised  # noqa: E402
from recsys_embed.sharding.shard import shard  # noqa: E402
from recsys_embed.sharding.single_machine import from_single, to_single  # noqa: E402

__all__ = [
    "CompressedEBC",
    "ManagedEBC",
    "Optimizers",
    "ShardableCollection",
    "from_single",
    "load",
    "quantised",
    "save",
    "schema_of",
    "shard",
    "to_single",
]
