"""How often ids occur, as a plan needs it: curves to plan by, and the frequent ids, which the plan keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from recsys_embed.core.id_sets import IdSet, set_text
from recsys_embed.core.index import IndexArrays
from recsys_embed.errors import ConfigError, raise_faults, unknown_name
from recsys_embed.features import FeatureSpec, Schema
from recsys_embed.plan import Plan
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.planning.shared_tables import statistics_of_tables
from recsys_embed.planning.statistics import CountsByFeature, FeatureStatistics, is_counted, read_statistics
from recsys_embed.typing import Statistics

ASSUMED_EXPONENT = 0.7
ASSUMED_LOOKUPS = 5000.0
"""Zipf exponent, and lookups per id of the largest feature, assumed where nothing was counted.

Most data are steeper and hold less, so what sharing costs is guessed on the high side: 38 to 42 % for the unified table
of a twentieth, where SASRec lost 35 to 38 % of its hit rate on MovieLens-100K.
"""


@dataclass(frozen=True)
class Frequencies:
    """Frequencies of all features of a schema.

    Args:
        curves: by feature.
        source: where they came from, in words.
        known: features that were counted.
        unordered: by feature, why nothing says which of its ids are frequent; others have counts per id, or ids
            numbered by falling frequency.
    """

    curves: Mapping[str, FrequencyCurve]
    source: str
    known: frozenset[str]
    unordered: Mapping[str, str]

    @classmethod
    def of(cls, schema: Schema, stats: Statistics | None) -> Frequencies:
        """Of statistics, assumed where there are none.

        Raises:
            ConfigError: statistics of no feature of the schema, or of ids that it does not have; all faults at once.
        """
        given, counted, every = {}, set(), set()
        faults = []
        specs = {s.name: s for s in schema}
        for name, found in () if stats is None else read_statistics(stats):
            try:
                given[name] = found.curve()
                if name in specs and _has_counts(found):
                    _check_ids(specs[name], found)
            except (TypeError, ValueError) as e:  # ConfigError is a ValueError
                faults.append(f"{e} (feature {name!r})")
            if _has_counts(found):
                counted.add(name)
                if name in given and found.counted[0] is None:
                    every.add(name)  # without ids, counts are those of all ids in order
        raise_faults(faults, "statistics")
        names = schema.names
        faults = [
            str(unknown_name("feature in the statistics", n, names)) for n in sorted(set(given) - set(names), key=str)
        ]
        for spec in schema:
            curve = given.get(spec.name)
            if curve is None or spec.ids != "index":
                continue
            if curve.n > spec.num_embeddings or (curve.n < spec.num_embeddings and spec.name in every):
                faults.append(
                    f"statistics of {curve.n} ids for {spec.num_embeddings} embeddings; give a count for each "
                    f"(torch.bincount(ids, minlength={spec.num_embeddings})), or (ids, counts) (feature {spec.name!r})"
                )
        raise_faults(faults, "plan_for_budget, `stats`")
        # A sample looks up one id of every feature, so all features have as many lookups as the largest needs.
        lookups = ASSUMED_LOOKUPS * max(s.num_embeddings for s in schema)
        made: dict[int, FrequencyCurve] = {}
        curves, unordered = {}, {}
        for spec in schema:
            n = spec.num_embeddings
            if spec.name not in given:
                unordered[spec.name] = "it needs id frequencies, and no statistics were given"
                curves[spec.name] = made.setdefault(n, FrequencyCurve.zipf(n, ASSUMED_EXPONENT, lookups))
                continue
            curves[spec.name] = given[spec.name]
            if spec.name not in counted and not given[spec.name].ranked:
                unordered[spec.name] = (
                    "it needs to know which ids are frequent, and the statistics are a curve without ids; give counts"
                )
        missing = [s.name for s in schema if s.name not in given]
        assumed = f"a guess, Zipf curves of exponent {ASSUMED_EXPONENT:g} assumed"
        source = assumed if not given else "counted" if not missing else f"counted; {assumed} for {', '.join(missing)}"
        return cls(curves, source, frozenset(given), unordered)


def _has_counts(found: FeatureStatistics) -> bool:
    return found.given is not None and not isinstance(getattr(found.given, "curve", found.given), FrequencyCurve)


def with_frequent_ids(plan: Plan, schema: Schema, stats: Statistics | None) -> Plan:
    """The plan with the ids that its lookups treat as frequent, by counts of these.

    What holds them is written with the plan, so that whoever follows it needs no counts. Features without counts, those
    whose ids are numbered by falling frequency, and indexes that the plan fills already stay as they are.

    >>> from recsys_embed import FeatureSpec
    >>> schema = Schema([FeatureSpec("C1", 1000, 8)])
    >>> plan = Plan.uniform(schema, "freqcut", num_frequent=2, order="counts")
    >>> with_frequent_ids(plan, schema, {"C1": torch.arange(1000)}).members(schema["C1"])
    {'kept': tensor([998, 999])}
    """
    sets = {name: dict(texts) for name, texts in plan.sets.items()}
    arrays: dict[str, dict[str, Tensor]] = {}
    by_name: Any = None
    stats = statistics_of_tables(schema, stats)
    for spec in schema.first_readers:
        layout = {} if plan.arrays is None else plan.arrays.layout
        readers = [s.name for s in schema.by_table[spec.table_name]]
        done = {index for name in readers for index in (*sets.get(name, ()), *layout.get(name, ()))}
        indexes = [i for i in plan[spec.name].program(spec).indexes if i.by_frequency and i.arrays]
        if stats is None or spec.ids == "raw" or not indexes or done:
            continue
        by_name = _by_name(stats) if by_name is None else by_name
        counts = _counts(spec, by_name.get(spec.name))
        if counts is None:
            continue
        order = torch.argsort(counts, descending=True, stable=True)
        for index in indexes:
            held = index.value(0, IndexArrays(index.ranked(order)))
            if isinstance(index, IdSet):
                sets.setdefault(spec.name, {})[index.name] = set_text(held, index.size)
            else:
                arrays.setdefault(spec.name, {})[index.name] = held
    plan = replace(plan, sets=sets)
    return plan.with_arrays(arrays) if arrays and plan.arrays is None else plan


def _by_name(stats: Statistics) -> Mapping[str, Any]:
    if is_counted(stats):
        return CountsByFeature(stats)
    return stats if isinstance(stats, Mapping) else {}


def _check_ids(spec: FeatureSpec, found: FeatureStatistics) -> None:
    """Refuse counts of ids that a feature does not have."""
    ids = found.counted[0]
    if ids is not None and len(ids) and spec.ids == "index" and not 0 <= ids[0] <= ids[-1] < spec.num_ids:
        wrong = int(ids[0] if ids[0] < 0 else ids[-1])
        raise ConfigError(f"statistics are of ids from 0 to {spec.num_ids - 1}; got {wrong}")


def _counts(spec: FeatureSpec, given: Any) -> Tensor | None:
    """Counts per stored id; None where only a curve is known. Ids that were not counted rank last."""
    found = FeatureStatistics(given)
    if given is None or not _has_counts(found):
        return None
    _check_ids(spec, found)
    ids, known = found.counted
    counts = torch.as_tensor(cast("Any", known)).detach().cpu()
    if ids is not None:
        return torch.zeros(spec.num_ids, dtype=torch.float64).index_add_(0, ids, counts.double())
    return torch.nn.functional.pad(counts, (0, spec.num_ids - len(counts)))
