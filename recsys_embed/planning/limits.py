"""Limits of a plan besides its budget: pinned and forbidden methods, widths, rows and bytes read per id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import ConfigError, unknown_name
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.planning.candidates import method_faults
from recsys_embed.planning.loss_estimate import ColumnSpan
from recsys_embed.registry import config_from_dict
from recsys_embed.utils.settings import param, refuse_unknown, wrong_settings
from recsys_embed.utils.types import JSONMapping

EVERY = "*"
"""Stands for all features in `pin` and `forbid`."""

Pin = str | MethodConfig


@dataclass(frozen=True)
class Limits:
    """Limits on the options of a plan, besides its budget.

    Args:
        pin: per feature the method it must have, or its whole configuration; ``"*"`` for all other features.
        forbid: per feature the methods it must not have; ``"*"`` for all.
        full_below: features with fewer ids keep a full table, unless bytes are so scarce that this would cost other
            features more than a twentieth of one feature's whole signal.
        min_width: every id stores at least this many numbers of its own vector, before any projection.
        width_multiple: divides the width of stored rows; learned scalars aside.
        needs_equal_widths: the model multiplies vectors of different features, so all must come out with one width.
        max_rows_per_id: rows gathered per id, learned scalars included; the latency of a lookup depends on it.
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
        """All faults of the limits, as sentences."""
        found = list(wrong_settings(self).values())
        for key, entries in (("pin", self.pin), ("forbid", self.forbid)):
            for feature in entries:
                if feature != EVERY and feature not in schema.names:
                    found.append(str(unknown_name(f"feature in `{key}`", str(feature), (*schema.names, EVERY))))
        for value in self.pin.values():
            if not isinstance(value, MethodConfig):
                found += method_faults("pin", [value])
        for methods in self.forbid.values():
            found += method_faults("forbid", methods)
        if self.needs_equal_widths and schema.uniform_dim is None:
            dims = sorted({s.embedding_dim for s in schema})
            found.append(f"`needs_equal_widths` needs features of one width; got widths {', '.join(map(str, dims))}")
        return found

    def pinned(self, feature: str) -> Pin | None:
        return self.pin.get(feature, self.pin.get(EVERY))

    def forbidden(self, feature: str) -> set[str]:
        return {*self.forbid.get(feature, ()), *self.forbid.get(EVERY, ())}

    def refusal(
        self, program: LookupProgram, spans: Sequence[ColumnSpan], spec: FeatureSpec, itemsize: int
    ) -> str | None:
        """Why a program breaks the limits, or None."""
        if self.needs_equal_widths and (program.width != spec.embedding_dim or program.vectors != 1):
            return f"its output is {program.width} wide, not {spec.embedding_dim}"
        tables = {t.name: t for t in program.tables}
        widths = [p.num_rows * tables[p.table].width for p in program.row_lookups]
        rows = [w for w, p in zip(widths, program.row_lookups, strict=True) if p.width is None]
        odd = [w for w in rows if w % self.width_multiple]
        if odd:
            return f"its rows are {odd[0]} wide, no multiple of {self.width_multiple}"
        if self.min_width > 1:
            stored = sum((f.width * (f.private + f.shared > 0) for f in spans if f.width > 1), np.zeros(1))
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


def named_limits(options: JSONMapping) -> Limits:
    """Limits from keyword arguments, which may be abbreviated: a string for a tuple, a mapping for a configuration,
    and methods without ``"*"`` for those forbidden for all features.

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
