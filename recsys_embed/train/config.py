"""Training settings: a frozen dataclass, read from TOML or JSON; unknown keys raise and name the nearest key."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal, Self

from recsys_embed.core.precision import Precision
from recsys_embed.errors import ConfigError, UnknownNameError, unknown_name
from recsys_embed.features import Unseen
from recsys_embed.models import hyperparameters, list_models
from recsys_embed.optim import list_rules
from recsys_embed.train.losses import LossName, loss_args
from recsys_embed.train.retrieval_metrics import TOP_K
from recsys_embed.utils.settings import Settings, param
from recsys_embed.utils.strict_json import read_object
from recsys_embed.utils.types import JSON, JSONMapping

PLANNED = "planned"
"""The method of runs whose features are stored by a plan."""

DENSE_ADAM = "dense_adam"
"""The optimizer of tables that are trained as ordinary parameters."""

_LATER = ("loss", "loss_args", "top_k", "exclude_seen", "first_order_precision")
"""Settings that earlier runs do not name."""

ScheduleName = Literal["constant", "cosine", "plateau"]


@dataclass(frozen=True)
class TrainConfig(Settings):
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
        embedding_init: initial distribution of a full table, see :class:`recsys_embed.FeatureSpec`. Near zero by
            default: an id too rare to be learned then adds nothing, where a wider one would make it noise.
        first_order_precision: of the first-order weights (rows of width 1) once they are served; ``"fp32"`` keeps them.
            None: that of the vectors' rows, or int4 where these are of several precisions.
        unseen: what the model makes of ids outside the vocabulary, see :class:`recsys_embed.FeatureSpec`. Data folders
            number every value, unknown ones too, so it matters to whoever serves the model other ids.
        standardise: bring numeric columns to mean 0 and standard deviation 1 of the training rows, inside the model.
        loss: ``"logloss"`` of labels 0 and 1, or ``"squared_error"`` of any numbers; for retrieval models also
            ``"softmax"`` over the catalogue, ``"sampled_softmax"`` over the batch's items and uniform ones, and
            ``"bpr"`` of pairs, which learn from the rows of label 1, or from all where the data has no labels. Where
            rows have a ``weight``, it multiplies their loss; metrics count all rows alike.
        loss_args: its arguments, see :mod:`recsys_embed.train.retrieval_losses`, e.g. ``{"temperature": 0.1}``.
        top_k: lengths of the lists that recall@k and NDCG@k are told of, for retrieval models. Validations go by
            NDCG at the first.
        exclude_seen: whether these leave out items of the user's earlier rows; None: where rows say whose they are.
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
        min_delta: gain of validation AUC that counts (fall of the logloss, where the rows are of one class; gain of
            NDCG of a retrieval model).
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
    >>> TrainConfig.from_dict({"epoch": 2})
    Traceback (most recent call last):
    recsys_embed.errors.UnknownNameError: unknown training setting 'epoch'; did you mean 'epochs'? ...
    """

    noun: ClassVar[str] = "training setting"

    model: str = "deepfm"
    model_args: JSON = field(default_factory=dict)
    method: str = "full"
    method_args: JSON = field(default_factory=dict)
    plan: JSON | None = None
    ratio: float | None = param(None, low=1)
    budget: str | int | None = None
    embedding_dim: int = param(16, low=1)
    embedding_init: str = "normal:0.0001"
    first_order_precision: Precision | None = None
    unseen: Unseen | None = None
    standardise: bool = True
    loss: LossName = "logloss"
    loss_args: JSON = field(default_factory=dict)
    top_k: tuple[int, ...] = param(TOP_K, low=1)
    exclude_seen: bool | None = None
    epochs: int = param(1, low=1)
    steps: int | None = param(None, low=1)
    batch_size: int = param(4096, low=1)
    eval_batch_size: int = param(16384, low=1)
    learning_rate: float = param(1e-3, above=0)
    weight_decay: float = param(0.0, low=0)
    embedding_weight_decay: float = param(0.0, low=0)
    embedding_optimizer: str = "adam"
    embedding_learning_rate: float | None = param(None, above=0)
    embedding_optimizer_args: JSON = field(default_factory=dict)
    schedule: ScheduleName = "constant"
    warmup_steps: int = param(0, low=0)
    final_factor: float = param(0.0, low=0, high=1)
    plateau_factor: float = param(0.1, low=0, high=1)
    plateau_patience: int = param(1, low=1)
    clip_norm: float | None = param(None, above=0)
    eval_every: int | None = param(None, low=1)
    patience: int | None = param(None, low=1)
    min_delta: float = param(0.0, low=0)
    keep_best: bool = True
    checkpoint_every: int | None = param(None, low=1)
    log_every: int = param(50, low=1)
    shuffle: bool = True
    seed: int = param(0, low=0, high=2**63 - 1)
    backend: str = "auto"
    threads: int | None = param(None, low=1)

    @classmethod
    def from_dict(cls, data: JSONMapping) -> Self:
        """Build from plain values; an unknown key is an error that names the nearest one, or says whose it is."""
        try:
            return super().from_dict(data)
        except UnknownNameError as e:
            name = str(data.get("model", cls.model))
            known = hyperparameters(name) if name in list_models() else ()
            own = ", ".join(f"`model_args.{key}`" for key in data if key in known)
            if not own:
                raise
            raise UnknownNameError(f"{e}; model {name!r} has {own}") from None

    def conflicts(self) -> list[str]:
        faults = []
        optimizers = [*list_rules(), DENSE_ADAM]
        if self.embedding_optimizer not in optimizers:
            faults.append(f"`embedding_optimizer`: {unknown_name('optimizer', self.embedding_optimizer, optimizers)}")
        if self.ratio is not None and self.budget is not None:
            faults.append(f"`ratio` and `budget` exclude each other; got {self.ratio!r} and {self.budget!r}")
        try:
            loss_args(self.loss, self.loss_args)
        except ConfigError as e:
            faults.append(f"`loss_args`: {e}")
        if self.plan is not None and (self.method != PLANNED or self.method_args):
            faults.append(f"a `plan` goes with `method` {PLANNED!r} and without `method_args`; got {self.method!r}")
        if self.method == PLANNED and self.plan is None and self.ratio is None and self.budget is None:
            faults.append(f"`method` {PLANNED!r} needs a `ratio` or `budget` to plan for, or a `plan`")
        return faults

    def to_dict(self) -> JSON:
        """JSON-ready; settings that earlier runs do not name are left out at their defaults, so that these compare
        alike."""
        values, changed = super().to_dict(), self.non_defaults()
        return {k: v for k, v in values.items() if k in changed or k not in _LATER}

    def non_defaults(self) -> JSON:
        """Settings that differ from their defaults."""
        out = {}
        for f in fields(self):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if getattr(self, f.name) != default:
                out[f.name] = getattr(self, f.name)
        return out


def read_settings(path: str | Path) -> JSON:
    """Read a TOML or JSON file of settings into plain values.

    Raises:
        ConfigError: not a file of that form; names file, line and column.
    """
    path = Path(path)
    return read_object(path, toml=path.suffix != ".json")
