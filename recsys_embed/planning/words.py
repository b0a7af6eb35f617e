"""Plans in words: the size of a configuration, and what changes from one plan to another."""

from __future__ import annotations

from dataclasses import MISSING, fields

from recsys_embed.core.footprint import format_bytes
from recsys_embed.core.method_config import MethodConfig
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan


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
    shared = sum(itemsize * t.rows * t.width for t in config.program(spec).tables if t.shared)
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
