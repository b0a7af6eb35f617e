"""EmbeddingCollection: one batched lookup for all features of a model, from a schema and a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from recsys_embed.collection.backward_steps import LookupRecord
from recsys_embed.collection.bags import to_bags
from recsys_embed.collection.batched_lookup import BatchedLookup
from recsys_embed.collection.earlier_states import take_in_tables_of_modules
from recsys_embed.collection.fused_tables import FusedTables
from recsys_embed.collection.lookup_bundle import LookupBundle
from recsys_embed.collection.torch_features import unknown_transforms
from recsys_embed.core import config_state as _state
from recsys_embed.core import hashing
from recsys_embed.core.footprint import Footprint
from recsys_embed.core.program import LookupProgram, Table
from recsys_embed.embedding.module_tables import STORED_UNSEEN
from recsys_embed.errors import BackendError, CheckpointError, ConfigError, raise_faults
from recsys_embed.features import Schema
from recsys_embed.kernels import dispatch
from recsys_embed.kernels.data_parallel import prepare_data_parallel, sparse_of
from recsys_embed.kernels.fused_gather import FusedGather
from recsys_embed.kernels.id_checks import check_id_dtype, given_ids
from recsys_embed.kernels.indexes import IndexStore
from recsys_embed.kernels.low_precision_states import STORED_NUMBERS, low_precision_tables, numbers_to_save
from recsys_embed.kernels.native import lookup as native
from recsys_embed.kernels.native.autograd import NativeStep
from recsys_embed.kernels.native.masks import Masking
from recsys_embed.kernels.places import Gather, read_rows
from recsys_embed.kernels.row_cache import RowCaches
from recsys_embed.kernels.storage import formats_of, stack_tables
from recsys_embed.kernels.stored_tables import StoredTables
from recsys_embed.kernels.unseen_ids import UnseenCount
from recsys_embed.optim import FusedOptimizer, unfused_parameters
from recsys_embed.plan import Plan
from recsys_embed.registry import with_current_names
from recsys_embed.utils.types import JSON, Ids, IdValues

# In a state dict's configuration: the tables in each storage of low-precision rows.
STORED_TABLES = "stored_tables"


class EmbeddingCollection(FusedTables):
    """The embeddings of all features, stored together and looked up in one call.

    Args:
        schema: the features, in the order of the id columns.
        plan: a method configuration per feature; plain tables when None.
        optimizer: updates tables in backward, one step of the rule for each, or at ``step()`` of what
            :func:`recsys_embed.optim.fused_optimizer` makes; ``docs/training_loop.md`` says what each takes. ``None``
            leaves ordinary gradients, which projections and other dense parameters always have.
        seed: of the initial weights (the configurations' own seeds salt the hashes).
        backend: ``"auto"``, or a name of :func:`available_backends`. ``"fbgemm"``, a backend of earlier versions, warns
            and runs what ``"auto"`` picks.
        sparse: with ``optimizer=None``, gradients of the tables are sparse.

    Raises:
        ConfigError: plan and schema do not fit; all faults at once.

    >>> from recsys_embed import FeatureSpec, RowwiseAdagrad
    >>> schema = Schema([FeatureSpec("C1", 1000, 16), FeatureSpec("C2", 50_000, 16)])
    >>> coll = EmbeddingCollection(schema, Plan.uniform(schema, "hash", budget="100KiB"), RowwiseAdagrad(lr=0.01))
    >>> out = coll(torch.tensor([[3, 7], [999, 49_999]]))
    >>> out.shape
    torch.Size([2, 2, 16])
    >>> out.sum().backward()  # the tables are updated here
    """

    # What finding the tables of a model takes these modules for.
    table_kind: ClassVar[str] = "collection"
    # Whether rows train in few bits.
    _few_bits = False
    # Whether an exported file filled it: rows are then as they are served, whatever the plan says.
    from_file: bool = False

    def __init__(
        self,
        schema: Schema,
        plan: Plan | None = None,
        optimizer: FusedOptimizer | None = None,
        *,
        seed: int = 0,
        backend: str = "auto",
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if plan is not None and not isinstance(plan, Plan):
            raise ConfigError(
                f"`plan`, the second argument, must be a Plan or None; got {plan!r:.80}; an update rule is given as "
                "optimizer="
            )
        if optimizer is not None and not isinstance(optimizer, FusedOptimizer):
            raise ConfigError(
                "`optimizer` must be a rule of recsys_embed.optim, e.g. RowwiseAdagrad(lr=0.01), or None; got "
                f"{optimizer!r:.80}. A torch optimizer steps the parameters of a collection built with optimizer=None"
            )
        like = torch.empty(0, device=device, dtype=dtype)
        backend = dispatch.named(backend)
        by_name = backend in ("native", "triton")
        kernels = dispatch.kernels(backend, optimizer)
        backend = dispatch.choose(backend, optimizer, like.device)
        if backend == "reference" and optimizer is not None:
            raise ConfigError(
                "backend 'reference' reads a table several times per step and cannot fuse its update; "
                "use optimizer=None, or backend 'torch'"
            )
        plan = Plan.full(schema) if plan is None else plan
        tables = plan.tables(schema)
        if kernels:
            _say_what_torch_runs(plan.gathered(schema), backend if by_name else None)
        shapes, places = stack_tables(tables)
        formats = formats_of(tables, places)
        if backend == "triton" and any(f.has_master for f in formats.values()):
            if by_name:
                raise BackendError(
                    "backend 'triton' does not read rows rounded (`quantization='lsq'`); use backend 'auto', 'native' "
                    "or 'torch'"
                )
            backend = "torch"
            dispatch.say_once(
                "a collection whose rows are read rounded (`quantization='lsq'`) runs on torch on a GPU, all of its "
                "features; keep features of other quantization in a collection of their own"
            )
        super().__init__(shapes, optimizer, like.device, like.dtype, backend, formats, seed)
        self.schema, self.plan, self.seed, self.sparse = schema, plan, seed, sparse
        self._few_bits = bool(formats)
        self.tables, self.places = tables, places
        # What a loaded export reads in place of its tables.
        self.served: StoredTables | None = None
        self.bundle = LookupBundle(schema, plan, places, shapes, like, backend, kernels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights, a function of seed and table names alone, and clear the optimizer's state."""
        if self.served is not None:
            raise ConfigError("this collection serves exported tables, which do not change")
        dense = self.bundle.dense_tables()
        with torch.no_grad():
            for key, table in self.tables.items():
                values = dense[key] if table.dense else self.table(key)
                table.init.fill_(values, hashing.salt(self.seed, "init", key))
            self._reset_steps()
        self.bundle.reset_own(self.seed)
        self.bundle.assign_(self.plan.assigned(self.schema))

    def table(self, key: str) -> Tensor:
        """View ``[rows, width]`` of a physical table, by its key in ``tables`` (e.g. ``"C1.weight"``).

        After an export it is decoded, a copy.
        """
        self.catch_up_()
        storage, offset = self.places[key]
        if self.served is not None and storage in self.served:
            return self.served[storage].dense(offset, self.tables[key].rows)
        weight = self._table(storage)
        # Changes of a table that a fused optimizer steps are no part of a graph.
        weight = weight if self.optimizer is None else weight.detach()
        return weight[offset : offset + self.tables[key].rows]

    def assign_(self, counts: Mapping[str, Tensor | Mapping[str, Tensor]]) -> Self:
        """Say which ids are frequent, for methods that treat them apart and whose ids are not numbered by frequency.

        Fills the index buffers; it changes which rows ids read, so call it before training.

        Args:
            counts: per feature name ``[num_embeddings]`` how often each id occurs; features left out stay as they are.
                Or, by name of an index, the ids that it holds, as :meth:`Plan.members` has them.
        """
        self.bundle.assign_(counts)
        return self

    def unseen_counts(self) -> dict[str, UnseenCount]:
        """Ids looked up since counting began or was reset, and how many of them were unseen, by feature name.

        Counting is on for all features where one has ``unseen`` ``"hash"``, ``"oov"`` or ``"zero"``, else after
        :meth:`count_unseen`. It adds to counters on the device, without waiting for it; reading waits. Counters are
        not saved, and programs made by ``torch.export`` do not count. Several threads may look up at once; additions
        of two threads at the same moment may lose one.

        >>> from recsys_embed import FeatureSpec
        >>> coll = EmbeddingCollection(Schema([FeatureSpec("C1", 10, 4, unseen="zero"), FeatureSpec("C2", 10, 4)]))
        >>> _ = coll(torch.tensor([[10, 3], [4, 5]]))
        >>> coll.unseen_counts()["C1"]
        UnseenCount(unseen=1, looked_up=2)
        """
        return self.bundle.unseen.read()

    def sparse_parameters(self) -> list[nn.Parameter]:
        """The parameters that get sparse gradients: tables whose rows are read, where ``sparse`` is set."""
        return sparse_of(self, list(self.storages), self.sparse)

    def reset_unseen_counts(self) -> None:
        """Count from zero."""
        self.bundle.unseen.reset()

    def count_unseen(self, counting: bool = True) -> Self:
        """Switch counting on or off for all features, whatever their policies."""
        self.bundle.unseen.counting = counting
        return self

    @property
    def output_dim(self) -> int | None:
        """Width of every vector of the output, or None where features differ."""
        return self.bundle.output_dim

    @property
    def num_vectors(self) -> int:
        """Vectors per sample: one per feature, more where a method generates features."""
        return sum(self.bundle.vectors)

    # -- lookup ---------------------------------------------------------------------------------------------------

    def _gather(
        self, storage: str, rows: Tensor, partial_rows: bool, record: LookupRecord | None = None, stepping: bool = False
    ) -> Tensor:
        if self.served is not None and storage in self.served:
            vectors: Tensor = self.served[storage](rows, partial_rows)
            return vectors
        weight = self._weight(storage)
        if stepping and weight.requires_grad:
            if torch.compiler.is_compiling():
                return self._compiled_gather(storage, rows, partial_rows)
            self._catch_up_rows(storage, rows)
            update = None if record is None else partial(self._update, storage, record)
            out: Tensor = FusedGather.apply(weight, rows, partial_rows, update)
            return out
        return read_rows(weight, rows, partial_rows, self.sparse)

    def _batched_tables(self, kernels: Collection[str], ids: Tensor) -> tuple[str, list[Tensor]] | None:
        """Which of some batched kernels can run on ``ids`` and on the storages, and these; None where none can."""
        if not kernels or (self.sparse and torch.compiler.is_compiling()):
            return None
        # Not as an attribute, which torch finds last of all, ten times slower.
        served: StoredTables | None = self._modules.get("served")  # type: ignore[assignment]
        if served is not None:
            stored = served.direct(self.storages) if "native" in kernels else None
            return None if stored is None or not native.reads(ids, stored) else ("native", stored)
        tables = self._weights()
        if self._constant:
            tables = [t.detach() for t in tables]
        for name in kernels:
            if dispatch.RUNS_ON[name](ids, tables):
                return name, tables
        return None

    def forward(
        self,
        ids: Ids,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        mask: Masking | None = None,
    ) -> Tensor:
        """Vectors of all features.

        Args:
            ids: one of ``[B, F]`` (one id per sample and feature, columns in schema order); ``[n]`` with ``offsets
                [F * B + 1]``, bags feature after feature, or both as one :class:`recsys_embed.typing.BagIds`; a dict of
                ``(values, offsets [B + 1])`` or ``[B, L]`` per feature; or a KeyedJaggedTensor holding the schema's
                features in any order. int32 or int64; in a dict, features of hashing methods also take strings, in
                lists or numpy arrays, and integers in numpy arrays, see :func:`recsys_embed.string_ids`.
            per_sample_weights: ``[n]`` for the ``offsets`` form, where every feature pools by sum.
            mask: what vectors pass through, for ids ``[B, F]``: a layer such as
                :class:`recsys_embed.search.OptembedLayer`. Native kernels apply it in the call that reads the rows.

        Returns:
            ``[B, num_vectors, output_dim]`` where all widths agree, else ``[B, sum of widths]``.

        Raises:
            IdRangeError: names the first feature with an unseen id that neither its ``unseen`` nor its method takes.
        """
        if self._few_bits and torch.compiler.is_compiling():
            return self._apart("forward")(self, ids, offsets, per_sample_weights, mask=mask)
        stepping = self._stepping
        if not stepping:
            self._catch_up_before_reading()
        if not torch.compiler.is_compiling():
            prepare_data_parallel()
        # Not as an attribute, which torch finds last of all, ten times slower.
        bundle: LookupBundle = self._modules["bundle"]  # type: ignore[assignment]
        if isinstance(ids, Tensor) and ids.dim() == 2 and offsets is None and per_sample_weights is None:
            check_id_dtype(ids, "")
            if ids.shape[1] != len(self.schema):
                raise ConfigError(f"ids must be [B, {len(self.schema)}], a column per feature; got {tuple(ids.shape)}")
            if mask is not None and (bundle.output_dim is None or sum(bundle.vectors) != len(self.schema)):
                raise ConfigError(
                    f"`mask` is for one vector per feature, all of one width; got {bundle.widths} columns"
                )
            batched = self._batched_tables(bundle.batched, ids)
            masking = None if mask is None else mask.mask_parameters(ids)
            inside = (
                batched is not None
                and masking is not None
                and bundle.batched[batched[0]].masks
                and bundle.output_dim is not None
                and masking.fits(ids, (*ids.shape, bundle.output_dim))
            )
            step, gather = self._step_of(None if batched is None else bundle.batched[batched[0]], stepping)
            if batched is None:
                out: Tensor = bundle.single(ids.long(), gather)
            else:
                out = bundle.single_batched(
                    batched[0], ids, batched[1], step, self.sparse, gather, masking if inside else None
                )
            return out if mask is None or masking is None or inside else mask.through(masking, out, ids)
        if mask is not None:
            raise ConfigError(
                "`mask` is for one id per sample and feature, ids [B, F]; got bags, whose rows a "
                "recsys_embed.search.Supernet masks before they are pooled"
            )
        given = bundle.given(ids, self) if isinstance(ids, Mapping) else ids
        bags = to_bags(self.schema, given, offsets, per_sample_weights)
        batched = self._batched_tables(bundle.batched_bags, bags.values)
        if batched is None or not bundle.batched_bags[batched[0]].pools(bags):
            return bundle.pooled(bags, self._step_of(None, stepping)[1])
        step, gather = self._step_of(bundle.batched_bags[batched[0]], stepping)
        return bundle.pooled_batched(batched[0], bags, batched[1], step, self.sparse, gather)

    if TYPE_CHECKING:  # torch types a module's call as anything
        __call__ = forward

    def lookup(self, feature: str, ids: IdValues) -> Tensor:
        """Vectors of the ids of one feature, one per id: histories before they are pooled, candidates to be scored.

        They are those of :meth:`forward`, of the same tables: lookups of one backward are one step of a fused
        optimizer. Padding and ids that read no row give zeros.

        Args:
            feature: its name.
            ids: int32 or int64 of any shape; of hashing methods also strings, see :meth:`forward`.

        Returns:
            ``[*ids.shape, width]``; of a method that makes several vectors, one after the other.

        Raises:
            IdRangeError: an unseen id that neither the feature's ``unseen`` nor its method takes.
            UnknownNameError: no such feature.

        >>> from recsys_embed import FeatureSpec
        >>> schema = Schema([FeatureSpec("item", 10, 4), FeatureSpec("history", 10, 4, table="item", padding_idx=0)])
        >>> coll = EmbeddingCollection(schema)
        >>> history = coll.lookup("history", torch.tensor([[7, 3, 0], [5, 0, 0]]))
        >>> history.shape, bool(history[0, 2].any()), torch.equal(history[0, 0], coll.lookup("item", torch.tensor(7)))
        (torch.Size([2, 3, 4]), False, True)
        """
        if self._few_bits and torch.compiler.is_compiling():
            return self._apart("lookup")(self, feature, ids)
        stepping = self._stepping
        bundle: LookupBundle = self._modules["bundle"]  # type: ignore[assignment]
        number = bundle.position(feature)
        given = given_ids(ids, self.schema.features[number], bundle.hashes[number], self)
        if isinstance(given, Tensor) and given.is_nested:
            raise ConfigError(f"a nested tensor is no form of ids here; give ids.values() (feature {feature!r})")
        given = check_id_dtype(given, feature)
        if not stepping:
            self._catch_up_before_reading()
        if not torch.compiler.is_compiling():
            prepare_data_parallel()
        flat = given.reshape(-1)
        found = self._batched_tables(bundle.batched, flat)
        batched = None if found is None else bundle.batched_lookup_of(found[0], number)
        step, gather = self._step_of(batched, stepping)
        if found is None or batched is None:
            out = bundle.unpooled(number, flat.long(), gather)
        else:
            out = bundle.unpooled_batched(number, batched, flat, found[1], step, self.sparse)
        return out.view(*given.shape, out.shape[1])

    def _apart(self, name: str) -> Callable[..., Tensor]:
        """A method that compiled code leaves to Python, because the compiler does not know rows of few bits."""
        if torch.compiler.is_exporting():
            raise ConfigError(
                "torch.export does not trace low-precision rows; export() and load() the model, whose rows "
                "are plain tensors"
            )
        return _APART[name]

    def _step_of(self, batched: BatchedLookup | None, stepping: bool) -> tuple[NativeStep | None, Gather]:
        """What kernels, and the torch operations beside them, do in backward: one step together."""
        if not stepping:
            return None, self._gather
        # A step that several calls make is refused before any of them has written, so its gradients are collected.
        mixed = batched is not None and (batched.mixed or (self.check_finite and bool(batched.rest)))
        record = self._record(deferred=mixed)
        gather = partial(self._gather, record=record, stepping=True)
        return None if batched is None else self._native_step(record, collects=mixed), gather

    # -- bytes and checkpoints ------------------------------------------------------------------------------------

    def footprint(self) -> Footprint:
        """Bytes held: weights, index buffers, optimizer state, and with ``optimizer=None`` the tables' gradients."""
        weights = sum(p.nbytes for p in self.parameters())
        state = sum(getattr(self, f"{name}_{key}").nbytes for name, key in self._states())
        index = sum(store.nbytes for store in self.modules() if isinstance(store, IndexStore | RowCaches))
        gradient = sum(p.numel() * p.element_size() for p in unfused_parameters(self))
        served = sum((m.footprint() for m in self.modules() if isinstance(m, StoredTables)), Footprint())
        unrounded = sum(table.trained_bytes(size) - table.nbytes(size) for table, size in self._held_tables())
        return served + Footprint(weights - unrounded, index, state, gradient, unrounded)

    def _held_tables(self) -> Iterator[tuple[Table, int]]:
        """Tables that parameters hold, of rows and of heads, with the bytes of their elements."""
        if self.from_file:
            return
        of_heads = self.bundle.heads.tables()
        for key, table in self.tables.items():
            held = of_heads[key] if table.dense else getattr(self, self.places[key].storage)
            yield table, held.element_size()

    def _identity(self) -> JSON:
        features = self.schema.to_dict()["features"]
        # The order of the features fixes where their rows stand in a storage.
        order = list(self.schema.names)
        # A planner's reasons and notes are no part of what is stored.
        plan = Plan(self.plan.configs).to_dict()
        return {"schema": {f["name"]: f for f in features}, "order": order, "plan": plan}

    def get_extra_state(self) -> Tensor:
        """Schema and plan as JSON bytes, so that a state dict refuses to load elsewhere."""
        return _state.pack({**self._identity(), **numbers_to_save(self), **self._tables_of_low_precision()})

    def _tables_of_low_precision(self) -> JSON:
        """The tables in each storage of low-precision rows, in order: the distances of codes decide who shares one."""
        held: dict[str, list[str]] = {name: [] for name, _ in low_precision_tables(self)}
        for key, place in self.places.items():
            if place.storage in held:
                held[place.storage].append(key)
        return {STORED_TABLES: held} if held else {}

    def _without_tables_of_low_precision(self, where: str, identity: object) -> object:
        """A saved identity in its present form, once its low-precision rows are known to stand where they do here."""
        if not isinstance(identity, dict):
            return with_current_names(identity)
        own = self._tables_of_low_precision()
        saved = identity.pop(STORED_TABLES, own.get(STORED_TABLES))  # earlier versions did not say it
        if {STORED_TABLES: saved} != own and own:
            raise CheckpointError(
                f"low-precision rows of {where} stand in other storages here, because initial weights decide the "
                "distance of their codes; give each feature the `init` that it had, or set `quantization_step` in both "
                f"plans; saved {saved}, here {own[STORED_TABLES]}"
            )
        return with_current_names(identity)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: the comparison comes before any weight is copied."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        take_in_tables_of_modules(state_dict, prefix, self.schema, self.plan, self.places, self.tables)
        if prefix + "_extra_state" in state_dict:
            where = prefix.rstrip(".") or type(self).__name__
            saved = state_dict[prefix + "_extra_state"]
            ignore = ("init", "padding_idx", *STORED_NUMBERS)
            upgrade = partial(self._without_tables_of_low_precision, where)
            _state.check(saved, self._identity(), where, ignore, STORED_UNSEEN, upgrade)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        methods = sorted({self.plan[n].method for n in self.plan})
        return f"{len(self.schema)} features, methods {methods}, optimizer={self.optimizer}, backend={self.backend!r}"


def _say_what_torch_runs(programs: Mapping[str, LookupProgram], named: str | None) -> None:
    """Say which features batched kernels leave to torch.

    Raises:
        BackendError: the kernels were asked for by name.
    """
    faults = []
    for name, program in programs.items():
        lacking = unknown_transforms(program)
        if not lacking:
            continue
        faults.append(f"feature {name!r} maps its ids by {', '.join(lacking)}, which it does not know")
        if named is None:
            dispatch.say_once(
                f"feature {name!r} runs on torch: batched kernels do not know {', '.join(lacking)}; features that "
                "share no table with it stay batched"
            )
    if named is not None:
        way_out = "'auto' runs these on torch and the others batched, 'torch' runs all"
        raise_faults(faults, f"backend {named!r}; {way_out}", BackendError)


_APART = {name: torch._disable_dynamo(getattr(EmbeddingCollection, name)) for name in ("forward", "lookup")}
