"""A method's configuration: frozen options that turn a feature into a lookup program, and that a byte budget sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Self

from recsys_embed.core.footprint import Footprint, format_bytes, parse_bytes
from recsys_embed.core.precision import BITS, Precision
from recsys_embed.core.program import LookupProgram
from recsys_embed.core.row_format import STEP_RATE, TRAINED, Quantization, Rounding
from recsys_embed.errors import BudgetError, ConfigError, raise_faults
from recsys_embed.features import FeatureSpec
from recsys_embed.utils.deprecated import warn_renamed
from recsys_embed.utils.settings import build, check_settings, param
from recsys_embed.utils.types import JSON, Budget, JSONMapping, Option

if TYPE_CHECKING:
    from recsys_embed.planning.curves import FrequencyCurve

__all__ = ["MethodConfig", "param"]


_UNSAID = {
    "precision": "fp32",
    "quantization": "ptq",
    "rounding": "stochastic",
    "quantization_step": None,
    "quantization_step_lr": STEP_RATE,
    "projection": "learned",
}
"""Options that files leave out at their defaults, as earlier versions did."""
STORAGE_OPTIONS = ("precision", "quantization", "rounding", "quantization_step", "quantization_step_lr")
"""Options of every method that say how rows are stored and served."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """Base of every method's configuration.

    Subclasses are frozen dataclasses that declare their options with :func:`param`, describe the lookup in
    :meth:`build_program`, and scale with :meth:`sized`. Everything else has a default; the class attributes below are
    checked when the method is registered.

    Attributes:
        method: key of the method.
        accepts_raw: whether any int64 is a valid id, as for methods that hash.
        order_option: name of the option for the frequency order of ids, for methods that treat frequent ids
            separately. ``"ids"``: ids are numbered by descending frequency; ``"counts"``: the method stores which ids
            are frequent, see :meth:`recsys_embed.embedding.CompressedEmbedding.assign_`.
        width_option: name of the option for the width of the stored rows, if it is independent of their number;
            studies choose it together with the size.
        plannable: whether the planner, comparisons and studies may size the method. False for methods whose contents
            a search finds.
        has_own_precisions: whether options say the precision of each table, so that ``precision`` does not apply.
        options_without_network: options that the planner gives it for features that no network reads beside many others
            (:mod:`recsys_embed.planning.network_context`).
        renamed_options: present names of options by their names in earlier versions. The earlier ones are accepted
            with a DeprecationWarning, and silently when read from a file.
        renamed_values: the same for values of options, by the option's present name.
    """

    method: ClassVar[str]
    accepts_raw: ClassVar[bool] = False
    order_option: ClassVar[str | None] = None
    width_option: ClassVar[str | None] = None
    plannable: ClassVar[bool] = True
    has_own_precisions: ClassVar[bool] = False
    options_without_network: ClassVar[Mapping[str, Option]] = {}
    renamed_options: ClassVar[Mapping[str, str]] = {}
    renamed_values: ClassVar[Mapping[str, Mapping[str, Option]]] = {}

    seed: int = param(0, "salts hashes and initial weights")
    precision: Precision = param(
        "fp32", "of rows in exported files; they train unrounded unless `quantization` says so"
    )
    quantization: Quantization = param(
        "ptq",
        "how rows get to `precision`: rounded once trained; stored in it while they train, at a fixed step (lpt) or at "
        "one that each row learns (alpt); or trained in float32 and read rounded, at a learned step (lsq)",
    )
    rounding: Rounding = param("stochastic", "of updates of rows that train in `precision`")
    quantization_step: float | None = param(
        None,
        "distance of two codes, for integers that train; of learned steps, the least to start from",
        low=2.0**-24,
        high=256,
    )
    quantization_step_lr: float = param(
        STEP_RATE, "learning rate of learned steps (alpt, lsq), as a part of that of the rows", low=0, high=10
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "_program" in own and "build_program" not in own:
            warn_renamed(f"method of {cls.__name__}", "_program", "build_program")
            cls.build_program = own["_program"]  # type: ignore[method-assign]
        elif "build_program" in own:
            # Subclasses that still override the former name may call it through super().
            cls._program = own["build_program"]  # type: ignore[attr-defined]

    def __post_init__(self) -> None:
        check_settings(self, type(self).__name__)

    def check(self, spec: FeatureSpec) -> list[str]:
        """Faults of this configuration for ``spec``, one sentence each; subclasses add theirs."""
        faults = []
        if spec.ids == "raw" and not self.accepts_raw:
            faults.append(
                f"method {self.method!r} needs vocabulary indices; the feature has raw 64-bit ids: use a hashing method"
            )
        if self.precision != "fp32" and self.has_own_precisions:
            faults.append(f"`precision` does not apply beside `precisions`, one per table; got {self.precision!r}")
        elif self.precision != "fp32" and self.computes:
            faults.append(f"`precision` is for rows of tables, and these are computed; got {self.precision!r}")
        faults += self._idle_faults()
        option = "precisions" if self.has_own_precisions else "precision"
        given = getattr(self, option) if self.has_own_precisions else (self.precision,)
        known = TRAINED.get(self.quantization, given)
        untrained = [kind for kind in given if kind not in (*known, "dropped")]
        if untrained:
            verb = "rounds" if self.quantization == "lsq" else "stores"
            faults.append(
                f"`quantization={self.quantization!r}` {verb} rows at `{option}` while they train, one of "
                f"{', '.join(known)}; got {untrained[0]!r}"
            )
        return faults

    def rounded_at_export(self) -> Self:
        """The same tables, whose rows train unrounded."""
        unsaid: dict[str, Any] = {name: _UNSAID[name] for name in STORAGE_OPTIONS if name != "precision"}
        return replace(self, **unsaid)

    def _idle_faults(self) -> list[str]:
        """Faults: options of training in few bits that would change nothing."""
        given = [name for name in ("rounding", "quantization_step", "quantization_step_lr") if self._said(name)]
        if self.quantization == "ptq":
            idle = [(name, "low-precision rows (`quantization` lpt, alpt or lsq)") for name in given]
        else:
            kinds = getattr(self, "precisions", None) or (self.precision,)
            integers = any(kind in BITS for kind in kinds)
            idle = [("quantization_step", "codes (int8, int4, int2)")] * ("quantization_step" in given and not integers)
            if self.quantization == "lpt" and "quantization_step_lr" in given:
                idle.append(("quantization_step_lr", "steps that learn (`quantization` alpt or lsq)"))
            if self.quantization == "lsq" and "rounding" in given:
                # Narrow tables, which train as with "lpt", round stochastically beside such rows.
                idle.append(("rounding", "rows that are stored rounded (`quantization` lpt or alpt)"))
        return [f"`{name}` is for {purpose}, and here are none; leave it out" for name, purpose in idle]

    def _said(self, option: str) -> bool:
        return bool(getattr(self, option) != _UNSAID[option])

    @abstractmethod
    def build_program(self, spec: FeatureSpec) -> LookupProgram:
        """The lookup program of a checked ``spec``; :meth:`program` checks and calls it."""

    def program(self, spec: FeatureSpec) -> LookupProgram:
        """The lookup program of ``spec``.

        Raises:
            ConfigError: the configuration does not suit the feature; all faults at once.
        """
        where = f"{type(self).__name__}, feature {spec.name!r}"
        raise_faults(self.check(spec), where)
        program = self.build_program(spec)
        if not isinstance(program, LookupProgram):
            raise ConfigError(f"`build_program` must return a LookupProgram; got {program!r:.80} ({where})")
        raise_faults(program.faults() or program.reach_faults(spec.num_ids), where)
        return self._stored(program)

    def unchecked_program(self, spec: FeatureSpec) -> LookupProgram:
        """As :meth:`program`, for configurations that are known to suit the feature: several times as fast."""
        return self._stored(self.build_program(spec))

    def _stored(self, program: LookupProgram) -> LookupProgram:
        """The program with its rows as they are served, and stored while they train."""
        program = program if self.precision == "fp32" else program.at_precision(self.precision)
        if self.quantization == "ptq":
            return program
        return program.trained(self.quantization_step, self.rounding, self.quantization, self.quantization_step_lr)

    @property
    def computes(self) -> bool:
        """Whether vectors are computed without reading table rows (e.g. DHE), so that the module itself has to run."""
        return False

    def footprint(self, spec: FeatureSpec, itemsize: int = 4) -> Footprint:
        """Bytes to serve ``spec`` with this configuration, at ``itemsize`` bytes per element."""
        return self.program(spec).footprint(itemsize)

    @classmethod
    def max_size(cls, spec: FeatureSpec, **params: Option) -> int:
        """Largest useful ``size`` of :meth:`sized`."""
        return spec.num_ids

    @classmethod
    @abstractmethod
    def sized(cls, spec: FeatureSpec, size: int, **params: Option) -> Self:
        """The configuration of a size in ``[1, max_size]``; bytes must not decrease with the size."""

    def planning_loss(self, spec: FeatureSpec, curve: FrequencyCurve) -> float | None:
        """The estimated loss of ``spec`` under this configuration; unit: :mod:`recsys_embed.planning.loss_estimate`.

        None, the default: the planner estimates it from the program.

        Args:
            curve: how often ids occur.
        """
        return None

    @classmethod
    def planning_variants(cls, spec: FeatureSpec, curve: FrequencyCurve) -> Sequence[JSONMapping]:
        """Sets of options that the planner tries for ``spec``, each at all sizes; by default only the default options.

        Args:
            curve: how often ids occur.
        """
        return ({},)

    @classmethod
    def for_budget(cls, spec: FeatureSpec, budget: Budget, *, itemsize: int = 4, **params: Option) -> Self:
        """The largest configuration whose deployed bytes, at ``itemsize`` bytes per element, fit ``budget``.

        Raises:
            BudgetError: even the smallest does not fit.
        """
        params = cls.current_options(params)
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
        cls, specs: Sequence[FeatureSpec], budget: int, plain: MethodConfig, *, full_below: int = 200, **params: Option
    ) -> dict[str, MethodConfig]:
        """One configuration per feature such that all together deploy in ``budget`` bytes.

        Every feature gets the same fraction of its full table, as in the papers; tables of fewer than ``full_below``
        rows, and those that the method would not shrink, keep the configuration ``plain`` if that fits the budget.

        Raises:
            BudgetError: the smallest configurations do not fit together.
        """
        # Raw ids have no full table; the method is compared with one of their estimated cardinality.
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
        raise cls.budget_error(choose(0.0, 0)[0], len(specs), budget)

    @classmethod
    def budget_error(
        cls, need: int, features: int, budget: int, smaller: str = "embedding_dim", per_id: bool = True
    ) -> BudgetError:
        """The error for a plan of these features that takes at least ``need`` bytes where ``budget`` are available.

        Args:
            smaller: what to decrease so that the plan takes fewer bytes.
            per_id: whether the method stores something for each id; the message then suggests one that does not.
        """
        others = cls._smaller() if per_id else ""
        return BudgetError(
            f"method {cls.method!r} needs at least {format_bytes(need)} for these {features} features; "
            f"{format_bytes(budget)} available. Ways out: 1. a larger budget; 2. a smaller {smaller}{others}"
        )

    @classmethod
    def _smaller(cls) -> str:
        """The last suggestion for a budget that is too small: methods without a cost per id, unless this is one."""
        others = [f"{m!r}" for m in ("hash", "unified") if m != cls.method]
        return f"; 3. a method without a cost per id: {' or '.join(others)}"

    @classmethod
    def uses_former_names(cls, options: JSONMapping) -> bool:
        """Whether any option or value has its earlier name; fast, because planning calls it ten thousands of times."""
        if cls.renamed_options and not cls.renamed_options.keys().isdisjoint(options):
            return True
        if not cls.renamed_values:
            return False
        return any(isinstance(options.get(n), str) and options[n] in v for n, v in cls.renamed_values.items())

    @classmethod
    def current_options(cls, options: JSONMapping, *, warn: bool = True) -> JSON:
        """``options`` under their present names and values, see ``renamed_options``.

        Args:
            warn: whether an earlier name is a DeprecationWarning, as in code, or passes silently, as in a file.

        Raises:
            ConfigError: an option is given under both of its names.
        """
        now = dict(options)
        if not cls.uses_former_names(options):
            return now
        former = [old for old in now if old in cls.renamed_options]
        both = [old for old in former if cls.renamed_options[old] in now]
        raise_faults([f"`{o}` is the earlier name of `{cls.renamed_options[o]}`; give one" for o in both], cls.__name__)
        for old in former:
            name = cls.renamed_options[old]
            now[name] = now.pop(old)
            if warn:
                warn_renamed(f"option of {cls.__name__}", old, name)
        for name, values in cls.renamed_values.items():
            value = now.get(name)
            if isinstance(value, str) and value in values:
                now[name] = values[value]
                if warn:
                    warn_renamed(f"value of `{name}` of {cls.__name__}", value, values[value])
        return now

    if not TYPE_CHECKING:  # type checkers would accept any attribute

        def __getattr__(self, name: str) -> Any:
            """Options under their earlier names."""
            now = type(self).renamed_options.get(name)
            if now is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            warn_renamed(f"option of {type(self).__name__}", name, now)
            return getattr(self, now)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickled before an option was renamed.
        self.__dict__.update(self.current_options(state, warn=False))

    def to_dict(self) -> JSON:
        """JSON-ready: the method key and every field, without those that earlier versions lacked at their defaults."""
        values = {"method": self.method, **asdict(self)}
        for name, default in _UNSAID.items():
            if name in values and values[name] == default:
                del values[name]
        return values

    @classmethod
    def from_params(cls, params: JSON) -> Self:
        """Build from keyword arguments; unknown keys are errors that name the nearest field."""
        given = cls.current_options(params) if cls.uses_former_names(params) else params
        return build(cls, given, f"option of {cls.__name__}", "; give it, or a byte `budget` to size it")


def accept_former_names(cls: type[MethodConfig]) -> None:
    """Let a configuration be built with the earlier names of its options.

    With present names, as in the planner's inner loop, this costs one more call.
    """
    init: Any = cls.__init__
    if not (cls.renamed_options or cls.renamed_values) or hasattr(init, "__wrapped__"):
        return

    @wraps(init)
    def __init__(self: MethodConfig, *args: Any, **options: Any) -> None:
        try:
            init(self, *args, **options)
        except (TypeError, ConfigError):
            if not cls.uses_former_names(options):
                raise
            init(self, *args, **cls.current_options(options))

    cls.__init__ = __init__  # type: ignore[method-assign]
