"""A method's configuration: frozen data that turns a feature into a lookup program and is sized by a byte budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from recsys_embed.core.footprint import Footprint, format_bytes, parse_bytes
from recsys_embed.core.program import LookupProgram
from recsys_embed.errors import BudgetError, raise_faults
from recsys_embed.features import FeatureSpec
from recsys_embed.utils.settings import build, check_settings, param

__all__ = ["MethodConfig", "param"]


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """Base of every method's configuration.

    Subclasses declare their fields with :func:`param`, describe the lookup in :meth:`_program`, and say how they
    grow with :meth:`sized`. ``seed`` salts hashes and initial weights.
    """

    method: ClassVar[str]
    accepts_raw: ClassVar[bool] = False

    seed: int = param(0, "salts hashes and initial weights")

    def __post_init__(self) -> None:
        check_settings(self, type(self).__name__)

    def check(self, spec: FeatureSpec) -> list[str]:
        """Faults of this configuration for ``spec``, in words; subclasses add theirs."""
        if spec.ids == "raw" and not self.accepts_raw:
            return [
                f"method {self.method!r} needs vocabulary indices; the feature has raw 64-bit ids: use a hashing method"
            ]
        return []

    @abstractmethod
    def _program(self, spec: FeatureSpec) -> LookupProgram:
        """The lookup for a checked ``spec``."""

    def program(self, spec: FeatureSpec) -> LookupProgram:
        """The lookup program of ``spec``.

        Raises:
            ConfigError: the configuration does not suit the feature; all faults at once.
        """
        where = f"{type(self).__name__}, feature {spec.name!r}"
        raise_faults(self.check(spec), where)
        program = self._program(spec)
        raise_faults(program.faults(), where)
        return program

    @property
    def computes(self) -> bool:
        """Whether the lookup is more than a program (e.g. a network per id), so that the module itself must run it."""
        return False

    def footprint(self, spec: FeatureSpec, itemsize: int = 4) -> Footprint:
        """Bytes to serve ``spec`` with this configuration, at ``itemsize`` bytes per element."""
        return self.program(spec).footprint(itemsize)

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Any) -> int:
        """Largest useful value of the size that :meth:`sized` takes."""
        return spec.num_ids

    @classmethod
    @abstractmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Any) -> Self:
        """The configuration of a size in ``[1, max_size]``; bytes do not shrink as the size grows."""

    @classmethod
    def for_budget(cls, spec: FeatureSpec, budget: int | str, *, itemsize: int = 4, **params: Any) -> Self:
        """The largest configuration whose deployed bytes, at ``itemsize`` bytes per element, fit ``budget``.

        Raises:
            BudgetError: even the smallest does not fit.
        """
        available, low, high = parse_bytes(budget), 1, cls.max_size(spec, **params)
        smallest = cls.sized(spec, 1, **params)
        need = smallest.footprint(spec, itemsize).serve
        if need > available:
            raise BudgetError(
                f"method {cls.method!r} needs at least {format_bytes(need)} for {spec.num_embeddings} ids of width "
                f"{spec.embedding_dim}; {format_bytes(available)} available (feature {spec.name!r}). Ways out: "
                f"1. a larger budget; 2. a smaller width{cls._smaller()}"
            )
        while low < high:
            middle = (low + high + 1) // 2
            if cls.sized(spec, middle, **params).footprint(spec, itemsize).serve <= available:
                low = middle
            else:
                high = middle - 1
        return cls.sized(spec, low, **params)

    @classmethod
    def plan(
        cls, specs: Sequence[FeatureSpec], budget: int, plain: MethodConfig, *, full_below: int = 200, **params: Any
    ) -> dict[str, MethodConfig]:
        """One configuration per feature such that all together deploy in ``budget`` bytes.

        Every feature gets the same fraction of its plain table, as the papers do; tables of fewer than ``full_below``
        rows, and those the method would not shrink, stay ``plain`` where that fits.

        Raises:
            BudgetError: the smallest configurations do not fit together.
        """
        # Raw ids have no plain table; the one of their estimated cardinality is what the method is held against.
        whole = {s.name: plain.footprint(replace(s, ids="index")).serve for s in specs}
        small = {s.name: cls.sized(s, 1, **params) for s in specs}
        need = {s.name: small[s.name].footprint(s).serve for s in specs}

        def choose(ratio: float, keep: int) -> tuple[int, dict[str, MethodConfig]]:
            total, chosen = 0, {}
            for s in specs:
                config: MethodConfig = plain
                raw = s.ids == "raw"
                if raw or (s.num_embeddings >= keep and need[s.name] < whole[s.name]):
                    share = int(ratio * whole[s.name])
                    config = small[s.name] if share <= need[s.name] else cls.for_budget(s, share, **params)
                    if not raw and config.footprint(s).serve >= whole[s.name]:
                        config = plain
                chosen[s.name] = config
                total += config.footprint(s).serve
            return total, chosen

        for keep in (full_below, 0):
            if choose(0.0, keep)[0] <= budget:
                low, high = 0.0, 1.0
                for _ in range(30):
                    middle = (low + high) / 2
                    low, high = (middle, high) if choose(middle, keep)[0] <= budget else (low, middle)
                return choose(low, keep)[1]
        raise BudgetError(
            f"method {cls.method!r} needs at least {format_bytes(choose(0.0, 0)[0])} for these {len(specs)} features; "
            f"{format_bytes(budget)} available. Ways out: 1. a larger budget; 2. a smaller embedding_dim"
            + cls._smaller()
        )

    @classmethod
    def _smaller(cls) -> str:
        """The last way out of a budget: methods without a cost per id, where this is not one of them already."""
        others = [f"{m!r}" for m in ("hash", "unified") if m != cls.method]
        return f"; 3. a method without a cost per id: {' or '.join(others)}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the method key and every field."""
        return {"method": self.method, **asdict(self)}

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Self:
        """Build from keyword arguments; unknown keys are errors that name the nearest field."""
        return build(cls, params, f"option of {cls.__name__}", "; give it, or a byte `budget` to size it")
