"""Plans in words: the size of a configuration, what changes between two plans, and why a feature is stored as it is."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan
from recsys_embed.planning.limits import Limits
from recsys_embed.planning.loss_estimate import ColumnSpan, CurveTerms

SHARED_WITHOUT_NETWORK = "no network tells ids of one row apart, so those that share one lose most"
"""Reason of a feature whose ids share rows though plans avoid it: bytes do not suffice, or these ids are rare."""


def size_in_words(config: MethodConfig) -> str:
    """The options of a configuration that differ from their defaults.

    >>> from recsys_embed import get_method
    >>> size_in_words(get_method("hash").config_cls.from_params({"num_buckets": 5000}))
    'num_buckets 5,000'
    """
    parts = []
    for f in fields(config):
        value = getattr(config, f.name)
        if f.default is MISSING or value != f.default:
            text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
            parts.append(f"{f.name} {text}")
    return ", ".join(parts)


def _own_bytes(plan: Plan, spec: FeatureSpec) -> str:
    if spec.name not in plan.configs:
        return "-"
    config, itemsize = plan[spec.name], 4 if plan.notes is None else plan.notes.itemsize
    shared = sum(t.nbytes(itemsize) for t in config.program(spec).tables if t.shared)
    own = config.footprint(spec, itemsize).serve - shared
    return (
        (format_bytes(own) if own or not shared else "") + (" + " if own and shared else "") + "shared" * bool(shared)
    )


def describe_changes(old: Plan, new: Plan, schema: Schema) -> list[str]:
    """What differs between two plans, one line per feature, in the schema's order.

    >>> from recsys_embed import FeatureSpec
    >>> schema = Schema([FeatureSpec("C1", 1000, 16)])
    >>> describe_changes(Plan.full(schema), Plan.uniform(schema, "hash", budget="8KiB", full_below=0), schema)
    ['C1: full -> hash (num_buckets 128); 62.50 KiB -> 8.00 KiB']
    """
    lines = []
    for spec in schema:
        before, after = old.configs.get(spec.name), new.configs.get(spec.name)
        if before == after:
            continue
        words = []
        for config in (before, after):
            size = "" if config is None else size_in_words(config)
            words.append("nothing" if config is None else config.method + (f" ({size})" if size else ""))
        costs = [_own_bytes(plan, spec) for plan in (old, new)]
        lines.append(f"{spec.name}: {' -> '.join(words)}; {' -> '.join(costs)}")
    lines += [f"{name}: no longer there" for name in old if name not in schema.names]
    return lines or ["no change"]


@dataclass(frozen=True)
class FeatureChoice:
    """What a plan chose for one feature, and the figures that explain the choice.

    Args:
        spec: the feature.
        terms: of its frequency curve.
        config: the configuration chosen.
        program: its lookup.
        spans: the lookup's column spans.
        own_bytes: bytes of the feature's own tables.
        full_bytes: bytes of a full table.
        loss: predicted loss as a share of the feature's learned signal.
        readers: number of features that read the same shared tables.
        counted: whether frequencies were counted and not assumed.
    """

    spec: FeatureSpec
    terms: CurveTerms
    config: MethodConfig
    program: LookupProgram
    spans: list[ColumnSpan]
    own_bytes: int
    full_bytes: int
    loss: float
    readers: int
    counted: bool


def explain(choice: FeatureChoice, limits: Limits) -> str:
    """One or two sentences: what the feature looks like, how it is stored and what that loses."""
    spec, cost, full = choice.spec, choice.own_bytes, choice.full_bytes
    texts = [f"{counted(spec.num_embeddings, 'id')}{_coverage(choice)}"]
    pin = limits.pinned(spec.name)
    if pin is not None:
        texts.append("pinned")
    elif spec.num_embeddings < limits.full_below and choice.config.method == "full":
        texts.append(f"kept whole, being under {limits.full_below}")
    texts.append(_storage(choice))
    if cost:
        ratio = f", {full / cost:.3g}x smaller than a full table" if cost < full else ""
        texts.append(format_bytes(cost) + ratio)
    if choice.terms.without_network and choice.config.method != "full":
        shared = any(f.shared.any() for f in choice.spans)
        texts.append(SHARED_WITHOUT_NETWORK if shared else "no network tells ids of one row apart, so none share one")
    guess = "" if choice.counted else " (a guess: nothing was counted)"
    lost = f"predicted to lose {share_text(choice.loss)} of the ids' signal{guess}"
    texts.append(lost if choice.loss > 5e-5 else "nothing lost")
    return "; ".join(texts)


def _coverage(choice: FeatureChoice) -> str:
    """Share of lookups of the most frequent twentieth of the ids, as text."""
    curve = choice.terms.curve
    if curve.n < 20 or not curve.mass.any():
        return ""
    top = max(1, round(0.05 * curve.n))
    assumed = "" if choice.counted else " (assumed)"
    return f", the {top:,} most frequent take {share_text(curve.coverage(top))} of lookups{assumed}"


def _storage(choice: FeatureChoice) -> str:
    """How ids share rows, from the program alone."""
    curve, program, spans, readers = choice.terms.curve, choice.program, choice.spans, choice.readers
    own = max(float((f.private * curve.ids).sum()) for f in spans)
    lookups = max(float((f.private * curve.mass).sum()) for f in spans)
    rows = max((f.rows for f in spans if f.shared.any()), default=0)
    shared = next((f.table for f in spans if f.table), None)
    if program.head is not None and program.head.shares_all:
        numbers = f"of the numbers of {counted(round(rows), 'row')}"
        return f"vectors are {program.head.describe()}, {numbers}{_precision(choice)}"
    if shared is not None:
        table = program.table(shared)
        beside = f" with {counted(readers - 1, 'other feature')}" if readers > 1 else ""
        reads = counted(len(program.row_lookups), "read")
        return f"{reads} per id from table {shared!r} of {table.rows:,} rows{_precision(choice)} shared{beside}"
    widths = sorted({f.width for f in spans}, reverse=True)
    if own >= curve.n - 0.5 and not rows:
        wide = " or ".join(f"{w:g}" for w in widths)
        head = "" if program.head is None else f", {program.head.describe()}"
        return f"every id has a row of its own, of width {wide}{_precision(choice)}{head}"
    text = []
    if own >= 0.5:
        rows_of = "a row of its own" if round(own) == 1 else "rows of their own"
        at = "" if rows else _precision(choice)
        most = counted(round(own), "most frequent id")
        text.append(f"the {most} ({share_text(lookups)} of lookups) have {rows_of}{at}")
    if rows:
        who = "the others" if own >= 0.5 else "all ids"
        text.append(f"{who} share {counted(round(rows), 'row')}{_precision(choice)}")
    return " and ".join(text) or "stored by a network"


def _precision(choice: FeatureChoice) -> str:
    if choice.config.has_own_precisions:
        kinds = [t.precision for t in choice.program.tables if not t.dense]
        return f" at {' and '.join([', '.join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)}"
    return "" if choice.config.precision == "fp32" else f" at {choice.config.precision}"


def counted(n: int, what: str) -> str:
    """A number with its noun, in the plural where needed.

    >>> counted(1, "id"), counted(2500, "id")
    ('1 id', '2,500 ids')
    """
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def share_text(share: float) -> str:
    """A share as a percentage, rounded to the digits that matter.

    >>> share_text(0.934), share_text(0.00031), share_text(0.9996)
    ('93 %', '0.031 %', '99.96 %')
    """
    value = 100 * share
    if value > 99 and value < 100:
        return f"{value:.2f} %".replace("100.00", "99.99")
    return f"{value:.2g} %" if value < 10 else f"{value:.0f} %"
