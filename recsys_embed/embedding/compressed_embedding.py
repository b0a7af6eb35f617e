"""Drop-in modules: the call of nn.Embedding and nn.EmbeddingBag over any lookup program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from recsys_embed.core import config_state as _state
from recsys_embed.core import hashing
from recsys_embed.core.footprint import Footprint
from recsys_embed.core.heads import Head, run_head
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.embedding.choose_config import choose_config
from recsys_embed.embedding.fit import fit_tables
from recsys_embed.embedding.shared_tables import PlainView, SharedTables
from recsys_embed.errors import ConfigError, raise_faults
from recsys_embed.features import FeatureSpec, Unseen, spec_to_dict
from recsys_embed.kernels.fused_gather import read_rows
from recsys_embed.kernels.id_checks import bag_mode, check_id_dtype, check_offsets, given_ids
from recsys_embed.kernels.native.autograd import SingleLookup
from recsys_embed.kernels.native.lookup import reads, runs_on
from recsys_embed.kernels.native.records import supported
from recsys_embed.kernels.places import Place, absent_ids
from recsys_embed.kernels.pooling import pool_vectors
from recsys_embed.kernels.stored_tables import StoredTables
from recsys_embed.kernels.triton import status
from recsys_embed.kernels.triton.lazy_lookup import LazyLookup
from recsys_embed.kernels.unseen_ids import UnseenCount, UnseenIds, with_unseen, with_unseen_row
from recsys_embed.kernels.vectorised import VectorisedLookup
from recsys_embed.utils.types import Budget, IdValues, Option

Mode = Literal["sum", "mean", "max"]
# States load across unseen-id policies that store the same rows: the policy may differ at serving time.
STORED_UNSEEN = {"unseen": lambda policy: policy == "oov"}

# Attributes that a module has once its tables are made.
_LATER = ("kernel", "unseen", "shared", "served", "_native", "_triton", "_given")


class CompressedEmbedding(nn.Module):
    """Base of every method's module; called like ``nn.Embedding``, or like ``nn.EmbeddingBag`` when ``mode`` is set.

    Args:
        num_embeddings: number of ids; index methods take ids in ``[0, num_embeddings)``, hashing methods any int64.
        embedding_dim: width of the output.
        padding_idx: this id gives a zero vector without gradient, and bags skip it; negative counts from the end.
        sparse: tables get sparse gradients.
        mode: ``None`` for one vector per id, ``"sum"``, ``"mean"`` or ``"max"`` to pool bags.
        include_last_offset: ``offsets`` has one more entry, the number of ids.
        config: the method's configuration; or ``budget`` (bytes or text such as ``"4MiB"``) to size one; or neither,
            with the method's own options in ``params``.
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
    # Set where the module has taken the place of a plain one, whose users read `weight` as one row per id.
    stands_in: bool = False

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
        raise_faults(faults, type(self).__name__)
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else num_embeddings + padding_idx
        self.program = self.config.program(self.spec)
        taken = [t.name for t in self.program.tables if hasattr(self, t.name) or t.name in _LATER]
        raise_faults([f"table name {n!r} is taken by an attribute; choose another" for n in taken], type(self).__name__)
        self.shared = shared
        # What a loaded export reads in place of its tables.
        self.served: StoredTables | None = None
        for table in self.program.tables:
            if shared is not None and table.name in shared.values:
                self.register_parameter(table.name, shared.take(table, f"{type(self).__name__} {name!r}"))
                continue
            empty = torch.empty(table.shape, device=device, dtype=dtype)
            self.register_parameter(table.name, nn.Parameter(empty))
        places = {t.name: Place(t.name, 0) for t in self.program.tables}
        with torch.device(self._device()):
            self.unseen = UnseenIds([self.spec], [self.config.accepts_raw])
            self.kernel = VectorisedLookup([self.program], [places], optional=self.unseen.zeros)
        self._native: SingleLookup | None = None
        if supported(self.program):
            self._native = SingleLookup(self.program, self.kernel.index, self.unseen.zeros[0])
            self._triton = LazyLookup.single(name, self.program, self.kernel.index, self.unseen.zeros[0])
        self._given = frozenset(shared.values if shared is not None else ())
        self.reset_parameters()
        self._given = frozenset()

    def _like(self) -> Tensor:
        """A tensor of the type and on the device of the vectors."""
        return next(self.parameters()) if self.served is None else self.served.like

    def _device(self) -> torch.device:
        return self._like().device

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw the initial weights: a function of the seed (the config's unless given) and table names alone.

        A collection of the same seed draws the same weights.
        """
        if self.served is not None:
            raise ConfigError(f"{type(self).__name__} {self.spec.name!r} serves exported tables, which do not change")
        seed = self.config.seed if seed is None else seed
        with torch.no_grad():
            for table in self.program.tables:
                if table.name in self._given:
                    continue  # shared: the module that was built first has initialised it
                key = table.name if table.shared else f"{self.spec.name}.{table.name}"
                table.init.fill_(self.table(table.name), hashing.salt(seed, "init", key))

    def assign_(self, counts: Tensor | Mapping[str, Tensor]) -> Self:
        """Say which ids are frequent, for methods that treat them apart and whose ids are not numbered by frequency.

        Fills the index buffers; it changes which row an id reads, so call it before training.

        Args:
            counts: ``[num_embeddings]`` how often each id occurs; ties go to the smaller id. Or, by name of an index
                of the program, the ids that it holds, as :meth:`Plan.members` has them.
        """
        self.kernel.index.assign_(0, counts if isinstance(counts, Mapping) else with_unseen(self.spec, counts))
        return self

    # -- lookup ---------------------------------------------------------------------------------------------------

    def _gather(self, table: str, rows: Tensor, partial: bool) -> Tensor:
        if self.served is not None and table in self.served:
            vectors: Tensor = self.served[table](rows, partial)
            return vectors
        return read_rows(self.table(table), rows, partial, self.sparse)

    def table(self, name: str) -> Tensor:
        """The stored values of one of the program's tables: ``[rows, width]``, or of its ``shape``.

        After an export they are decoded, a copy.
        """
        if self.served is not None and name in self.served:
            return self.served[name].dense()
        values = self._parameters[name]
        if values is None:
            raise ConfigError(f"table {name!r} of {type(self).__name__} {self.spec.name!r} has been removed")
        return values

    @property
    def weight(self) -> Tensor:
        """The stored table called ``weight``, where the method has one.

        In a model whose plain tables have been compressed it is the plain table that this module stands for,
        ``[num_embeddings, embedding_dim]``: computed anew at every access, with gradients, and read-only.
        """
        if self.stands_in:
            rows = self._vectors(torch.arange(self.num_embeddings, device=self._device()))
            return rows if torch.compiler.is_compiling() else rows.as_subclass(PlainView)
        stored = self.__dict__.get("_parameters", {}).get("weight")
        if stored is None and self.__dict__.get("_modules", {}).get("served") is not None:
            stored = self.table("weight") if "weight" in (self.served or ()) else None
        if stored is None:
            raise AttributeError(f"{type(self).__name__} has no attribute 'weight'")
        values: Tensor = stored
        return values

    def lookup(self, ids: Tensor) -> Tensor:
        """Vectors of resolved int64 ``ids [n]``: ``[n, output width]``; padding is the caller's business."""
        columns, head = self._columns(ids), self.program.head
        if head is None:
            return columns
        return run_head(head, columns, [self.table(n) for n in head.tables], ids, self._policy.zeros[0])

    def _columns(self, ids: Tensor) -> Tensor:
        """Combined rows of resolved int64 ``ids [n]``, before the program's head."""
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
        served = cast("StoredTables | None", self._modules.get("served"))
        if served is not None:
            stored = served.direct(self._native.tables)
            return None if stored is None or not reads(ids, stored) else self._native(ids, stored, False)
        tables = [self.table(name) for name in self._native.tables]
        if runs_on(ids, tables):
            return self._native(ids, tables, self.sparse)
        if status.runs_on(ids, tables):
            return self._triton(ids.unsqueeze(1), tables, sparse=self.sparse)[0]
        return None

    def before_pool(self, ids: Tensor) -> Tensor:
        """What bags pool: one row per resolved id ``[n]``; the vectors themselves unless a method says otherwise."""
        return self.lookup(ids) if self._head_of_bags is None else self._columns(ids)

    def after_pool(self, pooled: Tensor) -> Tensor:
        """From pooled rows of :meth:`before_pool` to vectors ``[bags, output width]``."""
        head = self._head_of_bags
        return pooled if head is None else head.apply(pooled, [self.table(n) for n in head.tables])

    @property
    def output_dim(self) -> int:
        """Width of the output: ``embedding_dim``, times the number of vectors where a method emits several."""
        return self.program.width

    def lookup_resolved(self, ids: Tensor) -> Tensor:
        """As :meth:`lookup`, with zeros where an id is -1, "no id", whatever the method."""
        if not (self.config.computes and self._policy.zeros[0]):
            return self.lookup(ids)  # the kernel knows about them
        return self.lookup(ids.clamp_min(0)).masked_fill((ids < 0).unsqueeze(-1), 0.0)

    def before_pool_resolved(self, ids: Tensor) -> Tensor:
        """As :meth:`before_pool`; rows where an id is -1, "no id", are to be skipped."""
        return self.before_pool(ids.clamp_min(0) if self.config.computes and self._policy.zeros[0] else ids)

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

    def count_unseen(self, counting: bool = True) -> Self:
        """Switch counting on or off, whatever the policy."""
        self.unseen.counting = counting
        return self

    def forward(
        self, input: IdValues, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Look up ids.

        Args:
            input: the ids, int32 or int64; for hashing methods also strings, in lists or numpy arrays, and integers in
                numpy arrays, see :func:`recsys_embed.string_ids`. Without ``mode`` any shape; with ``mode``
                ``[bags, length]``, or ``[n]`` with ``offsets [bags]`` (``[bags + 1]`` with ``include_last_offset``).
            per_sample_weights: floats of the shape of ``input``, for ``mode="sum"``; may require grad.

        Returns:
            ``[*input.shape, output_dim]`` without ``mode``, else ``[bags, output_dim]``.

        Raises:
            IdRangeError: an id is outside ``[0, num_embeddings)``, and ``unseen`` is ``"raise"``, or is ``None`` and
                the method does not hash.
        """
        # The parameter's name is torch's, which callers may spell out.
        ids = check_id_dtype(given_ids(input, self.spec, self.config.accepts_raw, self._policy), self.spec.name)
        if self.mode is None:
            if offsets is not None or per_sample_weights is not None:
                raise ConfigError("`offsets` and `per_sample_weights` need a module built with mode='sum'|'mean'|'max'")
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
            weight: the plain table; dtype and device carry over.
            counts: ``[num_embeddings]`` how often each id occurs; weighs its squared error (default: equal). Rows that
                only ids of count 0 read keep their initial values. With ``unseen="oov"``, the id of unseen ids starts
                from the mean over all ids, so weighted, and is fitted as one of mean count.
            options: anything the constructor takes (``budget=``, ``mode=``, the method's options).
        """
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
        module = cls(weight.shape[0], weight.shape[1], **options)
        if counts is not None:
            module.assign_(counts)
        module.fit_(*with_unseen_row(module.spec, weight.detach(), counts))
        module.reset_unseen_counts()
        return module

    def fit_(self, weight: Tensor, counts: Tensor | None = None) -> None:
        """Approximate ``weight [spec.num_ids, embedding_dim]`` in place; see :meth:`from_dense`."""
        fit_tables(self, weight, counts)

    def footprint(self) -> Footprint:
        """Bytes this module serves and trains with (without optimizer state)."""
        if self.served is not None:
            own = sum(p.nbytes for p in self.parameters())
            return self.served.footprint() + Footprint(own, self.kernel.index.nbytes)
        return self.config.footprint(self.spec, next(self.parameters()).element_size())

    # -- tables shared with other modules -------------------------------------------------------------------------

    def _reunite(self, before: dict[str, nn.Parameter | None]) -> None:
        """Read the tables that another reader's exchange of parameters has led to."""
        for name, old in before.items():
            new = self._parameters.get(name)
            if self.shared is not None and old is not None and new is not None and new is not old:
                self._parameters[name] = self.shared.follow(old, new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._parameters)
        super()._apply(fn, recurse)
        self._reunite(before)
        return self

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {"spec": spec_to_dict(self.spec), "config": self.config.to_dict()}

    def _upgraded(self, identity: Any) -> Any:
        """A saved identity with the present names of the method's options."""
        config = identity.get("config") if isinstance(identity, dict) else None
        if not isinstance(config, dict) or config.get("method") != self.config.method:
            return identity
        return {**identity, "config": self.config.current_options(config, warn=False)}

    def get_extra_state(self) -> Tensor:
        """Feature and configuration as JSON bytes, so that a state dict refuses to load elsewhere."""
        return _state.pack(self._identity())

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: the comparison comes before any weight is copied."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "_extra_state" in state_dict:
            # The initial distribution and the pooling do not change what stored rows mean.
            where = prefix.rstrip(".") or type(self).__name__
            saved = state_dict[prefix + "_extra_state"]
            _state.check(saved, self._identity(), where, ("init", "pooling"), STORED_UNSEEN, self._upgraded)
        errors, before, held = args[-1], len(args[-1]), dict(self._parameters)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._reunite(held)
        if len(errors) > before and prefix + "_extra_state" not in state_dict:
            name = type(self).__name__
            errors.append(
                f"the state at {prefix.rstrip('.') or 'the top'!r} names no configuration, so it is not of a {name}; "
                f"take over a plain trained table with {name}.from_dense(weight, budget=...)"
            )

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        for key, value in (("padding_idx", self.padding_idx), ("mode", self.mode), ("unseen", self.spec.unseen)):
            if value is not None:
                text += f", {key}={value!r}"
        return text + f", config={self.config}"
