"""Id frequencies from every supported source: counts, curves, a data folder, its ``stats.json``, a data set.

Planners, reports and compression all read statistics through this module, so each accepts every source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, cast

from torch import Tensor

from recsys_embed.errors import ConfigError, DataError, raise_faults
from recsys_embed.planning.curves import FrequencyCurve
from recsys_embed.typing import CountedData, FrequencySource, Statistics
from recsys_embed.utils.types import JSON, Counts, JSONMapping


def is_counted(source: object) -> TypeGuard[CountedData]:
    """Whether ``source`` is a data set that counts ids."""
    return callable(getattr(source, "counts", None)) and callable(getattr(source, "schema", None))


def is_stats_json(source: object) -> TypeGuard[JSONMapping]:
    """Whether it is the content of a data folder's ``stats.json``."""
    return isinstance(source, Mapping) and isinstance(source.get("fields"), Mapping) and "splits" in source


class CountsByFeature(Mapping[str, Tensor]):
    """Counts per id of a data set's features, read on access; features with raw ids are left out.

    Raises:
        ConfigError: not a data set that counts ids.
    """

    def __init__(self, data: object) -> None:
        if not is_counted(data):
            raise ConfigError(f"expected counts by feature, or an opened data set; got {type(data).__name__}")
        self._data = data
        self._names = [f.name for f in data.schema(1) if f.ids != "raw"]

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        counts = self._data.counts(name) if name in self._names else None
        if counts is None:
            raise KeyError(name)
        return counts


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of one feature.

    Args:
        given: counts per id, ``(ids, counts)``, a :class:`FrequencyCurve` or an object with one as ``curve``; None
            where only ``coarse`` is known.
        coarse: the curve of summary statistics.
        seen_once: values that occur once, where known.
        unseen: per split, the share of its occurrences whose value training did not know.
    """

    given: FrequencySource | None = None
    coarse: FrequencyCurve | None = None
    seen_once: int | None = None
    unseen: Mapping[str, float] | None = None

    def curve(self) -> FrequencyCurve:
        """How the lookups of the feature spread over its ids."""
        if self.given is None and self.coarse is not None:
            return self.coarse
        found = getattr(self.given, "curve", self.given)
        if isinstance(found, FrequencyCurve):
            return found
        counts = found[1] if isinstance(found, tuple) and len(found) == 2 else found
        return FrequencyCurve.from_counts(cast("Counts", counts))


def read_statistics(source: Statistics) -> Iterator[tuple[str, FeatureStatistics]]:
    """Statistics of each feature in ``source``; a data set's counts are read one feature at a time.

    Args:
        source: a mapping of features to counts per id, ``(ids, counts)`` or curves; the content of a data folder's
            ``stats.json``, or the folder; a data set, whose counts are exact.

    Raises:
        ConfigError: none of these.
        DataError: the folder has no statistics.
    """
    if isinstance(source, (str, Path)):
        yield from _of_stats(_read(Path(source))).items()
    elif is_counted(source):
        yield from _of_data(source)
    elif is_stats_json(source):
        yield from _of_stats(source).items()
    elif isinstance(source, Mapping):
        for name, value in source.items():
            yield name, FeatureStatistics(value)
    else:
        raise ConfigError(
            "`stats` must be a mapping of feature names to counts, the content of a stats.json, an opened data set or "
            f"its folder; got {type(source).__name__}"
        )


def curves_from(stats: Statistics) -> dict[str, FrequencyCurve]:
    """Frequency curves by feature; for the sources see :func:`read_statistics`.

    Raises:
        ConfigError: no statistics, or a feature's counts are none.
        DataError: the folder has no statistics.

    >>> sorted(curves_from({"C1": [5, 3], "C2": FrequencyCurve.zipf(100)}))
    ['C1', 'C2']
    """
    curves, faults = {}, []
    for name, known in read_statistics(stats):
        try:
            curves[name] = known.curve()
        except (ConfigError, TypeError, ValueError) as e:
            faults.append(f"{e} (feature {name!r})")
    raise_faults(faults, "statistics")
    return curves


def _read(path: Path) -> JSON:
    path = path / "stats.json" if path.is_dir() else path
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        stats["fields"], stats["splits"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{path} holds no statistics of a data folder ({e!r}); make one with 'recsys-embed data'"
        ) from e
    return stats


def _of_stats(stats: JSONMapping) -> dict[str, FeatureStatistics]:
    rows = stats["splits"].get("train", next(iter(stats["splits"].values()), {})).get("rows", 0)
    found = {}
    for name, field in stats["fields"].items():
        once = field.get("seen_once")
        unseen = {split: float(rate) for split, rate in field.get("oov_rate", {}).items()}
        coarse = _curve_of_field(field, float(rows))
        found[name] = FeatureStatistics(coarse=coarse, seen_once=None if once is None else int(once), unseen=unseen)
    return found


def _of_data(data: CountedData) -> Iterator[tuple[str, FeatureStatistics]]:
    """Exact counts, and what the data's statistics say besides."""
    stats = getattr(data, "stats", None)
    coarse = _of_stats(stats) if is_stats_json(stats) else {}
    for spec in data.schema(1):
        counts, rest = data.counts(spec.name), coarse.get(spec.name, FeatureStatistics())
        if counts is not None:
            yield spec.name, FeatureStatistics(counts, rest.coarse, rest.seen_once, rest.unseen)
        elif rest.coarse is not None:
            yield spec.name, rest


def _curve_of_field(field: JSONMapping, rows: float) -> FrequencyCurve:
    """The curve of table ids: values too rare to be kept share one id."""
    distinct = max(1, int(field["distinct"]))
    size, kept = int(field["num_embeddings"]), field.get("kept")
    once = int(field.get("seen_once", 0))
    # Vocabularies number values by falling frequency; raw ids are numbers of any kind.
    curve = FrequencyCurve.from_coverage(field.get("coverage", {}), distinct, once, rows, ranked=kept is not None)
    return curve if kept is None else curve.resized(min(size, int(kept) + 1)).resized(size)
