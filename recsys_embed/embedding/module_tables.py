"""What a drop-in stores: its tables as parameters, the plain table it stands for, and its state dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from recsys_embed.core import config_state as _state
from recsys_embed.core import hashing
from recsys_embed.core.footprint import Footprint
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram
from recsys_embed.embedding.shared_tables import PlainView, SharedTables
from recsys_embed.errors import ConfigError
from recsys_embed.features import FeatureSpec, spec_to_dict
from recsys_embed.kernels.stored_tables import StoredTables
from recsys_embed.kernels.unseen_ids import with_unseen
from recsys_embed.kernels.vectorised import VectorisedLookup

# States load across unseen-id policies that store the same rows: the policy may differ at serving time.
STORED_UNSEEN = {"unseen": lambda policy: policy == "oov"}


class ModuleTables(nn.Module):
    """The tables of one lookup program as a module; lookups of them are :class:`CompressedEmbedding`'s."""

    # Set where the module has taken the place of a plain one, whose users read `weight` as one row per id.
    stands_in: bool = False

    spec: FeatureSpec
    config: MethodConfig
    program: LookupProgram
    num_embeddings: int
    kernel: VectorisedLookup
    shared: SharedTables | None
    served: StoredTables | None
    _given: frozenset[str]

    def _vectors(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        raise NotImplementedError

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
