"""What a way to look up and train tables is to the benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from workload import Case

from recsys_embed import EmbeddingCollection, RowwiseAdagrad

RATE, EPS = 0.01, 1e-8


class Contender:
    """``forward(turn)`` looks up a batch; ``step()``, after its backward, finishes what backward has not updated.

    Args:
        same_rule: its updates are rowwise Adagrad's, so that weights can be compared after a step.
        trains: whether a whole step makes sense.
        order: of the fields in its output, where it is another one.
    """

    def __init__(
        self,
        forward: Callable[[int], Tensor],
        step: Callable[[], None] | None = None,
        same_rule: bool = True,
        trains: bool = True,
        order: list[int] | None = None,
    ) -> None:
        self.forward, self.step, self.same_rule, self.trains, self.order = forward, step, same_rule, trains, order


def collection(case: Case, backend: str, ids: list[Tensor], like: EmbeddingCollection | None) -> Contender:
    schema = case.schema()
    coll = EmbeddingCollection(schema, case.plan(schema), RowwiseAdagrad(lr=RATE, eps=EPS), backend=backend)
    if like is not None:
        coll.load_state_dict(like.state_dict())
    return Contender(lambda turn: coll(ids[turn]))
