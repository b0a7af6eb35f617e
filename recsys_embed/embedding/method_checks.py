"""Checks of a method's classes when it is registered, so that faults do not show up in the first plan."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.embedding import CompressedEmbedding
from recsys_embed.utils.deprecated import warn_deprecated

_BASE_OPTIONS = frozenset(f.name for f in fields(MethodConfig))
# What authors may define; all else that begins without an underscore is their own.
DECLARED = tuple(n for n in {*vars(MethodConfig), "method"} if not n.startswith("_") and n not in _BASE_OPTIONS)
_CLASS_METHODS = ("sized", "max_size", "plan", "for_budget", "planning_variants", "from_params")
_METHODS = ("build_program", "check", "footprint", "planning_loss")
_SPECIAL = ("schema", "method")  # arguments of Plan.uniform, which takes options by keyword too
# Arguments of a configuration's own class methods, which take options by keyword beside them.
_OF_SIZING = frozenset({"spec", "specs", "size", "budget", "plain", "itemsize", "full_below"})


def faults_of(embedding_cls: Any) -> list[str]:
    """Everything that keeps a module class and its configuration from being registered, in words."""
    if not (isinstance(embedding_cls, type) and issubclass(embedding_cls, CompressedEmbedding)):
        return [f"a method is registered by a subclass of CompressedEmbedding; got {embedding_cls!r:.80}"]
    cls = getattr(embedding_cls, "config_cls", None)
    if not (isinstance(cls, type) and issubclass(cls, MethodConfig)):
        return [f"`config_cls` must be a subclass of MethodConfig; got {cls!r:.80}"]
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    faults = [f"{cls.__name__} must define `{name}`" for name in missing]
    faults += [*_typos(cls), *_options_that_are_none(cls), *_signatures(cls)]
    return [*faults, *_attributes(cls), *_hidden(cls, embedding_cls), *_renamings(cls)]


def _own_classes(cls: type) -> list[type]:
    """The class and its bases up to :class:`MethodConfig`."""
    return [c for c in cls.__mro__ if c is not MethodConfig and issubclass(c, MethodConfig)]


def _typos(cls: type[MethodConfig]) -> Iterator[str]:
    own = {name for c in _own_classes(cls) for name in vars(c)}
    options = {f.name for f in fields(cls)}
    for name in sorted(n for n in own - options - set(DECLARED) if not n.startswith("_")):
        near = get_close_matches(name, DECLARED, n=1, cutoff=0.85)
        if near:
            yield f"{cls.__name__} defines `{name}`; did you mean `{near[0]}`? Begin other names with an underscore"


def _options_that_are_none(cls: type[MethodConfig]) -> Iterator[str]:
    known = {f.name for f in fields(cls)}
    for c in _own_classes(cls):
        for name, hint in vars(c).get("__annotations__", {}).items():
            if name not in known and not str(hint).startswith(("ClassVar", "typing.ClassVar")):
                yield f"`{name}` of {c.__name__} is no option; decorate with @dataclass(frozen=True, kw_only=True)"


def _signatures(cls: type[MethodConfig]) -> Iterator[str]:
    for name in (*_CLASS_METHODS, *_METHODS):
        kind = classmethod if name in _CLASS_METHODS else None
        found = inspect.getattr_static(cls, name)
        if kind is not None and not isinstance(found, classmethod):
            yield f"`{name}` of {cls.__name__} must be a class method"
        elif kind is None and not inspect.isfunction(found):
            yield f"`{name}` of {cls.__name__} must be a method"
        else:
            wanted = inspect.signature(getattr(MethodConfig, name)).parameters.values()
            given = [None for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
            try:
                inspect.signature(getattr(cls, name)).bind(*given)
            except TypeError as e:
                yield f"`{name}` of {cls.__name__} must take ({', '.join(p.name for p in wanted)}): {e}"


def _attributes(cls: type[MethodConfig]) -> Iterator[str]:
    key = getattr(cls, "method", None)
    if not (isinstance(key, str) and key):
        yield f"`method` of {cls.__name__} must be the method's key, a text; got {key!r}"
    for name in ("accepts_raw", "plannable"):
        if not isinstance(getattr(cls, name), bool):
            yield f"`{name}` of {cls.__name__} must be true or false; got {getattr(cls, name)!r}"
    choices = {"order_option": ("ids", "counts"), "width_option": ()}
    for name, values in choices.items():
        option = getattr(cls, name)
        if option is None:
            continue
        hint = option_types(cls).get(option) if isinstance(option, str) else None
        if hint is None:
            yield f"`{name}` of {cls.__name__} must be None or one of its options; got {option!r}"
        elif values and not set(values) <= set(_literals(hint)):
            yield f"option `{option}` of {cls.__name__}, its `{name}`, must offer {' and '.join(map(repr, values))}"
        elif not values and int not in (hint, *get_args(hint)):
            yield f"option `{option}` of {cls.__name__}, its `{name}`, must be an integer"


@cache
def option_types(cls: type[MethodConfig]) -> dict[str, Any]:
    """The declared type of every option."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _literals(hint: Any) -> tuple[Any, ...]:
    """Values of a Literal, also where it is optional."""
    return tuple(v for t in (hint, *get_args(hint)) if get_origin(t) is Literal for v in get_args(t))


def keywords_of(cls: type[MethodConfig]) -> set[str]:
    """Names under which options and arguments of sizing are given by keyword."""
    found = {f.name for f in fields(cls)}
    for method in (cls.sized, cls.plan, cls.max_size):
        found |= {p.name for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_KEYWORD}
    return found - {"spec", "specs", "size", "budget", "plain"}


def _hidden(cls: type[MethodConfig], embedding_cls: type[CompressedEmbedding]) -> Iterator[str]:
    """Options that no keyword reaches."""
    signatures = [inspect.signature(c.__init__) for c in (CompressedEmbedding, embedding_cls)]
    taken = {p.name for s in signatures for p in s.parameters.values() if p.kind is not p.VAR_KEYWORD}
    for name in sorted(keywords_of(cls) & {*taken, *_SPECIAL}):
        yield f"option `{name}` of {cls.__name__} is hidden by the argument of that name of {embedding_cls.__name__}"
    for name in sorted({f.name for f in fields(cls)} & _OF_SIZING):
        yield f"option `{name}` of {cls.__name__} is hidden by the argument of that name by which methods are sized"
    for name in sorted({f.name for f in fields(cls)} & set(DECLARED)):
        yield f"option `{name}` of {cls.__name__} hides what MethodConfig has under that name"


def _renamings(cls: type[MethodConfig]) -> Iterator[str]:
    for name in ("renamed_options", "renamed_values"):
        if not isinstance(getattr(cls, name), Mapping):
            yield f"`{name}` of {cls.__name__} must be a mapping; got {getattr(cls, name)!r:.80}"
            return
    known = keywords_of(cls)
    for old, new in cls.renamed_options.items():
        if old in known or new not in known:
            pair = f"{old!r}: {new!r}"
            yield f"`renamed_options` of {cls.__name__} must lead from former options to present ones; got {pair}"
    for option in cls.renamed_values:
        if option not in known:
            yield f"`renamed_values` of {cls.__name__} names {option!r}, which is no option"


def infer_declarations(cls: type[MethodConfig], tags: tuple[str, ...]) -> None:
    """Fill class attributes that earlier versions guessed from names, with a warning; goes in the next version."""
    own = {name for c in _own_classes(cls) for name in vars(c)}
    types = option_types(cls)
    if "search" in tags and "plannable" not in own:
        cls.plannable = False
        _say(cls, "plannable", False, "its tag 'search'")
    if "order_option" not in own and "counts" in _literals(types.get("order")):
        cls.order_option = "order"
        _say(cls, "order_option", "order", "its option `order`")


def _say(cls: type[MethodConfig], name: str, value: Any, why: str) -> None:
    warn_deprecated(f"{cls.__name__} should declare `{name} = {value!r}`, which {why} will no longer imply")
