"""Drop-in modules: the call of nn.Embedding and nn.EmbeddingBag over any lookup program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_embed.core.heads import Head, run_head
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.embedding.choose_config import choose_config
from recsys_embed.embedding.fit import fit_tables
from recsys_embed.embedding.module_tables import ModuleTables
from recsys_embed.embedding.other_inputs import call_with_other_input
from recsys_embed.embedding.shared_tables import SharedTables
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import FeatureSpec, Unseen
from recsys_embed.kernels.data_parallel import prepare_data_parallel, sparse_of
from recsys_embed.kernels.distinct_ids import DistinctIds, distinct_ids
from recsys_embed.kernels.id_checks import bag_mode, check_id_dtype, check_offsets, given_ids
from recsys_embed.kernels.low_precision_states import new_table
from recsys_embed.kernels.native.autograd import SingleLookup
from recsys_embed.kernels.native.lookup import reads, runs_on
from recsys_embed.kernels.native.records import supported
from recsys_embed.kernels.native.trains import run_natively
from recsys_embed.kernels.places import Place, absent_ids, read_rows
from recsys_embed.kernels.pooling import pool_vectors
from recsys_embed.kernels.recording import tracing
from recsys_embed.kernels.row_cache import RowCaches
from recsys_embed.kernels.stored_tables import StoredTables
from recsys_embed.kernels.triton import status
from recsys_embed.kernels.triton.lazy_lookup import LazyLookup
from recsys_embed.kernels.unseen_ids import NO_ID, UnseenCount, UnseenIds, with_unseen_row
from recsys_embed.kernels.vectorised import VectorisedLookup
from recsys_embed.utils.types import Budget, IdValues, Option

Mode = Literal["sum", "mean", "max"]
# Attributes that a module has once its tables are made.
_LATER = ("kernel", "unseen", "shared", "served", "_native", "_triton", "_given", "_indexed", "stored_weight")


class CompressedEmbedding(ModuleTables):
    """Base of every method's module; called like ``nn.Embedding``, or like ``nn.EmbeddingBag`` when ``mode`` is set.

    Args:
        num_embeddings: number of ids; index methods take ids in ``[0, num_embeddings)``, hashing methods any int64.
        embedding_dim: width of the output.
        padding_idx: this id gives a zero vector without gradient, and bags skip it; negative counts from the end.
        sparse: tables get sparse gradients.
        mode: ``None`` for one vector per id, ``"sum"``, ``"mean"`` or ``"max"`` to pool bags.
        include_last_offset: ``offsets`` has one more entry, the number of ids.
        config: the method's configuration; or ``budget`` (bytes or text such as ``"4MiB"``) to size one; or neither,
            with the method's own options in ``params``. Initial weights are a function of its ``seed``; without
            ``config`` and ``seed`` torch's generator draws them, as those of ``nn.Embedding``.
        name: salts the hashes; two modules of equal name, seed and size share their collisions.
        init: initial distribution of a plain table, see :class:`FeatureSpec`; ``"normal:1"`` is ``nn.Embedding``'s.
        unseen: what ids outside ``[0, num_embeddings)`` become, see :class:`FeatureSpec`: ``"hash"``, ``"oov"``,
            ``"zero"``, ``"raise"``, or ``None`` for the method's default.
        shared: holds the tables of these names for several drop-ins; others are this module's own.

    Raises:
        ConfigError: an option is unknown, out of range, or not supported by the method.
        BudgetError: the budget cannot be met.
    """

    # What finding the tables of a model takes these modules for.
    table_kind: ClassVar[str] = "compressed"

    config_cls: ClassVar[type[MethodConfig]]
    supports_torch_options: ClassVar[bool] = False
    _indexed = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        mode: Mode | None = None,
        include_last_offset: bool = False,
        config: MethodConfig | None = None,
        budget: Budget | None = None,
        name: str = "embedding",
        init: str = "normal:1",
        unseen: Unseen | None = None,
        shared: SharedTables | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **params: Option,
    ) -> None:
        super().__init__()
        pooling: Mode = "sum" if mode is None or mode not in get_args(Mode) else mode
        self.spec = FeatureSpec(name, num_embeddings, embedding_dim, pooling=pooling, init=init, unseen=unseen)
        itemsize = torch.empty(0, dtype=dtype, device="meta").element_size()
        self.config = choose_config(
            CompressedEmbedding, type(self).__name__, self.config_cls, self.spec, config, budget, params, itemsize
        )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.mode, self.include_last_offset, self.sparse = mode, include_last_offset, sparse
        self.max_norm, self.norm_type, self.scale_grad_by_freq = max_norm, norm_type, scale_grad_by_freq
        faults = []
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            faults.append(f"`padding_idx` must be in [{-num_embeddings}, {num_embeddings}); got {padding_idx}")
        if mode is not None and mode not in get_args(Mode):
            faults.append(f"`mode` must be None, 'sum', 'mean' or 'max'; got {mode!r}")
        if not self.supports_torch_options:
            for key, value in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq or None)):
                if value is not None:
                    faults.append(f"`{key}` is not supported by method {self.config.method!r}; use method 'full'")
        if (max_norm is not None or scale_grad_by_freq) and (
            unseen == "zero" or (unseen == "hash" and padding_idx is not None)
        ):
            faults.append(f"`max_norm` and `scale_grad_by_freq` do not go with `unseen={unseen!r}` here; use 'oov'")
        if (max_norm is not None or scale_grad_by_freq) and self.config.quantization != "ptq":
            faults.append(
                "`max_norm` and `scale_grad_by_freq` need rows that train unrounded; leave `quantization` at 'ptq'"
            )
        raise_faults(faults, type(self).__name__)
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else num_embeddings + padding_idx
        self.program = self.config.program(self.spec)
        taken = [
            t.name for t in self.program.tables if (t.name != "weight" and hasattr(self, t.name)) or t.name in _LATER
        ]
        raise_faults([f"table name {n!r} is taken by an attribute; choose another" for n in taken], type(self).__name__)
        self.shared = shared
        # What a loaded export reads in place of its tables.
        self.served: StoredTables | None = None
        # Of rows that are computed, where a loaded file is served with it.
        self.caches: RowCaches | None = None
        for table in self.program.tables:
            if shared is not None and table.name in shared.values:
                self.register_parameter(table.name, shared.take(table, f"{type(self).__name__} {name!r}"))
                continue
            where = None if device is None else torch.device(device)
            values = new_table(table, self.config.seed, where, dtype)
            self.register_parameter(table.name, nn.Parameter(values, requires_grad=not table.frozen))
        places = {t.name: Place(t.name, 0) for t in self.program.tables}
        with torch.device(self._device()):
            self.unseen = UnseenIds([self.spec], [self.config.accepts_raw])
            self.kernel = VectorisedLookup([self.program], [places], optional=self.unseen.zeros)
        self._indexed = bool(self.kernel.index.arrays.held)
        self._native: SingleLookup | None = None
        self._triton: LazyLookup | None = None
        if self.program.row_lookups and supported(self.program):
            self._native = SingleLookup(self.program, self.kernel.index, self.unseen.zeros[0])
            if not self.program.generates:  # as collections leave these to torch on a GPU
                self._triton = LazyLookup.single(name, self.program, self.kernel.index, self.unseen.zeros[0])
        self._given = frozenset(shared.values if shared is not None else ())
        self._seeded = config is not None or "seed" in params
        self.reset_parameters()
        self._given = frozenset()
        if self._has_extra_state:
            self._show_extra_state()

    # -- lookup ---------------------------------------------------------------------------------------------------

    def _gather(self, table: str, rows: Tensor, partial: bool) -> Tensor:
        if self.served is not None and table in self.served:
            vectors: Tensor = self.served[table](rows, partial)
            return vectors
        return read_rows(self.table(table), rows, partial, self.sparse)

    def lookup(self, ids: Tensor) -> Tensor:
        """Vectors of resolved int64 ``ids [n]``: ``[n, output width]``; padding is the caller's business."""
        head = self.program.head
        if head is None:
            return self._columns(ids)
        kept = None if self.caches is None else self.caches.rows(0, ids, self._computed)
        if kept is not None:
            return kept
        found = distinct_ids(ids) if head.generates else DistinctIds(ids, None)
        return found.scatter(self._computed(found.ids))

    def _computed(self, ids: Tensor) -> Tensor:
        """Vectors of resolved ``ids [n]`` by the program's head."""
        head, columns = cast("Head", self.program.head), self._columns(ids)
        out = run_natively(head, columns) if head.generates and self._native is not None else None
        if out is None:
            out = run_head(head, columns, [self.table(n) for n in head.tables], ids, self._policy.zeros[0])
        return out

    def _columns(self, ids: Tensor) -> Tensor:
        """Combined rows of resolved int64 ``ids [n]``, before the program's head."""
        if not self.program.row_lookups:
            return self._like().new_empty(ids.shape[0], 0)
        out = self._native_lookup(ids)
        if out is None:
            (out,) = self.kernel([ids.unsqueeze(1)], None, self._gather)
            out = out.squeeze(1)
        return out

    @property
    def _head_of_bags(self) -> Head | None:
        """The head that applies to pooled columns, if it is one of these."""
        head = self.program.head
        return head if head is not None and head.pools == "bags" else None

    def _native_lookup(self, ids: Tensor) -> Tensor | None:
        """Combined vectors by the kernels of the CPU or of the GPU, None where these cannot run."""
        if self._native is None or torch.compiler.is_compiling():
            return None
        served: StoredTables | None = self._modules.get("served")  # type: ignore[assignment]
        if served is not None:
            stored = served.direct(self._native.tables)
            return None if stored is None or not reads(ids, stored) else self._native(ids, stored, False)
        tables = [self.table(name) for name in self._native.tables]
        if runs_on(ids, tables):
            return self._native(ids, tables, self.sparse)
        if self._triton is not None and status.runs_on(ids, tables):
            return self._triton(ids.unsqueeze(1), tables, sparse=self.sparse)[0]
        return None

    def before_pool(self, ids: Tensor) -> Tensor:
        """What bags pool: one row per resolved id ``[n]``; the vectors themselves unless a method says otherwise."""
        return self.lookup(ids) if self._head_of_bags is None else self._columns(ids)

    def after_pool(self, pooled: Tensor) -> Tensor:
        """From pooled rows of :meth:`before_pool` to vectors ``[bags, output width]``."""
        head = self._head_of_bags
        return pooled if head is None else run_head(head, pooled, [self.table(n) for n in head.tables])

    @property
    def output_dim(self) -> int:
        """Width of the output: ``embedding_dim``, times the number of vectors where a method emits several."""
        return self.program.width

    def lookup_resolved(self, ids: Tensor, optional: bool | None = None) -> Tensor:
        """As :meth:`lookup`, with zeros where an id is -1, "no id", whatever the method.

        Args:
            optional: whether -1 is no id; by default as the module's own policy for unseen ids has it.
        """
        if not (self.config.computes and (self._policy.zeros[0] if optional is None else optional)):
            return self.lookup(ids)  # the kernel knows about them
        absent = ids == NO_ID
        return self.lookup(ids.masked_fill(absent, 0)).masked_fill(absent.unsqueeze(-1), 0.0)

    def before_pool_resolved(self, ids: Tensor, optional: bool | None = None) -> Tensor:
        """As :meth:`before_pool`; rows where an id is -1, "no id", are to be skipped."""
        optional = self._policy.zeros[0] if optional is None else optional
        return self.before_pool(ids.masked_fill(ids == NO_ID, 0) if self.config.computes and optional else ids)

    def _vectors(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        """Vectors of resolved int64 ``ids [n]``, padding included.

        Args:
            given: the ids before they were resolved: an unseen id that hashes to the padding's row is no padding.
        """
        out = self.lookup_resolved(ids)
        if self.padding_idx is None:
            return out
        return out.masked_fill(((ids if given is None else given) == self.padding_idx).unsqueeze(-1), 0.0)

    @property
    def _policy(self) -> UnseenIds:
        """The attribute ``unseen``, which torch finds last of all, ten times slower."""
        return self._modules["unseen"]  # type: ignore[return-value]

    def _resolve(self, ids: Tensor) -> Tensor:
        """What the policy makes of ``ids``, counted: see :class:`UnseenIds`."""
        policy = self._policy
        padding = None if self.padding_idx is None or not policy.counting else ids == self.padding_idx
        resolved: Tensor = policy(ids, None, padding)
        return resolved

    def unseen_counts(self) -> dict[str, UnseenCount]:
        """Ids looked up since counting began or was reset, and how many of them were unseen, by feature name.

        Counting is on where ``unseen`` is ``"hash"``, ``"oov"`` or ``"zero"``, else after :meth:`count_unseen`. Padding
        does not count. Reading waits for the device; counting does not.

        >>> from recsys_embed.methods.hash import HashEmbedding
        >>> emb = HashEmbedding(10, 4, num_buckets=3, unseen="oov")
        >>> _ = emb(torch.tensor([3, 10, -1]))
        >>> emb.unseen_counts()
        {'embedding': UnseenCount(unseen=2, looked_up=3)}
        """
        return self.unseen.read()

    def reset_unseen_counts(self) -> None:
        """Count from zero."""
        self.unseen.reset()

    def sparse_parameters(self) -> list[nn.Parameter]:
        """The parameters that get sparse gradients: tables whose rows are read, where ``sparse`` is set."""
        names = [self.parameter_name(t.name) for t in self.program.tables if not t.dense]
        return sparse_of(self, names, self.sparse)

    def count_unseen(self, counting: bool = True) -> Self:
        """Switch counting on or off, whatever the policy."""
        self.unseen.counting = counting
        return self

    def forward(
        self, input: IdValues, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Look up ids.

        Args:
            input: the ids, int32 or int64, also a jagged nested tensor of them; for hashing methods also strings, in
                lists or numpy arrays, and integers in numpy arrays, see :func:`recsys_embed.string_ids`. Without
                ``mode`` any shape; with ``mode`` ``[bags, length]``, or ``[n]`` with ``offsets [bags]``
                (``[bags + 1]`` with ``include_last_offset``).
            per_sample_weights: floats of the shape of ``input``, for ``mode="sum"``; may require grad.

        Returns:
            ``[*input.shape, output_dim]`` without ``mode``, else ``[bags, output_dim]``.

        Raises:
            IdRangeError: an id is outside ``[0, num_embeddings)``, and ``unseen`` is ``"raise"``, or is ``None`` and
                the method does not hash.
        """
        if (self._indexed or self.sparse) and not torch.compiler.is_compiling():
            prepare_data_parallel()
        if type(input) is not Tensor or (input.dim() != 1 and input.is_nested):
            found = call_with_other_input(self, input, offsets, per_sample_weights)
            if found is not None:
                return found
        # The parameter's name is torch's, which callers may spell out.
        ids = check_id_dtype(given_ids(input, self.spec, self.config.accepts_raw, self), self.spec.name)
        if self.mode is None:
            if offsets is not None or per_sample_weights is not None:
                raise ConfigError("`offsets` and `per_sample_weights` need a module built with mode='sum'|'mean'|'max'")
            if tracing():
                return self._traced(ids)
            flat = (ids if ids.dim() == 1 else ids.reshape(-1)).long()
            out = self._vectors(self._resolve(flat), flat)
            return out if ids.dim() == 1 else out.view(*ids.shape, out.shape[1])
        if per_sample_weights is not None and per_sample_weights.shape != ids.shape:
            raise ConfigError(
                f"`per_sample_weights` must have the shape of `ids`, {tuple(ids.shape)}; "
                f"got {tuple(per_sample_weights.shape)}"
            )
        values, offsets = self._bags(ids, offsets)
        flat = self._resolve(values)
        vectors = self.before_pool_resolved(flat)
        skipped = absent_ids(flat) if self._policy.zeros[0] else None
        if self.padding_idx is not None:
            padding = values == self.padding_idx
            skipped = padding if skipped is None else skipped | padding
        weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        mode = bag_mode(self.mode, offsets)
        pooled = pool_vectors(vectors, offsets, mode, weights, skipped, self.include_last_offset)
        return self.after_pool(pooled)

    def _traced(self, ids: Tensor) -> Tensor:
        """As :meth:`forward` without ``mode``, of a program that takes ids of any number of dimensions."""
        flat = ids.reshape(-1).long()
        out = self._vectors(self._resolve(flat), flat)
        places = torch.ones_like(flat).cumsum(0) - 1
        return F.embedding(places.view_as(ids), out)

    if TYPE_CHECKING:  # torch types a module's call as anything
        __call__ = forward

    def _bags(self, ids: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        if ids.dim() == 2:
            if offsets is not None:
                raise ConfigError("2-D `ids` are bags of equal length and take no `offsets`")
            count = ids.shape[0] + int(self.include_last_offset)
            starts = torch.arange(count, device=ids.device) * ids.shape[1]
            return ids.reshape(-1).long(), starts
        if ids.dim() != 1 or offsets is None:
            raise ConfigError(
                f"bags are 2-D `ids`, or 1-D `ids` with `offsets`; got {ids.dim()}-D ids, offsets {offsets}"
            )
        return ids.long(), check_offsets(offsets, ids.numel(), f"feature {self.spec.name!r}")

    # -- whole table ----------------------------------------------------------------------------------------------

    def _chunks(self, count: int, size: int = 1 << 16) -> Iterator[Tensor]:
        for start in range(0, count, size):
            yield torch.arange(start, min(start + size, count), device=self._device())

    @torch.no_grad()
    def materialize(self) -> Tensor:
        """The plain table this module stands for: ``[num_embeddings, output_dim]``, a copy.

        >>> from recsys_embed.methods.hash import HashEmbedding
        >>> HashEmbedding(10, 4, num_buckets=3).materialize().shape
        torch.Size([10, 4])
        """
        out = self._like().new_empty(self.num_embeddings, self.output_dim)
        for ids in self._chunks(self.num_embeddings):
            out[ids[0] : ids[-1] + 1] = self._vectors(ids)
        return out

    @classmethod
    def from_dense(cls, weight: Tensor, *, counts: Tensor | None = None, **options: Option) -> Self:
        """A module whose tables approximate a trained ``weight [num_embeddings, embedding_dim]`` in least squares.

        Args:
            weight: the plain table, a tensor or an array; dtype and device carry over.
            counts: ``[num_embeddings]`` how often each id occurs; weighs its squared error (default: equal). Rows that
                only ids of count 0 read keep their initial values. With ``unseen="oov"``, the id of unseen ids starts
                from the mean over all ids, so weighted, and is fitted as one of mean count.
            options: anything the constructor takes (``budget=``, ``mode=``, the method's options).
        """
        try:
            weight = torch.as_tensor(weight)
            counts = None if counts is None else torch.as_tensor(counts, device=weight.device)
        except (TypeError, ValueError, RuntimeError) as e:
            raise ConfigError(f"`weight` and `counts` must be tensors or arrays of numbers: {e}") from e
        if weight.dim() != 2:
            raise ConfigError(f"`weight` must be [num_embeddings, embedding_dim]; got shape {tuple(weight.shape)}")
        faults = []
        if not weight.is_floating_point():
            faults.append(f"`weight` must be floating point; got {weight.dtype}")
        elif not torch.isfinite(weight).all():
            faults.append(f"`weight` must be finite; {int((~torch.isfinite(weight)).any(1).sum())} rows are not")
        if counts is not None and counts.shape != weight.shape[:1]:
            faults.append(f"`counts` must be [{weight.shape[0]}]; got shape {tuple(counts.shape)}")
        elif counts is not None and not ((counts >= 0) & torch.isfinite(counts)).all():
            faults.append("`counts` must be finite numbers >= 0")
        elif counts is not None and not counts.any():
            faults.append("`counts` must not all be 0")
        raise_faults(faults, f"{cls.__name__}.from_dense")
        options = {"device": weight.device, "dtype": weight.dtype, **options}
        cls._fit_codes(weight, options)
        if "config" not in options:
            options.setdefault("seed", 0)  # the same table gives the same module
        module = cls(weight.shape[0], weight.shape[1], **options)
        if counts is not None:
            module.assign_(counts)
        module.fit_(*with_unseen_row(module.spec, weight.detach(), counts))
        module.reset_unseen_counts()
        return module

    @staticmethod
    def _fit_codes(weight: Tensor, options: dict[str, Option]) -> None:
        """Let the codes of low-precision rows span a trained table, unless ``options`` say how they start.

        The initial weights decide it: four of their standard deviations, see :attr:`Initializer.reach`.
        """
        config = options.get("config")
        quantization = options.get("quantization") if config is None else cast("MethodConfig", config).quantization
        if quantization in (None, "ptq") or "init" in options or weight.is_meta or not weight.numel():
            return
        values = weight.detach().double()
        spread = max(float(values.square().mean().sqrt()), float(values.abs().amax()) / 4)
        options["init"] = f"normal:{spread or 1.0:.6g}".replace("e+", "e")

    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Approximate ``weight [spec.num_ids, embedding_dim]`` in place; see :meth:`from_dense`."""
        fit_tables(self, weight, counts)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        for key, value in (("padding_idx", self.padding_idx), ("mode", self.mode), ("unseen", self.spec.unseen)):
            if value is not None:
                text += f", {key}={value!r}"
        return text + f", config={self.config}"
