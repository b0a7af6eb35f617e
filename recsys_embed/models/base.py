"""Base of all CTR models: embedding collections, numeric field vectors and byte counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys_embed.collection import EmbeddingCollection
from recsys_embed.core.footprint import Footprint
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.models.criteo import former_default
from recsys_embed.models.layers import FieldMLP
from recsys_embed.optim import FusedOptimizer, unfused_parameters
from recsys_embed.plan import Plan
from recsys_embed.utils.settings import Settings, build, check_settings, param
from recsys_embed.utils.types import JSON, Ids, RowsLike

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NUMERIC_INIT_STD = 0.05


@dataclass(frozen=True)
class ModelSpec:
    """Arguments that every model is built from, whatever its architecture.

    Args:
        schema: the categorical features, in the order of the columns of ``ids``.
        plan: storage of each feature's vectors.
        linear_plan: storage of first-order weights (width 1); models without them refuse it.
        num_dense: number of numeric columns of ``dense``; may be 0.
        optimizer: fused optimizer of the tables, or None for ordinary gradients.
        seed: of tables and dense layers; equal seeds give bitwise equal models.
        backend: kernel backend of the collections.
        device: where tables live.
        collection: called in place of :class:`EmbeddingCollection`, with its arguments.
    """

    schema: Schema
    plan: Plan | None
    linear_plan: Plan | None = None
    num_dense: int = field(default_factory=former_default)
    optimizer: FusedOptimizer | None = None
    seed: int = 0
    backend: str = "auto"
    device: torch.device | str | None = None
    collection: Callable[..., nn.Module] = EmbeddingCollection


class Scorer(Protocol):
    """What turns raw rows into scores of a model; a loaded file brings it."""

    @property
    def lists(self) -> Sequence[str]:
        """Features with any number of ids per row; they come last."""
        ...

    def predict(self, model: nn.Module, rows: RowsLike, batch_size: int) -> NDArray[np.float32]:
        """Scores float32 ``[n]``."""
        ...

    def recommend(self, model: Any, rows: RowsLike, k: int, exclude: Sequence[str], batch_size: int) -> Any:
        """See :meth:`recsys_embed.models.RetrievalModel.recommend`."""
        ...


class CTRModel(nn.Module):
    """Base of the models: ``model(dense [B, num_dense] float32, ids [B, F] int64) -> logits [B] float32``.

    A subclass names its ``key``, its frozen dataclass of hyperparameters ``params_cls``, its requirements on
    embeddings, and implements ``logits``. It sees collections only, never methods.

    Attributes:
        embedding: collection of vectors, or None for a purely first-order model.
        linear: collection of first-order weights (width 1), or None.
        numeric: ``[num_dense, D]`` vector of each numeric field; a field's vector is value * vector.
        cat_width: number of floats of all categorical vectors of one sample.
        needs_history: whether a feature must have a list of ids per row that reads the table of another.
        uses_network: whether layers read the vectors side by side, so that they can tell ids of one row apart.
        params: the hyperparameters it was built with by :func:`recsys_embed.models.build_model`, else None.
        scorer: what turns raw rows into scores, of a model that was loaded from a file with encoders, else None.
    """

    key: ClassVar[str]
    params_cls: ClassVar[type]
    uses_vectors: ClassVar[bool] = True
    uses_linear: ClassVar[bool] = False
    uses_numeric_vectors: ClassVar[bool] = True
    needs_equal_widths: ClassVar[bool] = False
    uses_network: ClassVar[bool] = True
    needs_history: ClassVar[bool] = False
    must_define: ClassVar[Mapping[str, str]] = {"logits": "logits(dense, ids)`, which returns [B],"}

    params: DataclassInstance | None = None
    scorer: Scorer | None = None
    embedding: EmbeddingCollection | None
    linear: EmbeddingCollection | None

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.num_dense = spec.num_dense
        self.register_buffer("numeric_mean", torch.zeros(spec.num_dense))
        self.register_buffer("numeric_std", torch.ones(spec.num_dense))
        self.embedding, self.linear = None, None
        schema = spec.schema
        if self.uses_vectors:
            if spec.plan is None:
                raise ConfigError(f"model {self.key!r} needs a plan for its vectors; got None")
            if self.needs_equal_widths and schema.uniform_dim is None:
                raise ConfigError(self._widths_message(schema))
            self.embedding = self._collection(schema, spec.plan, spec)
            if self.needs_equal_widths and self.embedding.output_dim is None:
                raise ConfigError(self._widths_message(schema))
        if self.uses_linear:
            narrow = schema.with_dim(1)
            given = spec.plan if spec.linear_plan is None and not self.uses_vectors else spec.linear_plan
            self.linear = self._collection(narrow, Plan.full(narrow) if given is None else given, spec)
            self.linear_numeric = nn.Parameter(torch.zeros(spec.num_dense))
            self.bias = nn.Parameter(torch.zeros(1))
        elif spec.linear_plan is not None:
            raise ConfigError(f"model {self.key!r} has no first-order weights; drop `linear_plan`")
        self.numeric_dim = self._numeric_dim(schema)
        if self.uses_vectors and self.uses_numeric_vectors:
            self.numeric = nn.Parameter(torch.randn(spec.num_dense, self.numeric_dim) * NUMERIC_INIT_STD)

    def logits(self, dense: Tensor, ids: Ids) -> Tensor:
        """Logits ``[B]`` from standardised numeric values; every model defines this."""
        raise TypeError(f"{type(self).__name__} does not define logits(dense, ids)")

    def forward(self, dense: Tensor, ids: Ids) -> Tensor:
        """Logits ``[B]`` of ``dense [B, num_dense]`` with raw numeric values, and ``ids [B, F]``."""
        return self.logits(self.standardised(dense), ids)

    if TYPE_CHECKING:  # torch types a module's call as anything
        __call__ = forward

    def predict(self, rows: RowsLike, *, batch_size: int = 8192) -> NDArray[np.float32]:
        """Scores of raw rows, encoded as the training rows were.

        Of a model that :func:`recsys_embed.load` read from a file with encoders. Needs polars. Columns that the model
        does not use are ignored; labels, weights and groups are not needed.

        Args:
            rows: a polars (lazy) or pandas frame, an Arrow table, columns by name, a list of rows by column (of one row
                too, ``[row]``), or files.
            batch_size: rows that go through the model at once.

        Returns:
            float32 ``[n]`` in the order of the rows: probabilities of a model that was trained by ``logloss``, else
            the values that it predicts.

        Raises:
            ConfigError: the model has no encoders; columns that are absent or of another type, all of them named.
            DataError: values that cannot be used, with row, column and reason.
        """
        return self._scorer().predict(self, rows, batch_size)

    def _scorer(self) -> Scorer:
        if self.scorer is None:
            raise ConfigError(
                "this model takes ids, as it does not hold what turns raw rows into them: write it with `recsys-embed "
                "export RUN --data FOLDER --out FILE`, or rse.export(model, path, encoders=open_dataset(folder)), and "
                "predict with the model of rse.load(path)"
            )
        return self.scorer

    def standardised(self, dense: Tensor) -> Tensor:
        """Raw numeric values ``[B, num_dense]`` as :meth:`logits` takes them, see :meth:`standardise`."""
        return (dense - self.get_buffer("numeric_mean")) / self.get_buffer("numeric_std")

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Standardise numeric columns (mean 0, standard deviation 1) inside the model, so serving takes raw values.

        Args:
            mean: ``[num_dense]`` of the training rows.
            std: ``[num_dense]``; columns that do not vary are only centred.

        Raises:
            ConfigError: moments of another number of columns, or that are NaN or infinite.
        """
        faults = []
        for name, part in (("mean", mean), ("std", std)):
            if list(part.shape) != [self.num_dense]:
                faults.append(f"`{name}` must have the shape [{self.num_dense}]; got {list(part.shape)}")
            elif not torch.isfinite(part).all():
                columns = (~torch.isfinite(part)).nonzero().flatten().tolist()
                faults.append(
                    f"`{name}` must be finite; that of numeric columns {', '.join(map(str, columns))} (counted from 0) "
                    "is not: they hold NaN, infinite or huge values; fill or clip them in the data"
                )
        raise_faults(faults, "standardise")
        self.get_buffer("numeric_mean").copy_(mean)
        self.get_buffer("numeric_std").copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def _collection(self, schema: Schema, plan: Plan, spec: ModelSpec) -> EmbeddingCollection:
        # Dense layers start alike whatever a plan draws, and the global generator is restored.
        with torch.random.fork_rng(devices=[]):
            made = spec.collection(
                schema, plan, optimizer=spec.optimizer, seed=spec.seed, backend=spec.backend, device=spec.device
            )
        return cast("EmbeddingCollection", made)  # or one that is called as it is

    def _numeric_dim(self, schema: Schema) -> int:
        """Width of a numeric field's vector: that of the categories, or their mean where they differ."""
        if self.embedding is not None and self.embedding.output_dim is not None:
            return int(self.embedding.output_dim)
        return max(1, round(sum(f.embedding_dim for f in schema) / len(schema)))

    def _widths_message(self, schema: Schema) -> str:
        dims = sorted({f.embedding_dim for f in schema})
        return (
            f"model {self.key!r} multiplies vectors of different features, so all must have one width; "
            f"got widths {', '.join(map(str, dims))}. Use a schema of one width with a plan that projects, "
            "or a model that concatenates (dnn, widedeep, dcn, dcnv2)"
        )

    @property
    def vectors(self) -> EmbeddingCollection:
        """The collection of vectors of a model that has one."""
        if self.embedding is None:
            raise ConfigError(f"model {self.key!r} has first-order weights only, no vectors")
        return self.embedding

    @property
    def cat_width(self) -> int:
        return sum(self.vectors.bundle.widths)

    @property
    def input_width(self) -> int:
        """Floats per sample of categorical and numeric vectors side by side."""
        return self.cat_width + self.num_dense * self.numeric_dim

    def field_mlp(self, params: MLPParams) -> FieldMLP:
        """A new network from all categorical and numeric vectors to one number per sample."""
        widths = self.cat_width, self.num_dense, self.numeric_dim
        return FieldMLP(*widths, params.hidden, 1, dropout=params.dropout, batch_norm=params.batch_norm)

    def flat_input(self, dense: Tensor, ids: Ids) -> Tensor:
        """Categorical then numeric vectors side by side: ``[B, input_width]``."""
        cat = self.vectors(ids).flatten(1)
        return torch.cat([cat, (dense.unsqueeze(-1) * self.numeric).flatten(1)], 1)

    def field_vectors(self, dense: Tensor, ids: Ids) -> Tensor:
        """Categorical then numeric vectors: ``[B, V + num_dense, D]``; needs equal widths."""
        return torch.cat([self.vectors(ids), dense.unsqueeze(-1) * self.numeric], 1)

    def first_order(self, dense: Tensor, ids: Ids) -> Tensor:
        """Bias + weight of each category + weighted numeric values: ``[B]``."""
        if self.linear is None:
            raise ConfigError(f"model {self.key!r} has no first-order weights")
        return torch.addmv(self.linear(ids).flatten(1).sum(1) + self.bias, dense, self.linear_numeric)

    def collections(self) -> dict[str, EmbeddingCollection]:
        """The collections by attribute name, in a fixed order."""
        found = {"embedding": self.embedding, "linear": self.linear}
        return {k: v for k, v in found.items() if v is not None}

    def trainable(self) -> list[nn.Parameter]:
        """Parameters for a torch optimizer: dense layers, and tables without a fused optimizer."""
        return unfused_parameters(self)

    def footprint(self) -> Footprint:
        """Bytes of all embedding parts together (dense layers are not counted)."""
        return sum((c.footprint() for c in self.collections().values()), Footprint())

    @property
    def embedding_lr(self) -> float:
        """Learning rate of the fused optimizer of every collection."""
        return float(next(iter(self.collections().values())).lr)

    @embedding_lr.setter
    def embedding_lr(self, value: float) -> None:
        for coll in self.collections().values():
            coll.lr = value


M = TypeVar("M", bound=CTRModel)
MODELS: dict[str, type[CTRModel]] = {}


def register(cls: type[M]) -> type[M]:
    """Class decorator: make a model buildable by its ``key``.

    Raises:
        ConfigError: the class is no complete :class:`CTRModel`, or its key is another's; names all that is missing.
    """
    if not (isinstance(cls, type) and issubclass(cls, CTRModel)):
        raise ConfigError(f"a model is a subclass of recsys_embed.models.CTRModel; got {cls!r:.80}")
    key = getattr(cls, "key", None)
    faults = []
    if not isinstance(key, str) or not key.isidentifier():
        faults.append(f"`key` must be its name in settings, a word such as 'deepfm'; got {key!r}")
    params = getattr(cls, "params_cls", None)
    if not (isinstance(params, type) and is_dataclass(params)):
        faults.append(f"`params_cls` must be a frozen dataclass of its hyperparameters; got {params!r:.80}")
    for name, what in cls.must_define.items():
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if name in vars(owner).get("must_define", {}):
            faults.append(f"`{what} must be defined")
    try:
        signature(cls).bind("spec", "params")
    except TypeError:
        faults.append(
            f"`__init__` must take (spec, params) and call super().__init__(spec); got __init__{signature(cls)}"
        )
    # A module that is loaded anew brings its own class again.
    known = MODELS.get(str(key))
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        faults.append(f"model key {key!r} is already registered by {known.__name__}")
    raise_faults(faults, f"model class {cls.__name__}")
    MODELS[cls.key] = cls
    return cls


def make_params(cls: type[CTRModel], hparams: JSON) -> DataclassInstance:
    """Hyperparameters of ``cls`` from keywords; lists become tuples, unknown keys and wrong values are errors."""
    where = f"model {cls.key!r}"
    try:
        params: DataclassInstance = build(cls.params_cls, hparams, f"hyperparameter of {where}", where=where)
    except ConfigError as e:
        raise type(e)(str(e).replace(f"({cls.params_cls.__name__})", f"({where})")) from None
    check_settings(params, where)
    return params


@dataclass(frozen=True)
class MLPParams(Settings):
    """Sizes of an MLP, see :class:`recsys_embed.models.layers.MLP`.

    Args:
        hidden: widths of the hidden layers.
        dropout: share of the activations of every hidden layer that training sets to 0.
        batch_norm: whether every hidden layer is normalised over the batch.
    """

    hidden: tuple[int, ...] = param((400, 400, 400), low=1)
    dropout: float = param(0.0, low=0, below=1)
    batch_norm: bool = False
