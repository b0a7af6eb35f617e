"""Settings of a study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from recsys_embed.errors import raise_faults, unknown_name

OBJECTIVES: dict[str, Literal["minimize", "maximize"]] = {"auc": "maximize", "bytes": "minimize", "latency": "minimize"}


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study.

    Args:
        trials: of the whole study, whoever trains them.
        budgets: texts, ``"5%"`` of the plain tables or ``"4MiB"``.
        methods: keys to choose from; empty: all that a budget sizes.
        groups: of fields, at most, by number of ids.
        widths: of rows, for methods that take one; empty: a quarter, half and all of the vectors' width.
        objectives: ``auc`` of the validation rows, ``bytes`` to serve, ``latency`` of a batch's lookup in ms (which
            differs from run to run, so that studies with it do not repeat bit for bit).
        sampler: ``evolution`` or one of Optuna's by name.
        sampler_args: further arguments of the sampler.
        prune: stop a trial early whose AUC is below the median of those of at most as many bytes.
        validations: of a trial, for pruning; its last is at the end.
        proxy: share of the steps of a full training that a trial takes.
        warm: start from the planner's solution for each budget.

    Raises:
        ConfigError: a setting out of range; all faults at once.
    """

    trials: int = 30
    budgets: tuple[str, ...] = ("1%", "5%", "20%")
    methods: tuple[str, ...] = ()
    groups: int = 3
    widths: tuple[int, ...] = ()
    objectives: tuple[str, ...] = ("auc", "bytes")
    sampler: str = "nsgaii"
    sampler_args: dict[str, Any] = field(default_factory=dict)
    prune: bool = True
    validations: int = 4
    proxy: float = 1.0
    warm: bool = True

    def __post_init__(self) -> None:
        faults = [
            f"`{key}` must be an integer of at least 1; got {getattr(self, key)!r}"
            for key in ("trials", "groups", "validations")
            if type(getattr(self, key)) is not int or getattr(self, key) < 1
        ]
        for key, kind in (("budgets", str), ("methods", str), ("objectives", str), ("widths", int)):
            value = getattr(self, key)
            if not isinstance(value, tuple) or not all(type(v) is kind for v in value):
                faults.append(f"`{key}` must be a list of {'texts' if kind is str else 'integers'}; got {value!r}")
        faults += [
            f"`{key}` must be true or false; got {getattr(self, key)!r}"
            for key in ("prune", "warm")
            if not isinstance(getattr(self, key), bool)
        ]
        if isinstance(self.proxy, bool) or not isinstance(self.proxy, (int, float)) or not 0 < self.proxy <= 1:
            faults.append(f"`proxy` must be in (0, 1]; got {self.proxy!r}")
        if not isinstance(self.sampler, str):
            faults.append(f"`sampler` must be a name; got {self.sampler!r}")
        if not isinstance(self.sampler_args, dict):
            faults.append(f"`sampler_args` must be a table; got {self.sampler_args!r}")
        if not self.objectives or self.objectives[0] != "auc" or len(set(self.objectives)) < len(self.objectives):
            faults.append(f"`objectives` begin with auc and name each once; got {self.objectives!r}")
        faults += [str(unknown_name("objective", o, OBJECTIVES)) for o in self.objectives if o not in OBJECTIVES]
        raise_faults(faults, "StudySettings")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StudySettings:
        """Build from plain values; an unknown key is an error that names the nearest one."""
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise unknown_name("setting of a study", key, known)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
