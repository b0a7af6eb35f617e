"""Settings of a study."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from recsys_embed.utils.settings import Settings, param

Objective = Literal["auc", "rmse", "ndcg", "bytes", "latency"]
OBJECTIVES: dict[Objective, Literal["minimize", "maximize"]] = {
    "auc": "maximize",
    "rmse": "minimize",
    "ndcg": "maximize",
    "bytes": "minimize",
    "latency": "minimize",
}


QUALITIES: tuple[Objective, ...] = ("auc", "rmse", "ndcg")
"""Objectives of which a study has one, by its loss and model."""


@dataclass(frozen=True)
class StudySettings(Settings):
    """Settings of a study.

    Args:
        trials: of the study, over all workers.
        budgets: texts, ``"5%"`` of the full tables or ``"4MiB"``.
        methods: keys to choose from; empty: all that a budget sizes.
        groups: of fields, at most, by number of ids.
        widths: of rows, for methods that take one; empty: a quarter, half and all of the vectors' width.
        objectives: first the quality of the validation rows: ``auc``, ``rmse`` of real labels, or ``ndcg`` (at the
            first k) of retrieval models; then ``bytes`` to serve, ``latency`` of a batch's lookup in ms (which
            differs from run to run, so that studies with it do not repeat bit for bit); empty: quality and bytes.
        sampler: ``evolution`` or one of Optuna's by name.
        sampler_args: further arguments of the sampler.
        prune: stop a trial early whose quality is below the median of those of at most as many bytes.
        validations: of a trial, for pruning; its last is at the end.
        proxy: share of the steps of a full training that a trial takes.
        warm: start from the planner's solution for each budget.

    Raises:
        ConfigError: a setting out of range; all faults at once.
    """

    noun: ClassVar[str] = "setting of a study"

    trials: int = param(30, low=1)
    budgets: tuple[str, ...] = param(("1%", "5%", "20%"), empty=True)
    methods: tuple[str, ...] = ()
    groups: int = param(3, low=1)
    widths: tuple[int, ...] = param((), low=1)
    objectives: tuple[Objective, ...] = param((), empty=True)
    sampler: str = "nsgaii"
    sampler_args: dict[str, Any] = field(default_factory=dict)
    prune: bool = True
    validations: int = param(4, low=1)
    proxy: float = param(1.0, above=0, high=1)
    warm: bool = True

    def conflicts(self) -> list[str]:
        given = self.objectives
        if given and (set(given[1:]) & {*QUALITIES} or given[0] not in QUALITIES or len(set(given)) < len(given)):
            return [f"`objectives` begin with auc (or rmse, ndcg) and name each once; got {given!r}"]
        return []
