"""A random program as frozen data, drawn from one seed: features with their methods, an optimizer, steps of ids.

Methods, their options and update rules come from the registries, so that a new one is drawn as soon as it is there.
"""

from __future__ import annotations

import math
import random
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from recsys_embed.core.method_config import MethodConfig
from recsys_embed.errors import RecsysEmbedError
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.optim import list_rules, make_rule
from recsys_embed.plan import Plan
from recsys_embed.registry import MethodInfo, get_method, list_methods

Form = Literal["matrix", "bags", "dict", "jagged"]
FORMS: tuple[Form, ...] = get_args(Form)
WIDTHS = (1, 2, 3, 4, 4, 5, 6, 8, 8, 8, 12, 16, 17, 24)
MOST_BYTES = 300_000
"""Of one feature's tables: larger ones only take time."""
FEW_BITS = ("quantization", "rounding", "quantization_step", "quantization_step_lr", "state_precision")
"""Options that round at random in every step, which no float64 oracle follows: see :mod:`tests.fuzz.few_bits`."""
HUGE = (-1, -2, 2**31 - 1, 2**31, -(2**31), 2**40 + 7, 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Feature:
    """A feature and how it is stored: arguments of FeatureSpec, a method and its options."""

    spec: dict[str, Any]
    method: str
    options: dict[str, Any]
    # Seeds the counts that are assigned before training; None leaves the ids in their order.
    counts: int | None = None

    def make(self) -> FeatureSpec:
        return FeatureSpec(**self.spec)

    def config(self) -> MethodConfig:
        return get_method(self.method).config_cls(**self.options)


@dataclass(frozen=True)
class Step:
    """One batch: ``ids[feature][sample]`` is a bag. A matrix has bags of one id each."""

    form: Form
    ids: tuple[tuple[tuple[int, ...], ...], ...]
    int32: bool = False
    strided: bool = False
    # Seeds weights of the ids, which learn if the seed is odd.
    weights: int | None = None
    # Learning rate from this step on.
    lr: float | None = None
    # What happens before it: nothing, a look at the vectors in evaluation mode, or a restart from a checkpoint.
    before: Literal["", "look", "restart"] = ""
    # Position of a feature whose ids are also looked up one by one, in the same backward.
    unpooled: int | None = None


@dataclass(frozen=True)
class Program:
    """All of it. ``rule`` None leaves ordinary gradients, sparse ones with ``sparse``."""

    seed: int
    features: tuple[Feature, ...]
    steps: tuple[Step, ...]
    rule: str | None = None
    rule_options: dict[str, Any] | None = None
    sparse: bool = False
    threads: int = 1
    # A torch optimizer steps the rule, half of the time after it has read the gradients.
    at_step: bool = False
    # Also hold drop-ins, exports and other numbers of threads against the collection.
    extras: tuple[str, ...] = ()
    # Rows train in few bits: backends are held against each other alone.
    few_bits: bool = False

    def schema(self) -> Schema:
        return Schema([f.make() for f in self.features])

    def plan(self) -> Plan:
        return Plan({f.spec["name"]: f.config() for f in self.features})

    def optimizer(self) -> Any:
        return None if self.rule is None else make_rule(self.rule, **(self.rule_options or {}))


# -- options of methods and rules -------------------------------------------------------------------------------------


@cache
def _hints(cls: type) -> dict[str, tuple[Any, ...]]:
    """The types that each field of a dataclass may hold."""
    hints = get_type_hints(cls)
    found = {}
    for f in fields(cls):  # type: ignore[arg-type]
        hint = hints[f.name]
        union = get_origin(hint) is not Literal and get_origin(hint) is not tuple and get_args(hint)
        found[f.name] = get_args(hint) if union else (hint,)
    return found


def _whole(rng: random.Random, most: int) -> int:
    """Small numbers as often as large ones."""
    return rng.choice((1, 2, 3, rng.randint(1, max(1, most)), int(max(1, most) ** rng.random())))


def _one(rng: random.Random, kinds: tuple[Any, ...], f: Any, spec: FeatureSpec) -> Any:
    """A value of a field that holds no tuple."""
    if type(None) in kinds and rng.random() < 0.3:
        return None
    kind = rng.choice([k for k in kinds if k is not type(None)])
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if kind is bool:
        return rng.random() < 0.5
    if kind is int:
        low, high = f.metadata.get("low"), f.metadata.get("high")
        value = _whole(rng, rng.choice((4, spec.embedding_dim, spec.num_ids)))
        value = 0 if low is not None and low <= 0 and rng.random() < 0.2 else value
        return value if high is None else min(value, high)
    if kind is float:
        return rng.choice((0.0, 0.1, rng.random()))
    return rng.choice(("common", "other")) if kind is str else f.default


def _tuple(rng: random.Random, length: int, spec: FeatureSpec) -> tuple[int, ...] | None:
    """Numbers such as methods take: falling widths, sizes of blocks, bits or rows of columns, moduli, factors."""
    n, width = spec.num_ids, spec.embedding_dim
    shape = rng.randrange(7)
    if shape == 0:
        return tuple(sorted(rng.sample(range(1, width + 1), min(length, width)), reverse=True))
    if shape == 1:
        return tuple(_whole(rng, max(1, n // length)) for _ in range(length - 1)) or None
    if shape == 2:
        return tuple(rng.randrange(1 << width) for _ in range(length))
    if shape == 3:
        return tuple(rng.choice((0, n, rng.randint(0, n))) for _ in range(width))
    if shape == 4:  # of at least all ids
        return (math.ceil(n ** (1 / max(2, length))) + 1,) * max(2, length)
    if shape == 5:  # of the width
        factors = [1] * max(2, length)
        while width > 1:
            part = next(p for p in (2, 3, 5, 7, width) if width % p == 0)
            factors[rng.randrange(len(factors))] *= part
            width //= part
        return tuple(factors)
    return tuple(_whole(rng, n) for _ in range(max(2, length)))


def fits(config: MethodConfig, spec: FeatureSpec) -> bool:
    if config.check(spec):
        return False
    return config.program(spec).footprint().serve <= MOST_BYTES


def draw_config(rng: random.Random, cls: type[MethodConfig], spec: FeatureSpec) -> MethodConfig | None:
    """From a configuration sized for the feature, options one by one to others that suit it; None where none does."""
    config = None
    for _ in range(4):
        try:
            found = cls.sized(spec, _whole(rng, cls.max_size(spec)))
            if fits(found, spec):
                config = found
                break
        except RecsysEmbedError:
            continue
    if config is None:
        return None
    own = {f.name: f for f in fields(cls) if f.name not in FEW_BITS}
    hints = _hints(cls)
    wide = [n for n in own if any(get_origin(k) is tuple for k in hints[n])]
    plain = [n for n in own if n not in wide]
    turns = [("one", n) for n in plain if rng.random() < 0.6] * 2 + [("tuple", "")] * (6 if wide else 0)
    rng.shuffle(turns)
    for kind, name in turns:
        if kind == "one":
            # Salts and seeds are few, so that features that share a table come to the same.
            value = rng.choice((0, 0, 1, 5)) if name == "seed" else _one(rng, hints[name], own[name], spec)
            changes = {name: value}
        else:
            length = rng.randint(1, 4)
            some = wide if rng.random() < 0.5 else rng.sample(wide, 1)
            changes = {n: _tuple(rng, length, spec) for n in some}
            changes = {n: v for n, v in changes.items() if v is not None or type(None) in hints[n]}
        try:
            found = replace(config, **changes)
            config = found if fits(found, spec) else config
        except RecsysEmbedError:
            continue
    return config


def draw_rule(rng: random.Random, name: str) -> dict[str, Any]:
    """Options that make a rule; its own numbers stay near their defaults, whose sizes its author knows."""
    default = make_rule(name)
    hints = _hints(type(default))
    for _ in range(20):
        options: dict[str, Any] = {"lr": rng.choice((0.5, 0.1, 0.01))}
        if rng.random() < 0.5:
            options["weight_decay"] = rng.choice((0.01, 0.1))
        for f in fields(default):
            kind, value = hints[f.name][0], getattr(default, f.name)
            if f.name in ("lr", "weight_decay", *FEW_BITS) or rng.random() < 0.5:
                continue
            if get_origin(kind) is Literal:
                options[f.name] = rng.choice(get_args(kind))
            elif isinstance(value, bool):
                options[f.name] = rng.random() < 0.5
            elif isinstance(value, tuple):
                options[f.name] = tuple(rng.choice((0.5, v, 0.99)) for v in value)
            elif isinstance(value, float):
                options[f.name] = rng.choice((1e-3, 0.1)) if f.name == "eps" else rng.choice((value, 0.1, 0.5))
        try:
            make_rule(name, **options)
        except RecsysEmbedError:
            continue
        # Where a gradient is all rounding, a small epsilon makes a whole step of it, which no two backends share.
        if any(f.name == "eps" for f in fields(default)):
            options["eps"] = max(options.get("eps", 0.0), 1e-3)
        return options
    return {}


# -- programs ---------------------------------------------------------------------------------------------------------


def _rows(rng: random.Random) -> int:
    return rng.choice((1, 2, 3, rng.randint(2, 20), rng.randint(20, 400), rng.choice((63, 64, 65, 1000, 2500))))


def draw_feature(
    rng: random.Random, name: str, width: int, pooling: str, methods: list[MethodInfo], earlier: list[Feature]
) -> Feature:
    spec: dict[str, Any] = {"name": name, "num_embeddings": _rows(rng), "embedding_dim": width, "pooling": pooling}
    spec["init"] = rng.choice(("normal:0.5", "uniform:1", "xavier"))
    method = rng.choice(methods)
    if method.config_cls.accepts_raw and rng.random() < 0.2:
        spec["ids"] = "raw"
        spec["unseen"] = rng.choice((None, "hash"))
    else:
        spec["unseen"] = rng.choice((None, None, None, "hash", "oov", "zero", "raise"))
    made = FeatureSpec(**spec)
    config: MethodConfig | None = None
    if earlier and rng.random() < 0.35:
        # Features alike form groups, share tables and stack their matrices.
        twin = rng.choice(earlier)
        if twin.spec.get("ids") != "raw" or spec.get("ids") == "raw":
            config = twin.config() if fits(twin.config(), made) else None
    if config is None:
        config = draw_config(rng, method.config_cls, made)
    if config is None:
        config = get_method("full").config_cls()
        spec["ids"] = "index"
    options = {f.name: getattr(config, f.name) for f in fields(config) if _differs(config, f)}
    return Feature(spec, config.method, options, rng.choice((None, rng.randrange(1000))))


def _differs(config: MethodConfig, f: Any) -> bool:
    return f.default is MISSING or getattr(config, f.name) != f.default


def _id(rng: random.Random, spec: FeatureSpec, wild: bool, int32: bool, few: list[int]) -> int:
    n = spec.num_embeddings
    if spec.padding_idx is not None and rng.random() < 0.3:
        return spec.padding_idx
    if wild and rng.random() < 0.25:
        value = rng.choice((*HUGE, n, n + 1, rng.randint(-(2**63), 2**63 - 1)))
        return value if not int32 or -(2**31) <= value < 2**31 else n
    return rng.choice(few) if few and rng.random() < 0.5 else rng.randrange(n)


def draw_step(rng: random.Random, features: list[Feature], trains: bool) -> Step:
    form, batch = rng.choice(FORMS), rng.choice((0, 1, 1, 2, 3, 5, 9, 17, 33))
    int32, long = rng.random() < 0.25, rng.choice((1, 2, 4, 9))
    ids = []
    for feature in features:
        spec = feature.make()
        wild = spec.unseen not in (None, "raise") or (spec.unseen is None and feature.config().accepts_raw)
        wild = wild and rng.random() < 0.6
        few = [rng.randrange(spec.num_embeddings) for _ in range(rng.choice((0, 1, 3)))]
        sizes = [1 if form == "matrix" else rng.choice((0, 1, 1, rng.randint(0, long))) for _ in range(batch)]
        ids.append(tuple(tuple(_id(rng, spec, wild, int32, few) for _ in range(size)) for size in sizes))
    sums = all(f.spec["pooling"] == "sum" for f in features)
    weights = rng.randrange(1000) if sums and form in ("bags", "jagged") and rng.random() < 0.5 else None
    lr = rng.choice((0.05, 0.2, 0.0)) if trains and rng.random() < 0.2 else None
    before = rng.choice(("", "", "", "look", "restart")) if trains else ""
    return Step(form, tuple(ids), int32, rng.random() < 0.3, weights, lr, before)


def draw(seed: int) -> Program:
    """The program of a seed: the same at every call, for the same methods and rules."""
    rng = random.Random(seed)
    width = rng.choice(WIDTHS)
    widths = [width] if rng.random() < 0.7 else [width, rng.choice(WIDTHS)]
    poolings = rng.choice((("sum",), ("sum",), ("mean",), ("sum", "mean"), ("sum", "mean", "max")))
    # Narrow features of two methods often come to the same shapes by different ways.
    methods = list_methods()
    if rng.random() < 0.4:
        methods, widths = rng.sample(methods, 2), [rng.choice((1, 2, 2, 3, 4, 8))]
    features: list[Feature] = []
    for i in range(rng.choice((1, 2, 2, 3, 4, 6))):
        for _ in range(10):
            found = draw_feature(rng, f"f{i}", rng.choice(widths), rng.choice(poolings), methods, features)
            if _share(features, found):
                features.append(found)
                break
    extra = random.Random(f"tables of {seed}")
    features = _pad(extra, _read_together(extra, features, poolings))
    rule = rng.choice((None, *list_rules()))
    options = None if rule is None else draw_rule(rng, rule)
    steps = tuple(draw_step(rng, features, rule is not None) for _ in range(rng.choice((1, 2, 3))))
    steps = tuple(replace(s, unpooled=extra.choice((None, None, extra.randrange(len(features))))) for s in steps)
    extras = tuple(name for name, odds in (("drop_in", 0.2), ("export", 0.07), ("threads", 0.1)) if rng.random() < odds)
    return Program(
        seed, tuple(features), steps, rule, options, rng.random() < 0.3, rng.choice((1,) * 8 + (2, 3)),
        rule is not None and rng.random() < 0.5, extras,
    )  # fmt: skip


def _read_together(rng: random.Random, features: list[Feature], poolings: tuple[str, ...]) -> list[Feature]:
    """Some features read the table of an earlier one."""
    found: list[Feature] = []
    for feature in features:
        if found and rng.random() < 0.2:
            first = rng.choice(found)
            table = first.spec.get("table", first.spec["name"])
            spec = {**first.spec, "name": feature.spec["name"], "pooling": rng.choice(poolings), "table": table}
            feature = replace(first, spec=spec)
        found.append(feature)
    # A width of another feature may have been what made two share a physical table.
    return found if _share(found[:-1], found[-1]) else features


def _pad(rng: random.Random, features: list[Feature]) -> list[Feature]:
    """Some features have padding; those of raw ids that read one table have the same."""
    found: list[Feature] = []
    raw: dict[str, int] = {}
    for feature in features:
        if rng.random() < 0.2:
            padding = rng.randrange(feature.spec["num_embeddings"])
            if feature.spec.get("ids") == "raw":
                padding = raw.setdefault(feature.spec.get("table", feature.spec["name"]), rng.choice((padding, -1, -9)))
            feature = replace(feature, spec={**feature.spec, "padding_idx": padding})
        found.append(feature)
    tables = {f.spec.get("table", f.spec["name"]) for f in found if f.spec.get("ids") == "raw"} & raw.keys()
    return [
        replace(f, spec={**f.spec, "padding_idx": raw[table]})
        if (table := f.spec.get("table", f.spec["name"])) in tables else f
        for f in found
    ]  # fmt: skip


def _share(features: list[Feature], found: Feature) -> bool:
    """Whether the tables that features share agree."""
    every = [*features, found]
    try:
        Plan({f.spec["name"]: f.config() for f in every}).tables(Schema([f.make() for f in every]))
    except RecsysEmbedError:
        return False
    return True
