"""Why a feature is stored the way it is, in words."""

from __future__ import annotations

from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.core.program import LookupProgram
from recsys_embed.features import FeatureSpec
from recsys_embed.planning.limits import Limits
from recsys_embed.planning.price import Factor, Terms


def reason(
    spec: FeatureSpec, terms: Terms, config: MethodConfig, program: LookupProgram, parts: list[Factor],
    cost: int, whole: int, lost: float, limits: Limits, company: int, known: bool,
) -> str:  # fmt: skip
    """One or two sentences: what the feature looks like, how it is stored and what that loses.

    Args:
        parts: the program's factors.
        cost: bytes of the feature's own tables.
        whole: bytes of a plain table.
        lost: predicted loss as a part of the feature's learned signal.
        company: features in the same shared tables.
        known: frequencies were counted.
    """
    texts = [f"{count(spec.num_embeddings, 'id')}{_spread(terms, known)}"]
    pin = limits.pinned(spec.name)
    if pin is not None:
        texts.append("pinned")
    elif spec.num_embeddings < limits.full_below and config.method == "full":
        texts.append(f"kept whole, being under {limits.full_below}")
    texts.append(_storage(spec, terms, program, parts, company))
    if cost:
        ratio = f", {whole / cost:.3g}x smaller than a plain table" if cost < whole else ""
        texts.append(format_bytes(cost) + ratio)
    texts.append(f"predicted to lose {percent(lost)} of what the ids tell" if lost > 5e-5 else "nothing lost")
    return "; ".join(texts)


def _spread(terms: Terms, known: bool) -> str:
    curve = terms.curve
    if curve.n < 20 or not curve.mass.any():
        return ""
    top = max(1, round(0.05 * curve.n))
    assumed = "" if known else " (assumed)"
    return f", the {top:,} most frequent take {percent(curve.coverage(top))} of lookups{assumed}"


def _storage(spec: FeatureSpec, terms: Terms, program: LookupProgram, parts: list[Factor], company: int) -> str:
    """How ids find their vectors, told from the program alone."""
    curve = terms.curve
    own = max(float((f.private * curve.ids).sum()) for f in parts)
    lookups = max(float((f.private * curve.mass).sum()) for f in parts)
    rows = max((f.rows for f in parts if f.shared.any()), default=0)
    shared = next((f.table for f in parts if f.table), None)
    if shared is not None:
        table = program.table(shared)
        beside = f" with {count(company - 1, 'other feature')}" if company > 1 else ""
        reads = count(len(program.row_lookups), "read")
        return f"{reads} per id from table {shared!r} of {table.rows:,} rows shared{beside}"
    widths = sorted({f.width for f in parts}, reverse=True)
    if own >= curve.n - 0.5 and not rows:
        wide = " or ".join(f"{w:g}" for w in widths)
        head = "" if program.head is None else f", {program.head.describe()}"
        return f"every id has a row of its own, of width {wide}{head}"
    text = []
    if own >= 0.5:
        rows_of = "a row of its own" if round(own) == 1 else "rows of their own"
        text.append(f"the {count(round(own), 'most frequent id')} ({percent(lookups)} of lookups) have {rows_of}")
    if rows:
        who = "the others" if own >= 0.5 else "all ids"
        text.append(f"{who} share {count(round(rows), 'row')}")
    return " and ".join(text) or "stored by a network"


def count(n: int, what: str) -> str:
    """A number and what it counts.

    >>> count(1, "id"), count(2500, "id")
    ('1 id', '2,500 ids')
    """
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def percent(share: float) -> str:
    """A share in words that do not claim more digits than matter.

    >>> percent(0.934), percent(0.00031), percent(0.9996)
    ('93 %', '0.031 %', '99.96 %')
    """
    value = 100 * share
    if value > 99 and value < 100:
        return f"{value:.2f} %".replace("100.00", "99.99")
    return f"{value:.2g} %" if value < 10 else f"{value:.0f} %"
