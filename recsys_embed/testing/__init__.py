"""The contract every method, backend and model keeps, shipped so that third parties can run it on theirs.

Each check is a function that raises AssertionError with what it expected and got; ``check_embedding``,
``check_backend`` and ``check_model`` run all checks of their kind.
"""

from recsys_embed.testing.backend_checks import check_backend
from recsys_embed.testing.embedding_checks import EMBEDDING_CHECKS, check_embedding
from recsys_embed.testing.helpers import example, poisoned_memory
from recsys_embed.testing.model_checks import check_model

__all__ = ["EMBEDDING_CHECKS", "check_backend", "check_embedding", "check_model", "example", "poisoned_memory"]
