"""What a user rules out, and what bytes cost: the frame in which options are looked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram, Table
from recsys_embed.errors import ConfigError, UnknownNameError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import FusedOptimizer
from recsys_embed.plan import Plan
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.planning.price import Factor
from recsys_embed.registry import MethodInfo, config_from_dict, get_method, list_methods
from recsys_embed.typing import JSONMapping, Methods
from recsys_embed.utils.settings import param, refuse_unknown, wrong_settings

EVERY = "*"
"""In `pin` and `forbid`: all features."""

Pin = str | MethodConfig


@dataclass(frozen=True)
class Limits:
    """What options must keep to, besides the budget.

    Args:
        pin: per feature the method it must have, or its whole configuration; ``"*"`` for all other features.
        forbid: per feature the methods it must not have; ``"*"`` for all.
        full_below: features with fewer ids keep a plain table, unless bytes are so scarce that others would lose more
            for it than a twentieth of all that a feature can tell.
        min_width: every id stores at least this many numbers of its own vector, before any projection.
        width_multiple: divides the width of stored rows; learned scalars aside.
        needs_equal_widths: the model multiplies vectors of different features, so all must come out with one width.
        max_rows_per_id: rows gathered per id, learned scalars included: what a lookup waits for.
        max_bytes_per_id: bytes these rows hold.
    """

    pin: Mapping[str, Pin] = field(default_factory=dict)
    forbid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    full_below: int = param(200, low=0)
    min_width: int = param(1, low=1)
    width_multiple: int = param(1, low=1)
    needs_equal_widths: bool = False
    max_rows_per_id: int | None = param(None, low=1)
    max_bytes_per_id: int | None = param(None, low=1)

    def faults(self, schema: Schema) -> list[str]:
        """Everything wrong with the limits, in words."""
        found = list(wrong_settings(self).values())
        for key, entries in (("pin", self.pin), ("forbid", self.forbid)):
            for feature in entries:
                if feature != EVERY and feature not in schema.names:
                    found.append(str(unknown_name(f"feature in `{key}`", str(feature), (*schema.names, EVERY))))
        for value in self.pin.values():
            if not isinstance(value, MethodConfig):
                found += _method_faults("pin", [value])
        for methods in self.forbid.values():
            found += _method_faults("forbid", methods)
        if self.needs_equal_widths and schema.uniform_dim is None:
            dims = sorted({s.embedding_dim for s in schema})
            found.append(f"`needs_equal_widths` needs features of one width; got widths {', '.join(map(str, dims))}")
        return found

    def pinned(self, feature: str) -> Pin | None:
        return self.pin.get(feature, self.pin.get(EVERY))

    def forbidden(self, feature: str) -> set[str]:
        return {*self.forbid.get(feature, ()), *self.forbid.get(EVERY, ())}

    def refusal(self, program: LookupProgram, parts: Sequence[Factor], spec: FeatureSpec, itemsize: int) -> str | None:
        """Why a program breaks the limits, or None."""
        if self.needs_equal_widths and (program.width != spec.embedding_dim or program.vectors != 1):
            return f"its output is {program.width} wide, not {spec.embedding_dim}"
        tables = {t.name: t for t in program.tables}
        widths = [p.run * tables[p.table].width for p in program.row_lookups]
        rows = [w for w, p in zip(widths, program.row_lookups, strict=True) if p.width is None]
        odd = [w for w in rows if w % self.width_multiple]
        if odd:
            return f"its rows are {odd[0]} wide, no multiple of {self.width_multiple}"
        if self.min_width > 1:
            stored = sum((f.width * (f.private + f.shared > 0) for f in parts if f.width > 1), np.zeros(1))
            narrow = int(np.min(stored)) if np.any(stored) else 1
            if narrow < self.min_width:
                return f"it stores {narrow} numbers of an id's vector, fewer than {self.min_width}"
        weights = sum(p.weight is not None for p in program.row_lookups)
        reads, size = len(widths) + weights, itemsize * (sum(widths) + weights)
        if self.max_rows_per_id is not None and reads > self.max_rows_per_id:
            return f"it reads {reads} rows per id, more than {self.max_rows_per_id}"
        if self.max_bytes_per_id is not None and size > self.max_bytes_per_id:
            return f"it reads {size} bytes per id, more than {self.max_bytes_per_id}"
        return None


def _method_faults(where: str, names: Iterable[Any]) -> list[str]:
    known = [m.name for m in list_methods()]
    return [str(unknown_name(f"method in `{where}`", str(n), known)) for n in names if n not in known]


def named_limits(options: JSONMapping) -> Limits:
    """Limits from keyword arguments as people write them: texts instead of tuples, mappings instead of configurations,
    methods forbidden for all features without ``"*"``.

    >>> named_limits({"forbid": {"*": "hash"}}).forbid
    {'*': ('hash',)}
    >>> named_limits({"forbid": ["hash", "robe"]}).forbid
    {'*': ('hash', 'robe')}
    """
    refuse_unknown(Limits, options, "option of plan_for_budget", where="plan_for_budget")
    given = {k: v for k, v in options.items() if v is not None or k.startswith("max_")}
    if isinstance(given.get("forbid"), str | list | tuple | set | frozenset):
        given["forbid"] = {EVERY: given["forbid"]}
    for key in ("pin", "forbid"):
        if not isinstance(given.get(key, {}), Mapping):
            raise ConfigError(
                f"`{key}` must be a mapping of features to methods, {EVERY!r} for all; got {given[key]!r:.80}"
            )
    pin = {k: config_from_dict(v) if isinstance(v, Mapping) else v for k, v in given.get("pin", {}).items()}
    forbid = {
        k: tuple(v) if isinstance(v, Iterable) and not isinstance(v, str) else (v,)
        for k, v in given.get("forbid", {}).items()
    }
    return Limits(**{**given, "pin": pin, "forbid": forbid})


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method to be sized.

    Args:
        info: the method.
        params: its options; None leaves them to the method.
    """

    info: MethodInfo
    params: JSONMapping | None = None

    @property
    def name(self) -> str:
        return self.info.name

    def variants(self, spec: FeatureSpec, curve: FrequencyCurve) -> list[Candidate]:
        """The method with each set of options worth trying, see :meth:`MethodConfig.planning_variants`."""
        if self.params is not None:
            return [self]
        return [Candidate(self.info, dict(params)) for params in self.info.config_cls.planning_variants(spec, curve)]


def candidates(methods: Methods | None) -> list[Candidate]:
    """The methods to consider, in the order of registration.

    Args:
        methods: None for all that are registered, less those of which a search says what they keep; names; or names
            with options, ``{"multihash": {"num_hashes": 3}}``.

    Raises:
        UnknownNameError: no such method.
        ConfigError: nothing to choose from.
    """
    known = [m.name for m in list_methods()]
    if methods is None:
        methods = [m.name for m in list_methods() if m.config_cls.plannable]
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(methods, Collection):
        raise ConfigError(f"`methods` must be names, or names with options; got {methods!r:.80}")
    if not methods:
        raise ConfigError("`methods` must name at least one method; got none")
    raise_faults(_method_faults("methods", methods), "plan_for_budget", UnknownNameError)
    found = []
    for name in known:
        if name not in methods:
            continue
        given = methods[name] if isinstance(methods, Mapping) else None
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(f"options of a method in `methods` must be a mapping; got {given!r:.80} ({name!r})")
        info = get_method(name)
        found.append(Candidate(info, info.config_cls.current_options(given) if given else None))
    return found


@dataclass(frozen=True)
class Costs:
    """What things cost in bytes of the budget, by the arithmetic of :meth:`recsys_embed.Plan.footprint`.

    Args:
        optimizer: fused optimizer of the tables; None where an ordinary one steps dense gradients.
        train: count the optimizer's state, and gradients as large as the weights of what it does not hold: projections,
            networks, or everything.
        itemsize: bytes per number.
    """

    optimizer: FusedOptimizer | None
    train: bool
    itemsize: int = 4

    def table(self, table: Table) -> int:
        """Bytes of one physical table."""
        weights = self.itemsize * table.rows * table.width
        if not self.train:
            return weights
        if self.optimizer is None or table.dense:
            return 2 * weights
        return weights + self.optimizer.state_bytes(table.rows, table.width)

    def own(self, config: MethodConfig, program: LookupProgram, spec: FeatureSpec) -> int:
        """Bytes of a feature's tables and index buffers, without tables that it shares."""
        if config.computes:
            parts = config.footprint(spec, self.itemsize)
            return parts.serve + (parts.weights if self.train else 0)
        index = sum(i.nbytes for i in program.indexes)
        return index + sum(self.table(t) for t in program.tables if not t.shared)

    def plan(self, plan: Plan, schema: Schema) -> int:
        """Bytes of all features together, shared tables once."""
        parts = plan.footprint(schema, self.optimizer if self.train else None, self.itemsize)
        if not self.train:
            return parts.serve
        if self.optimizer is None:
            return parts.train + parts.weights
        gathered = plan.gathered(schema)
        computed = sum(plan[s.name].footprint(s, self.itemsize).weights for s in schema if s.name not in gathered)
        dense = sum(self.itemsize * t.rows * t.width for t in plan.tables(schema).values() if t.dense)
        return parts.train + computed + dense
