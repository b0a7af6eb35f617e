"""The methods a planner may choose from, with their options."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recsys_embed.core.precision import Precision
from recsys_embed.errors import ConfigError, UnknownNameError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.registry import MethodInfo, get_method, list_methods
from recsys_embed.typing import Methods
from recsys_embed.utils.types import JSONMapping


def method_faults(where: str, names: Iterable[Any]) -> list[str]:
    """Faults: one for each name that is not a method."""
    known = [m.name for m in list_methods()]
    return [str(unknown_name(f"method in `{where}`", str(n), known)) for n in names if n not in known]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A candidate method, to be tried at many sizes.

    Args:
        info: the method.
        params: its options; None means the method's defaults.
        precision: of its rows once they are served; options may say another.
        menu: precisions that a method may use which stores ids at several; all if empty.
        asked: whether it was named, so that it is tried also where it can gain little.
    """

    info: MethodInfo
    params: JSONMapping | None = None
    precision: Precision = "fp32"
    menu: tuple[Precision, ...] = ()
    asked: bool = True

    @property
    def name(self) -> str:
        return self.info.name

    def variants(
        self, spec: FeatureSpec, curve: FrequencyCurve, without_network: bool, several: bool = True
    ) -> list[Candidate]:
        """The method with each set of options worth trying, see :meth:`MethodConfig.planning_variants`.

        Args:
            without_network: no network reads the feature beside many others.
            several: False for the default options alone.
        """
        if self.params is not None:
            return [self]
        cls = self.info.config_cls
        always = cls.options_without_network if without_network else {}
        if not several:
            return [replace(self, params=dict(always))] if always else [self]
        variants = [{**always, **params} for params in cls.planning_variants(spec, curve)]
        if self.menu:
            variants = [v for v in variants if set(v["precisions"]) <= {*self.menu, "dropped"}]
        return [replace(self, params=dict(params)) for params in variants]


def candidate_methods(methods: Methods | None, precisions: Sequence[Precision] = ("fp32",)) -> list[Candidate]:
    """The methods to consider at each precision, in the order of registration.

    Args:
        methods: None for all registered methods that are ``plannable``; names; or names
            with options, ``{"multihash": {"num_hashes": 3}}``.

    Raises:
        UnknownNameError: no such method.
        ConfigError: nothing to choose from.
    """
    known, named = [m.name for m in list_methods()], methods is not None
    if methods is None:
        methods = [m.name for m in list_methods() if m.config_cls.plannable]
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(methods, Collection):
        raise ConfigError(f"`methods` must be names, or names with options; got {methods!r:.80}")
    if not methods:
        raise ConfigError("`methods` must name at least one method; got none")
    raise_faults(method_faults("methods", methods), "plan_for_budget", UnknownNameError)
    found = []
    for name in known:
        if name not in methods:
            continue
        given = methods[name] if isinstance(methods, Mapping) else None
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(f"options of a method in `methods` must be a mapping; got {given!r:.80} ({name!r})")
        info = get_method(name)
        params = info.config_cls.current_options(given) if given else None
        if info.config_cls.has_own_precisions:
            # Where rows are to have one precision, such a method is a candidate only if it is asked for.
            menu = tuple(precisions) if len(precisions) > 1 else ()
            found += [Candidate(info, params, menu=menu, asked=named)] if menu or named else []
            continue
        fixed: Sequence[Precision] = ("fp32",) if params is not None and "precision" in params else precisions
        found += [Candidate(info, params, p) for p in fixed]
    return found
