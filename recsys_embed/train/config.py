"""Training settings: one frozen dataclass, TOML or JSON for people, unknown keys refused with the nearest name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.features import Unseen
from recsys_embed.optim import list_rules
from recsys_embed.utils.strict_json import strict_json

PLANNED = "planned"
"""The method of runs whose features are stored by a plan."""

DENSE_ADAM = "dense_adam"
"""The optimizer of tables that are trained as ordinary parameters."""

ScheduleName = Literal["constant", "cosine", "plateau"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run's result.

    Args:
        model: model key.
        model_args: hyperparameters of the model, e.g. ``{"hidden": [400, 400]}``.
        method: how embeddings are stored: a method key, or ``"planned"``: each feature by the method and size of
            ``plan``, or of the planner's choice under the budget.
        method_args: parameters of the method; for ``"planned"`` those of :func:`recsys_embed.plan_for_budget`.
        plan: a plan of the vectors as its JSON says it (``recsys-embed plan --out``), for method ``"planned"``.
        ratio: compression: the embedding part may take the bytes of ``full`` divided by this.
        budget: bytes of the embedding part, e.g. ``"4MiB"``; exclusive with ``ratio``.
        embedding_dim: width of the vectors.
        embedding_init: law of a plain table's initial weights, see :class:`recsys_embed.FeatureSpec`. Near zero by
            default: an id too rare to be learned then adds nothing, where a larger law would make it noise.
        unseen: what the model makes of ids outside the vocabulary, see :class:`recsys_embed.FeatureSpec`. Data folders
            number every value, unknown ones too, so it matters to whoever serves the model other ids.
        standardise: bring numeric columns to mean 0 and standard deviation 1 of the training rows, inside the model.
        epochs: passes over the training split.
        steps: stop after this many batches, whatever ``epochs`` says; None: no limit.
        batch_size: samples per step.
        eval_batch_size: samples per step of an evaluation.
        learning_rate: peak rate of dense layers (Adam).
        weight_decay: L2 penalty of dense layers, added to their gradient.
        embedding_optimizer: fused optimizer of the tables, one of :func:`recsys_embed.optim.list_rules`; or
            ``dense_adam``, which trains them as ordinary parameters, every
            row at every step, which suits small tables only.
        embedding_weight_decay: L2 penalty of the tables. It pulls on all rows at every step: a fused optimizer with it
            moves rows ``"all"``, see :mod:`recsys_embed.optim`.
        embedding_learning_rate: peak rate of the tables; None: ``learning_rate``.
        embedding_optimizer_args: further arguments of that optimizer, e.g. ``{"eps": 1e-6}``.
        schedule: course of both rates after the warm-up.
        warmup_steps: steps of linear growth from 0.
        final_factor: where ``cosine`` ends, as a share of the peak.
        plateau_factor: what ``plateau`` multiplies by after ``plateau_patience`` validations without gain.
        plateau_patience: see above.
        clip_norm: largest L2 norm of all dense gradients together; None: no clipping.
        eval_every: validate every so many steps as well as after each epoch; None: after each epoch only.
        patience: stop after this many validations without gain; None: never.
        min_delta: gain of validation AUC that counts.
        keep_best: end with the weights of the best validation.
        checkpoint_every: steps between checkpoints besides those after each validation; None: a second, or twenty times
            what writing one takes (in one process; several write those after validations only).
        log_every: steps between log lines.
        shuffle: shuffle the training split every epoch.
        seed: seeds weights, order and dropout.
        backend: kernel backend of the collections.
        threads: torch threads; None leaves torch's choice.

    Raises:
        ConfigError: names every setting out of range.

    >>> TrainConfig(model="deepfm", method="unified", ratio=20).embedding_dim
    16
    """

    model: str = "deepfm"
    model_args: dict[str, Any] = field(default_factory=dict)
    method: str = "full"
    method_args: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    ratio: float | None = None
    budget: str | int | None = None
    embedding_dim: int = 16
    embedding_init: str = "normal:0.0001"
    unseen: Unseen | None = None
    standardise: bool = True
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 4096
    eval_batch_size: int = 16384
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    embedding_weight_decay: float = 0.0
    embedding_optimizer: str = "adam"
    embedding_learning_rate: float | None = None
    embedding_optimizer_args: dict[str, Any] = field(default_factory=dict)
    schedule: ScheduleName = "constant"
    warmup_steps: int = 0
    final_factor: float = 0.0
    plateau_factor: float = 0.1
    plateau_patience: int = 1
    clip_norm: float | None = None
    eval_every: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    keep_best: bool = True
    checkpoint_every: int | None = None
    log_every: int = 50
    shuffle: bool = True
    seed: int = 0
    backend: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        faults = [
            f"`{key}` must be {_type_text(hint)}; got {getattr(self, key)!r}"
            for key, hint in get_type_hints(type(self)).items()
            if not _is_a(getattr(self, key), hint)
        ]
        if not faults:
            faults = self._range_faults()
        raise_faults(faults, "TrainConfig")

    def _range_faults(self) -> list[str]:
        faults = []
        optimizers = [*list_rules(), DENSE_ADAM]
        if self.embedding_optimizer not in optimizers:
            faults.append(f"`embedding_optimizer`: {unknown_name('optimizer', self.embedding_optimizer, optimizers)}")
        for key in _AT_LEAST_ONE:
            value = getattr(self, key)
            if value is not None and value < 1:
                faults.append(f"`{key}` must be at least 1; got {value!r}")
        for key in _NOT_NEGATIVE:
            if not getattr(self, key) >= 0:
                faults.append(f"`{key}` must not be negative; got {getattr(self, key)!r}")
        if self.seed >= 2**63:
            faults.append(f"`seed` must be below 2^63; got {self.seed}")
        for key in ("learning_rate", "embedding_learning_rate", "clip_norm"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                faults.append(f"`{key}` must be positive; got {value!r}")
        for key in ("final_factor", "plateau_factor"):
            if not 0 <= getattr(self, key) <= 1:
                faults.append(f"`{key}` must be in [0, 1]; got {getattr(self, key)!r}")
        if self.ratio is not None and self.budget is not None:
            faults.append(f"`ratio` and `budget` exclude each other; got {self.ratio!r} and {self.budget!r}")
        if self.plan is not None and (self.method != PLANNED or self.method_args):
            faults.append(f"a `plan` goes with `method` {PLANNED!r} and without `method_args`; got {self.method!r}")
        if self.method == PLANNED and self.plan is None and self.ratio is None and self.budget is None:
            faults.append(f"`method` {PLANNED!r} needs a `ratio` or `budget` to plan for, or a `plan`")
        return faults

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Build from plain values; an unknown key is an error that names the nearest one.

        >>> TrainConfig.from_dict({"epoch": 2})
        Traceback (most recent call last):
        recsys_embed.errors.UnknownNameError: unknown training setting 'epoch'; did you mean 'epochs'? ...
        """
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise unknown_name("training setting", key, known)
        return cls(**{k: _coerce(v, get_type_hints(cls)[k]) for k, v in data.items()})

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed, checked again; unknown keys are errors."""
        known = {f.name for f in fields(self)}
        for key in changes:
            if key not in known:
                raise unknown_name("training setting", key, known)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def non_defaults(self) -> dict[str, Any]:
        """Settings that differ from their defaults."""
        out = {}
        for f in fields(self):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if getattr(self, f.name) != default:
                out[f.name] = getattr(self, f.name)
        return out


_AT_LEAST_ONE = (
    "ratio",
    "embedding_dim",
    "epochs",
    "steps",
    "batch_size",
    "eval_batch_size",
    "plateau_patience",
    "eval_every",
    "patience",
    "checkpoint_every",
    "log_every",
    "threads",
)
_NOT_NEGATIVE = ("weight_decay", "embedding_weight_decay", "warmup_steps", "min_delta", "seed")


def _is_a(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_a(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _coerce(value: Any, hint: Any) -> Any:
    """Whole numbers written for a float setting become floats, so that equal settings compare equal."""
    accepts = get_args(hint) or (hint,)
    if isinstance(value, int) and not isinstance(value, bool) and float in accepts and int not in accepts:
        return float(value)
    return value


def _type_text(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_type_text(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if hint is NoneType:
        return "absent"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, "a table of settings")


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a TOML or JSON file of settings into plain values.

    Raises:
        ConfigError: not a file of that form; names file, line and column.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = strict_json(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as e:
        raise ConfigError(f"{path} is not valid {path.suffix.lstrip('.') or 'toml'}: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a table of settings; got {type(data).__name__}")
    return data
