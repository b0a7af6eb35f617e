"""The search space of a study: a budget, and for each group of fields a method, a width and a share of the bytes.

Fields are grouped by their number of ids, on which the choice of method depends most. Each method sizes itself into
its bytes (:meth:`MethodConfig.plan`), so nearly every point of the space is within its budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from recsys_embed.core.footprint import format_bytes, parse_bytes
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.errors import BudgetError, ConfigError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan
from recsys_embed.registry import get_method, list_methods

LEAST_SHARE = 0.1
"""Smallest value of a group's share parameter, relative to a group with share 1."""


def takes_width(method: str) -> bool:
    """Whether a method has an option for the width of its rows.

    >>> takes_width("optembed"), takes_width("hash"), takes_width("lowdim")
    (True, False, False)
    """
    return get_method(method).config_cls.width_option is not None


def _width(cls: type[MethodConfig], width: int) -> dict[str, Any]:
    """The option that sets the width of a method's rows, where it has one."""
    return {} if cls.width_option is None else {cls.width_option: width}


def study_methods(*, raw: bool = False) -> tuple[str, ...]:
    """Methods that a budget, or a budget and a width, size; ``full`` is what they fall back to where it fits.

    Args:
        raw: whether features have raw 64-bit ids, which some methods alone take.

    >>> {"hash", "optembed"} <= set(study_methods()), "full" in study_methods()
    (True, False)
    """
    names = [m for m in list_methods() if m.name != "full" and (m.config_cls.accepts_raw or not raw)]
    return tuple(m.name for m in names if m.config_cls.plannable or takes_width(m.name))


@dataclass(frozen=True)
class StudySpace:
    """A space of plans.

    Args:
        schema: the features.
        budgets: bytes that the plan of the vectors may take, by the text that names each.
        methods: keys to choose from.
        groups: of fields, at most, by number of ids.
        widths: of rows, for methods that take one.

    Raises:
        ConfigError: an argument is out of range; all faults at once.
        BudgetError: no method can store all fields within a budget.

    >>> schema = Schema([FeatureSpec("C1", 300, 8), FeatureSpec("C2", 50_000, 8)])
    >>> space = StudySpace(schema, {"64KiB": 65536}, ("hash", "freqcut"), groups=2)
    >>> space.names
    ('budget', 'small.method', 'small.width', 'small.share', 'large.method', 'large.width', 'large.share')
    """

    schema: Schema
    budgets: Mapping[str, int]
    methods: tuple[str, ...] = field(default_factory=study_methods)
    groups: int = 3
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        most = max(s.embedding_dim for s in self.schema)
        widths = self.widths or tuple(sorted({max(1, most // 4), max(1, most // 2), most}))
        object.__setattr__(self, "widths", widths)
        faults = []
        if not self.budgets:
            faults.append("`budgets` must name at least one; got none")
        known = [m.name for m in list_methods()]
        faults += [str(unknown_name("method of a study", m, known)) for m in self.methods if m not in known]
        raw = [s.name for s in self.schema if s.ids == "raw"]
        faults += [
            f"method {m!r} needs vocabulary indices, and {', '.join(raw[:3])} have raw 64-bit ids; choose among "
            f"{', '.join(study_methods(raw=True))}"
            for m in self.methods
            if raw and m in known and not get_method(m).config_cls.accepts_raw
        ]
        if not self.methods or len(set(self.methods)) < len(self.methods):
            faults.append(f"`methods` must be keys without repetition; got {self.methods!r}")
        if not 1 <= self.groups <= len(_NAMES):
            faults.append(f"`groups` must be from 1 to {len(_NAMES)}; got {self.groups!r}")
        if not all(1 <= w <= most for w in self.widths):
            faults.append(f"`widths` must be in [1, {most}]; got {self.widths!r}")
        raise_faults(faults, "StudySpace")
        for text, budget in self.budgets.items():
            self._need_room(text, budget)

    def _need_room(self, text: str, budget: int) -> None:
        reasons = []
        for method in self.methods:
            try:
                self._sized(method, min(self.widths), list(self.schema.first_readers), budget)
            except BudgetError as e:
                reasons.append(f"{method}: {str(e).partition(' Ways out')[0]}")
            else:
                return
        raise BudgetError(
            f"the budget {text} is below the smallest subnet: it leaves {format_bytes(budget)} for the vectors, and no "
            f"method of the study stores all fields in that ({'; '.join(reasons)}). Ways out: 1. a larger budget; "
            "2. more methods; 3. a smaller embedding_dim"
        )

    @cached_property
    def fields(self) -> dict[str, list[FeatureSpec]]:
        """Groups of fields of similar numbers of ids, smallest first; groups that would be empty are left out.

        Of fields that read one table the first stands for all.
        """
        schema = self.schema.first_readers
        logs = [math.log(s.num_ids) for s in schema]
        low, high = min(logs), max(logs)
        bins: list[list[FeatureSpec]] = [[] for _ in range(self.groups)]
        for spec, value in zip(schema, logs, strict=True):
            at = int((value - low) / (high - low) * self.groups) if high > low else 0
            bins[min(at, self.groups - 1)].append(spec)
        found = [b for b in bins if b]
        return dict(zip(_NAMES[len(found)], found, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters."""
        return ("budget", *(f"{g}.{part}" for g in self.fields for part in ("method", "width", "share")))

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON; equal spaces have equal dictionaries."""
        return {
            "budgets": dict(self.budgets),
            "methods": list(self.methods),
            "widths": list(self.widths),
            "fields": {name: [s.name for s in specs] for name, specs in self.fields.items()},
        }

    def plan(self, params: Mapping[str, Any]) -> Plan:
        """The plan of a point.

        Raises:
            BudgetError: a method cannot store its fields in the bytes they get, or all together take too much.
        """
        budget = self.budgets[params["budget"]]
        least = {g: self._least(g, params[f"{g}.method"], int(params[f"{g}.width"])) for g in self.fields}
        room = self._bytes(budget, {g: float(params[f"{g}.share"]) for g in self.fields}, least)
        # Groups of one method are sized together, as a method with a table of its own for all fields must be.
        merged: dict[tuple[str, int], tuple[list[FeatureSpec], int]] = {}
        for group, specs in self.fields.items():
            method = params[f"{group}.method"]
            key = (method, int(params[f"{group}.width"]) if takes_width(method) else 0)
            known, size = merged.get(key, ([], 0))
            merged[key] = (known + specs, size + room[group])
        configs = {}
        for (method, width), (specs, size) in merged.items():
            configs.update(self._sized(method, width, specs, size))
        plan = Plan({s.name: configs[s.name] for s in self.schema.first_readers}).for_readers(self.schema)
        need = plan.footprint(self.schema).serve
        if need > budget:
            raise BudgetError(f"the plan needs {format_bytes(need)}; {format_bytes(budget)} are available")
        return plan

    @staticmethod
    def _sized(method: str, width: int, specs: list[FeatureSpec], size: int) -> dict[str, Any]:
        plain = get_method("full").config_cls.from_params({})
        cls = get_method(method).config_cls
        return cls.plan(tuple(specs), size, plain, **_width(cls, width))

    def _least(self, group: str, method: str, width: int) -> int:
        """Bytes below which a method cannot store a group; full tables where they are smaller."""
        cls = get_method(method).config_cls
        return sum(
            min(cls.sized(s, 1, **_width(cls, width)).footprint(s).serve, 4 * s.num_embeddings * s.embedding_dim)
            for s in self.fields[group]
        )

    def _bytes(self, budget: int, shares: Mapping[str, float], least: Mapping[str, int]) -> dict[str, int]:
        """Bytes of each group, by its share; no less than its method needs and no more than its full tables."""
        whole = {g: sum(4 * s.num_embeddings * s.embedding_dim for s in specs) for g, specs in self.fields.items()}
        found: dict[str, int] = {}
        while len(found) < len(whole):
            left = max(0, budget - sum(found.values()))
            weight = sum(whole[g] * shares[g] for g in whole if g not in found)
            part = {g: int(left * whole[g] * shares[g] / weight) for g in whole if g not in found}
            under = {g: least[g] for g in part if part[g] < least[g]}
            over = {g: whole[g] for g in part if part[g] > whole[g]}
            found |= under or over or part
        return found

    def point_of(self, plan: Plan, budget: str) -> dict[str, Any]:
        """The point nearest a plan: per group the method that holds most of it, and its part of the bytes.

        Raises:
            ConfigError: the plan does not cover the schema.
        """
        plan.check(self.schema)
        params: dict[str, Any] = {"budget": budget}
        rate = {}
        for group, specs in self.fields.items():
            weight: dict[str, int] = {}
            for s in specs:
                weight[plan[s.name].method] = weight.get(plan[s.name].method, 0) + s.num_ids
            known = {m: w for m, w in weight.items() if m in self.methods} or {self.methods[0]: 1}
            params[f"{group}.method"] = max(known, key=lambda m: known[m])
            params[f"{group}.width"] = max(self.widths)
            taken = sum(plan[s.name].footprint(s).serve for s in specs)
            rate[group] = taken / sum(4 * s.num_embeddings * s.embedding_dim for s in specs)
        most = max(rate.values())
        return params | {f"{g}.share": min(1.0, max(LEAST_SHARE, r / most)) for g, r in rate.items()}

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Whether a point of another study is one of this space."""
        if set(params) != set(self.names) or params["budget"] not in self.budgets:
            return False
        return all(
            params[f"{g}.method"] in self.methods
            and params[f"{g}.width"] in self.widths
            and LEAST_SHARE <= params[f"{g}.share"] <= 1
            for g in self.fields
        )


_NAMES: dict[int, tuple[str, ...]] = {
    1: ("all",),
    2: ("small", "large"),
    3: ("small", "middle", "large"),
    4: ("tiny", "small", "large", "huge"),
    5: ("tiny", "small", "middle", "large", "huge"),
}


def read_budget(text: str, full_bytes: int) -> int:
    """Bytes of ``"5%"`` of the full tables, or of ``"4MiB"``.

    Raises:
        ConfigError: neither.

    >>> read_budget("5%", 1000), read_budget("2KiB", 1000)
    (50, 2048)
    """
    if not text.endswith("%"):
        return parse_bytes(text)
    try:
        share = float(text[:-1])
    except ValueError:
        share = 0.0
    if not 0 < share <= 100:
        raise ConfigError(f"a budget is a share such as 5% or bytes such as 4MiB; got {text!r}")
    return int(full_bytes * share / 100)
