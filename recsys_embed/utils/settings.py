"""Settings: frozen dataclasses whose fields declare what they may hold, checked together and read from plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from recsys_embed.errors import ConfigError, RecsysEmbedError, UnknownNameError, raise_faults, unknown_name
from recsys_embed.utils.types import JSON, JSONMapping, Option

T = TypeVar("T")


def param(
    default: Option,
    doc: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    empty: bool = False,
) -> Option:
    """A field of a settings class; its annotation and these bounds say what it may hold.

    Args:
        default: ``MISSING`` makes the field required.
        doc: its meaning, where the docstring of the class does not say it.
        low, high: inclusive bounds of numbers, also of those in a tuple.
        above, below: exclusive bounds.
        empty: whether a tuple may be empty; where the default is, it may.
    """
    metadata = {"doc": doc, "low": low, "high": high, "above": above, "below": below, "empty": empty}
    return field(default=default, metadata=metadata)


class _Kind(NamedTuple):
    """What values of a type must be, in words (one value, several values), and the test of it."""

    one: str
    many: str
    allows: Callable[[Any], bool]


class FieldRule(NamedTuple):
    """What a field of a settings class may hold; ``right`` is a value known to be allowed, its default as a rule."""

    name: str
    right: Any
    kind: _Kind


def _interval(bounds: Mapping[str, Any]) -> tuple[str, Callable[[Any], bool]]:
    low, high, above, below = (bounds.get(key) for key in ("low", "high", "above", "below"))
    bottom, top = (low if above is None else above), (high if below is None else below)
    if bottom is not None and top is not None:
        text = f" in {'[' if above is None else '('}{bottom}, {top}{']' if below is None else ')'}"
    elif bottom is not None:
        text = f" {'>=' if above is None else '>'} {bottom}"
    else:
        text = "" if top is None else f" {'<=' if below is None else '<'} {top}"

    def inside(value: Any) -> bool:
        return (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        )

    return text, inside


def _kind(hint: Any, bounds: Mapping[str, Any]) -> _Kind:
    """The kind of an annotation without None."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        known = ", ".join(map(str, args))
        types = tuple({type(a) for a in args})
        return _Kind(
            f"one of {known}",
            f"values among {known}",
            lambda v: isinstance(v, types) and not isinstance(v, bool) and v in args,
        )
    if origin in (Union, UnionType):
        kinds = [_kind(a, bounds) for a in args]
        return _Kind(
            " or ".join(k.one for k in kinds),
            " or ".join(k.many for k in kinds),
            lambda v: any(k.allows(v) for k in kinds),
        )
    if origin is tuple:
        return _tuple_kind(args, bounds)
    if hint is bool:
        return _Kind("true or false", "values that are true or false", lambda v: isinstance(v, bool))
    text, inside = _interval(bounds)
    if hint is int:
        return _Kind(
            f"an integer{text}",
            f"integers{text}",
            lambda v: isinstance(v, int) and not isinstance(v, bool) and inside(v),
        )
    if hint is float:
        return _Kind(
            f"a finite number{text}",
            f"finite numbers{text}",
            lambda v: (
                isinstance(v, (int, float)) and not isinstance(v, bool) and -math.inf < v < math.inf and inside(v)
            ),
        )
    if hint is str:
        return _Kind("text", "texts", lambda v: isinstance(v, str))
    if isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        return _Kind("values by name", "mappings of names to values", lambda v: isinstance(v, Mapping) and all(
            isinstance(key, str) for key in v
        ))  # fmt: skip
    if hint is Path:
        return _Kind("a path", "paths", lambda v: isinstance(v, Path))
    if isinstance(origin or hint, type) and hint is not Any:
        cls = origin or hint
        return _Kind(f"a {cls.__name__}{text}", f"{cls.__name__}s{text}", lambda v: isinstance(v, cls) and inside(v))
    return _Kind("anything", "anything", lambda v: True)


def _tuple_kind(args: tuple[Any, ...], bounds: Mapping[str, Any]) -> _Kind:
    item, empty = _kind(args[0], bounds), bounds.get("empty", False)
    length = None if Ellipsis in args else len(args)
    if length is not None:
        one = f"a list of {length} {item.many}"
    else:
        one = f"a list of {item.many}" if empty else f"a non-empty list of {item.many}"

    def allows(value: Any) -> bool:
        right = isinstance(value, tuple) and (len(value) == length if length is not None else empty or len(value) > 0)
        return right and all(map(item.allows, value))

    return _Kind(one, f"lists of {'' if length is None else f'{length} '}{item.many}", allows)


def _rule(name: str, hint: Any, bounds: Mapping[str, Any]) -> FieldRule:
    kinds = [a for a in get_args(hint) if a is not NoneType]
    if get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
        some = _kind(Union[tuple(kinds)], bounds)  # noqa: UP007 - of a tuple
        kind = _Kind(f"{some.one}, or None", f"{some.many}, or None", lambda v: v is None or some.allows(v))
    else:
        kind = _kind(hint, bounds)
    return FieldRule(name, MISSING, kind)


@cache
def rules(cls: type) -> tuple[FieldRule, ...]:
    """Rules of all fields; planning builds configurations by the ten thousand, so they are read off the class once."""
    hints, found = get_type_hints(cls), []
    for f in fields(cls):
        given = {key: value for key, value in f.metadata.items() if value is not None}
        empty = given.get("empty", False) or f.default == ()
        rule = _rule(f.name, hints[f.name], {**getattr(cls, "bounds", {}), **given, "empty": empty})
        known = f.default is not MISSING and rule.kind.allows(f.default)
        found.append(rule._replace(right=f.default) if known else rule)
    return tuple(found)


def wrong_settings(settings: Any) -> dict[str, str]:
    """What is wrong with the fields of a dataclass, each by itself: a sentence by the field's name.

    Lists and ranges become tuples and scalars of numpy Python's, where a field takes those.
    """
    faults: dict[str, str] = {}
    cls: type = type(settings)
    for name, right, kind in rules(cls):
        value = getattr(settings, name)
        if value is right or kind.allows(value):
            continue
        plain = _plain(value)
        if plain is not value and kind.allows(plain):
            object.__setattr__(settings, name, plain)
        else:
            faults[name] = fault(name, kind.one, value)
    return faults


def check_settings(settings: Any, where: str, conflicts: Callable[[Any], list[str]] | None = None) -> None:
    """Raise one error for all that is wrong with the fields of a dataclass.

    Args:
        settings: an instance; its fields are declared with :func:`param`, or by their annotations alone.
        where: what errors call it.
        conflicts: faults of its fields together. It is called with fields that are each right by themselves: wrong
            ones stand at their default, or lower bound, meanwhile; what it says of those is left out.

    Raises:
        ConfigError: names all faults.
    """
    wrong = wrong_settings(settings)
    if conflicts is None or not wrong:
        raise_faults([*wrong.values(), *(conflicts(settings) if conflicts else ())], where)
        return
    together: list[str] = []
    lows = {f.name: f.metadata.get("low") for f in fields(settings)}
    plain: type = type(settings)
    stand_in = {name: _stand_in(right, lows[name], kind) for name, right, kind in rules(plain)}
    if not any(stand_in[name] is MISSING for name in wrong):
        usable = object.__new__(type(settings))
        usable.__dict__.update({**settings.__dict__, **{name: stand_in[name] for name in wrong}})
        together = [text for text in conflicts(usable) if not any(f"`{name}`" in text for name in wrong)]
    raise_faults([*wrong.values(), *together], where)


def _stand_in(right: Any, low: Any, kind: _Kind) -> Any:
    """A value that a field may hold: its default, its lower bound, or a list of these; MISSING where none is known."""
    return next((value for value in (right, low, (low,), ()) if value is not MISSING and kind.allows(value)), MISSING)


def fault(name: str, wanted: str, got: Any) -> str:
    """The sentence for a setting that is not what it must be.

    >>> fault("lr", "a finite number >= 0", -1)
    '`lr` must be a finite number >= 0; got -1'
    """
    cure = "; give its to_dict()" if hasattr(got, "to_dict") and "values by name" in wanted else ""
    return f"`{name}` must be {wanted}; got {got!r:.200}{cure}"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | range):
        return tuple(_plain(v) for v in value)
    if isinstance(value, np.generic):
        return value.item()
    return int(value) if isinstance(value, Integral) and not isinstance(value, int) else value


@cache
def _keys(cls: type) -> tuple[frozenset[str], tuple[str, ...], frozenset[str]]:
    """Names of the fields that can be given, of those without a default, and of those that hold a float."""
    given = [f for f in fields(cls) if f.init]
    required = tuple(f.name for f in given if f.default is MISSING and f.default_factory is MISSING)
    hints = get_type_hints(cls)
    accepted = {name: get_args(hint) or (hint,) for name, hint in hints.items()}
    floats = frozenset(n for n, hints in accepted.items() if float in hints and int not in hints)
    return frozenset(f.name for f in given), required, floats


def key_faults(
    cls: type, data: Any, kind: str, missing: str = "", where: str | None = None
) -> tuple[list[str], list[str]]:
    """Keys of ``data`` that are no fields of ``cls``, with the nearest name, and required fields that it lacks.

    Args:
        cls: a dataclass.
        data: what was read, by name of field.
        kind: what a key is called in the sentences.
        missing: how to mend a required field that is absent.
        where: what errors call the whole.

    Raises:
        ConfigError: ``data`` is no mapping.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected values by name; got {type(data).__name__} ({where or cls.__name__})")
    known, required, _ = _keys(cls)
    strange = [str(unknown_name(kind, str(key), known)) for key in data if key not in known]
    return strange, [f"`{name}` is missing{missing}" for name in required if name not in data]


def refuse_unknown(
    cls: type,
    data: Any,
    kind: str,
    missing: str = "",
    where: str | None = None,
    error: type[RecsysEmbedError] = ConfigError,
) -> None:
    """Raise one error for all unknown and absent keys of ``data``, see :func:`key_faults`.

    Raises:
        UnknownNameError: keys are unknown and none is absent.
        ConfigError: ``data`` is no mapping.
        error: keys are absent.
    """
    strange, absent = key_faults(cls, data, kind, missing, where)
    raise_faults(strange + absent, where or cls.__name__, error if absent else UnknownNameError)


def build(cls: type[T], data: Any, kind: str, missing: str = "", where: str | None = None) -> T:
    """A dataclass from plain values as JSON or TOML hold them.

    Whole numbers for a float become floats, so that equal settings are written alike.

    Raises:
        UnknownNameError: keys are unknown; names the nearest ones.
        ConfigError: keys are absent, or what the class refuses; all faults at once.
    """
    refuse_unknown(cls, data, kind, missing, where)
    plain: type = cls
    floats = _keys(plain)[2]
    return cls(**{k: float(v) if k in floats and type(v) is int and abs(v) < 2**53 else v for k, v in data.items()})


class Settings:
    """Base of frozen dataclasses of settings, whose fields are declared with :func:`param`."""

    noun: ClassVar[str] = "setting"  # what errors call one of them
    title: ClassVar[str | None] = None  # and all of them; by default the name of the class

    def __post_init__(self) -> None:
        check_settings(self, self.where(), type(self).conflicts)

    def where(self) -> str:
        """What errors call these settings."""
        return self.title or type(self).__name__

    def conflicts(self) -> list[str]:
        """Faults of the settings together, where each is right by itself; subclasses say theirs."""
        return []

    @classmethod
    def from_dict(cls, data: JSONMapping) -> Self:
        """Build from plain values; an unknown key is an error that names the nearest one."""
        return build(cls, data, cls.noun, where=cls.title)

    def replace(self, **changes: Option) -> Self:
        """A copy with some settings changed, checked again; unknown keys are errors."""
        strange, _ = key_faults(type(self), changes, self.noun)
        raise_faults(strange, self.where(), UnknownNameError)
        return replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> JSON:
        """JSON-ready."""
        values = asdict(self)  # type: ignore[call-overload]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


@dataclass(frozen=True)
class FilePart(Settings):
    """Base of settings read from a part of a file that a later version may have written with further keys.

    Args:
        place: what errors call the part; not in the file.

    >>> @dataclass(frozen=True)
    ... class Split(FilePart):
    ...     rows: int = param(MISSING, low=1)
    >>> Split.read({"rows": 3, "made_by": "a later version"}, "split 'train'").rows
    3
    >>> Split.read({"rows": 0}, "split 'train'")
    Traceback (most recent call last):
    recsys_embed.errors.ConfigError: `rows` must be an integer >= 1; got 0 (split 'train')
    """

    noun = "key"
    place: str

    def where(self) -> str:
        return self.place

    @classmethod
    def read(cls, values: object, place: str) -> Self:
        """The part from JSON values; keys that this version does not know are left out.

        Raises:
            ConfigError: ``values`` is no mapping, keys are absent, or values wrong; all faults at once.
        """
        if isinstance(values, Mapping):
            values = {**{f.name: values[f.name] for f in fields(cls) if f.name in values}, "place": place}
        return build(cls, values, cls.noun, where=place)
