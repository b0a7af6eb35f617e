"""What a drop-in stores: its tables as parameters, the plain table it stands for, and its state dict."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from recsys_embed.core import config_state as _state
from recsys_embed.core import hashing
from recsys_embed.core.footprint import Footprint
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram
from recsys_embed.embedding.plain_table import PlainTable, PlainView
from recsys_embed.embedding.shared_tables import SharedTables
from recsys_embed.embedding.stored_parameters import StoredParameters
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec, spec_to_dict
from recsys_embed.kernels.hidden_buffers import HiddenBuffers
from recsys_embed.kernels.low_precision_states import (
    STORED_NUMBERS,
    apply_apart,
    load_stored,
    low_precision_tables,
    numbers_to_save,
    save_stored,
)
from recsys_embed.kernels.recording import refuse_scripting
from recsys_embed.kernels.row_cache import RowCaches
from recsys_embed.kernels.stored_tables import StoredTables
from recsys_embed.kernels.unseen_ids import with_unseen
from recsys_embed.kernels.vectorised import VectorisedLookup
from recsys_embed.utils.types import JSON

# States load across unseen-id policies that store the same rows: the policy may differ at serving time.
STORED_UNSEEN = {"unseen": lambda policy: policy == "oov"}


_COMPUTED = (
    "`weight` of a compressed embedding is computed from smaller tables, so {what} would change nothing; use the "
    "module's parameters(), set its tables with fit_(weight), or turn it back into a plain table first: "
    "recsys_embed.materialize_(model)"
)
# What the parameter of a table `weight` is called where `weight` is the plain table that the module stands for.
STORED_WEIGHT = "stored_weight"


def _check_identity(
    own: dict[str, Any], where: str, name: str, saved: Any, upgrade: Callable[[Any], Any] | None = None
) -> None:
    """Raise where a saved extra state is of another configuration."""
    # The initial distribution and the pooling do not change what stored rows mean.
    _state.check(saved, own, where, ("init", "pooling", *STORED_NUMBERS), STORED_UNSEEN, upgrade)


def _row_format(identity: JSON) -> JSON:
    """What an identity says of how rows are stored."""
    config = identity.get("config", {})
    return {k: config.get(k) for k in ("method", "precision", "quantization")}


def _refuse_parameter(stored: StoredParameters) -> None:
    stored.refuse()


class _Weight:
    """The stored table called ``weight``, where the method has one.

    In a model whose plain tables have been compressed it is the plain table that the module stands for,
    ``[num_embeddings, embedding_dim]``: computed as far as it is read, with gradients, and read-only. The stored table
    is then the parameter ``stored_weight``.
    """

    # Without `__set__`, so that what torch sets on a module (a pruned table, a replica's copy) comes first.
    def __get__(self, module: ModuleTables | None, owner: type) -> Tensor:
        return cast("Tensor", self) if module is None else module._weight()


class ModuleTables(nn.Module):
    """The tables of one lookup program as a module; lookups of them are :class:`CompressedEmbedding`'s."""

    weight = _Weight()
    __prepare_scriptable__ = refuse_scripting

    # Set where the module has taken the place of a plain one, whose users read `weight` as one row per id.
    stands_in: bool = False
    # Whether an exported file filled it: rows are then as they are served, whatever the configuration says.
    from_file: bool = False
    _renamed: bool = False
    # Whether the initial weights are a function of the configuration's seed; else torch's generator draws one.
    _seeded: bool = True

    spec: FeatureSpec
    config: MethodConfig
    program: LookupProgram
    num_embeddings: int
    mode: str | None
    include_last_offset: bool
    kernel: VectorisedLookup
    shared: SharedTables | None
    served: StoredTables | None
    caches: RowCaches | None
    _given: frozenset[str]

    @abstractmethod
    def _vectors(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        """Vectors of resolved int64 ``ids [n]``, padding included; see :class:`CompressedEmbedding`."""

    def _like(self) -> Tensor:
        """A tensor of the type and on the device of the vectors."""
        if self.served is not None:
            return self.served.like
        name = self.program.tables[0].name
        computed = self._modules.get("parametrizations")
        if isinstance(computed, nn.ModuleDict) and self.parameter_name(name) in computed:
            # To compute the table may change it, as a spectral norm's estimate does.
            return next(computed[self.parameter_name(name)].parameters())
        return self.table(name)

    def _device(self) -> torch.device:
        return self._like().device

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw the initial weights, as ``nn.Embedding`` does, by torch's global generator.

        Where a seed is given, here or when the module was built (``seed=`` or ``config=``), they are a function of the
        seed and of table names alone, and a collection of the same seed draws the same.

        >>> from recsys_embed.methods.hash import HashEmbedding
        >>> a, b = (HashEmbedding(10, 4, num_buckets=3) for _ in range(2))
        >>> torch.equal(a.weight, b.weight)
        False
        >>> for module in (a, b):
        ...     _ = torch.manual_seed(0)
        ...     module.reset_parameters()
        >>> torch.equal(a.weight, b.weight)
        True
        """
        if self.served is not None:
            raise ConfigError(f"{type(self).__name__} {self.spec.name!r} serves exported tables, which do not change")
        if seed is None:
            seed = self.config.seed if self._seeded else self._drawn_seed()
        with torch.no_grad():
            for table in self.program.tables:
                if table.name in self._given:
                    continue  # shared: the module that was built first has initialised it
                key = table.name if table.shared else f"{self.spec.name}.{table.name}"
                table.init.fill_(self.table(table.name), hashing.salt(seed, "init", key))

    def _drawn_seed(self) -> int:
        """A seed by torch's global generator, whatever the device."""
        if self._device().type != "meta":
            draw = torch.randint(1 << 62, (), device="cpu")
            if type(draw) is Tensor:  # not a fake one, which has no value
                return int(draw)
        return self.config.seed

    def assign_(self, counts: Tensor | Mapping[str, Tensor]) -> Self:
        """Say which ids are frequent, for methods that treat them apart and whose ids are not numbered by frequency.

        Fills the index buffers; it changes which row an id reads, so call it before training.

        Args:
            counts: ``[num_embeddings]`` how often each id occurs; ties go to the smaller id. Or, by name of an index
                of the program, the ids that it holds, as :meth:`Plan.members` has them.
        """
        self.kernel.index.assign_(0, counts if isinstance(counts, Mapping) else with_unseen(self.spec, counts))
        return self

    def table(self, name: str) -> Tensor:
        """The stored values of one of the program's tables: ``[rows, width]``, or of its ``shape``.

        After an export they are decoded, a copy.
        """
        if self.served is not None and name in self.served:
            return self.served[name].dense()
        values = self._parameters.get(name)
        if values is None:
            name = self.parameter_name(name)
            values = self._parameters.get(name)
        return self._put_in_place(name) if values is None else values

    def _put_in_place(self, name: str) -> Tensor:
        """What torch has put where a parameter was: replicas' copies, views of a flat parameter, what hooks compute."""
        held = vars(self).get(name)
        if held is None and name in self._modules.get("parametrizations", ()):  # type: ignore[operator]
            held = getattr(self, name)
        if not isinstance(held, Tensor):
            raise ConfigError(f"table {name!r} of {type(self).__name__} {self.spec.name!r} has been removed")
        return held

    def parameter_name(self, table: str) -> str:
        """The name of the parameter that stores a table of the program: that of the table, or ``stored_weight``."""
        return STORED_WEIGHT if table == "weight" and self._renamed else table

    def stand_in(self) -> Self:
        """Take the place of a plain module, whose users read ``weight`` as one row per id.

        A stored table called ``weight`` becomes the parameter ``stored_weight``, since a module has one ``weight``.
        """
        self.stands_in = True
        # A full table with the same rows is its own plain table.
        plain = self.config.method == "full" and self.spec.num_ids == self.num_embeddings
        self._renamed = not plain and any(t.name == "weight" for t in self.program.tables)
        if not plain:
            self._refuse_weight_as_parameter()
        return self

    def _refuse_weight_as_parameter(self) -> None:
        """Let utilities that put a computed tensor in a parameter's place hear that ``weight`` is none."""
        stored = StoredParameters({self._now(name): p for name, p in self._parameters.items()})
        shown = self._buffers
        if not isinstance(shown, HiddenBuffers):
            shown = HiddenBuffers({})
            shown.update(self._buffers)
        shown.hidden["weight"], shown.refuse = None, partial(_refuse_parameter, stored)
        self.__dict__.update(_parameters=stored, _buffers=shown)

    @staticmethod
    def _now(name: str) -> str:
        return STORED_WEIGHT if name == "weight" else name

    def _weight(self) -> Tensor:
        """What ``weight`` reads as; see :class:`_Weight`."""
        stored = self.__dict__.get("_parameters", {}).get("weight")
        if stored is not None:
            return cast("Tensor", stored)
        if self.stands_in:
            ids, learns = self.num_embeddings, any(p.requires_grad for p in self.parameters())
            if torch.compiler.is_compiling():
                return self._vectors(torch.arange(ids, device=self._device()))
            like = self._like()
            # Rows that an exported file stores in fewer bytes are not kept in full.
            sources = (lambda: (*self.parameters(), *self.buffers())) if self.served is None else None
            table = PlainTable(self._vectors, (ids, self.program.width), like.dtype, like.device, learns, sources)
            if "_is_hf_initialized" in vars(self):
                # transformers, loading a model, leaves out what it has been told is initialised.
                table._is_hf_initialized = True  # type: ignore[attr-defined]
            return table
        served = self.__dict__.get("_modules", {}).get("served")
        if served is None or "weight" not in served:
            raise AttributeError(f"{type(self).__name__} has no attribute 'weight'")
        return self.table("weight")

    def footprint(self) -> Footprint:
        """Bytes this module serves and trains with (without optimizer state)."""
        cached = Footprint(index=0 if self.caches is None else self.caches.nbytes)
        if self.from_file:
            rows = Footprint() if self.served is None else self.served.footprint()
            own = sum(p.nbytes for p in self.parameters())
            return rows + Footprint(own, self.kernel.index.nbytes) + cached
        return self.config.footprint(self.spec, next(self.parameters()).element_size()) + cached

    # -- tables shared with other modules -------------------------------------------------------------------------

    def _reunite(self, before: dict[str, nn.Parameter | None]) -> None:
        """Read the tables that another reader's exchange of parameters has led to."""
        for name, old in before.items():
            new = self._parameters.get(name)
            if self.shared is not None and old is not None and new is not None and new is not old:
                self._parameters[name] = self.shared.follow(old, new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._parameters)
        with apply_apart(self, fn):
            super()._apply(fn, recurse)
        self._reunite(before)
        return self

    # -- what torch sets on a module ----------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.stands_in and "weight" not in self._parameters:
            raise ConfigError(_COMPUTED.format(what="setting it"))
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if isinstance(param, PlainView):  # pruning and older norms register what they take over under a new name
            raise ConfigError(_COMPUTED.format(what=f"registering it as {name!r}"))
        super().register_parameter(name, param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.stands_in:
            self.stand_in()  # written when the parameter was called `weight`

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _show_extra_state(self) -> None:
        """Let tools that set what a state dict names (Accelerate) find the extra state, and compare it."""
        identity, where = self._identity(), f"{type(self).__name__} {self.spec.name!r}"
        shown = HiddenBuffers({"_extra_state": self.get_extra_state()}, partial(_check_identity, identity, where))
        shown.update(self._buffers)
        self.__dict__["_buffers"] = shown

    def _identity(self) -> dict[str, Any]:
        return {"spec": spec_to_dict(self.spec), "config": self.config.to_dict()}

    def _upgraded(self, identity: Any) -> Any:
        """A saved identity with the present names of the method's options."""
        config = identity.get("config") if isinstance(identity, dict) else None
        if not isinstance(config, dict) or config.get("method") != self.config.method:
            return identity
        return {**identity, "config": self.config.current_options(config, warn=False)}

    def get_extra_state(self) -> Tensor:
        """Feature and configuration as JSON bytes, so that a state dict refuses to load elsewhere.

        How tables were initialised does not matter by then, and is left out: states of equal tables have one length.
        """
        return self._packed_identity()

    def _packed_identity(self) -> Tensor:
        identity = self._identity()
        del identity["spec"]["init"]
        return _state.pack({**identity, **numbers_to_save(self)})

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: the comparison comes before any weight is copied."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_stored(self, destination, prefix)
        if not self._has_extra_state and any(low_precision_tables(self)):
            destination[prefix + "_extra_state"] = self._packed_identity()

    @property
    def _has_extra_state(self) -> bool:
        """Whether state dicts hold the configuration whatever the rows are stored as."""
        return type(self).get_extra_state is not nn.Module.get_extra_state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        marker = state_dict.get(prefix + "weight")
        if isinstance(marker, Tensor) and marker.shape == (0,):
            # Written for loaders of plain models, whom the shape stops.
            del state_dict[prefix + "weight"]
        # States from before a module stood in, or from versions that called the parameter `weight` all the same.
        own, other = ("weight", STORED_WEIGHT)[:: -1 if self._renamed else 1]
        if own in self._parameters and prefix + own not in state_dict and prefix + other in state_dict:
            state_dict[prefix + own] = state_dict.pop(prefix + other)
        if prefix + "_extra_state" in state_dict:
            where = prefix.rstrip(".") or type(self).__name__
            packed, identity = state_dict[prefix + "_extra_state"], self._identity()
            if self._has_extra_state:
                _check_identity(identity, where, "_extra_state", packed, self._upgraded)
            else:  # it was saved for low-precision rows, and nothing else matters to a plain table
                _check_identity(_row_format(identity), where, "_extra_state", packed, _row_format)
        load_stored(self, state_dict, prefix, args[0])
        if not self._has_extra_state:
            state_dict.pop(prefix + "_extra_state", None)
        errors, before, held = args[-1], len(args[-1]), dict(self._parameters)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._reunite(held)
        if len(errors) > before and prefix + "_extra_state" not in state_dict:
            name = type(self).__name__
            errors.append(
                f"the state at {prefix.rstrip('.') or 'the top'!r} names no configuration, so it is not of a {name}; "
                f"take over a plain trained table with {name}.from_dense(weight, budget=...)"
            )
